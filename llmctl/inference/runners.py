"""One small interface over torch and ONNX Runtime: token ids in, logits out, both as NumPy arrays."""

# B batch, T new time, V vocabulary

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmctl.device import Device
from llmctl.errors import UsageError
from llmctl.model import hf
from llmctl.model.transformer import Cache, Decoder

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """A model that can be asked for logits.

    Attributes:
        vocab_size: V.
        max_length: positions, prompt and answer together.
        eos_ids: every id that ends a text or a turn.
    """

    vocab_size: int
    max_length: int
    eos_ids: tuple[int, ...]

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any:
        """An empty cache for `batch` sequences of up to `max_length` positions; only its own runner understands it."""
        ...

    def forward(self, ids: Ids, cache: Any = None, last_only: bool = True) -> Logits:
        """Appends (B, T) ids to the cache; returns (B, 1, V), the last position's logits, or all (B, T, V).

        Without a cache the rows are whole sequences. All rows are T long; on the right they may be filled up with any
        id, since nothing before a position depends on what follows it.

        Raises:
            ValueError: an id outside the vocabulary, or more positions than fit.
        """
        ...


class TorchRunner:
    """A `Decoder` behind the interface."""

    def __init__(self, folder: Path, device: Device, dtype: str = "fp32") -> None:
        """Loads a model folder; `dtype` is what it computes in, "fp32", "bf16" or "fp16"."""
        torch.set_num_threads(device.threads)
        self._take(hf.load(folder, dtype, device.torch))

    @classmethod
    def of(cls, model: Decoder) -> TorchRunner:
        """A runner over a model in memory, which stays what it is: a later step of training shows in its answers."""
        runner = cls.__new__(cls)
        runner._take(model)
        return runner

    def _take(self, model: Decoder) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.max_length = model.config.max_position_embeddings
        self.eos_ids = model.config.eos_ids

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Cache:
        """See `Runner`."""
        with torch.inference_mode():
            return self.model.new_cache(batch, max_length)

    def forward(self, ids: Ids, cache: Cache | None = None, last_only: bool = True) -> Logits:
        """See `Runner`."""
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocab_size:
            raise ValueError(f"token ids lie outside 0 .. {self.vocab_size - 1}")
        was_training = self.model.training
        if was_training:  # samples drawn in mid-training: no dropout
            self.model.eval()
        try:
            with torch.inference_mode():
                given = torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.model.rope_cos.device)
                logits: Logits = self.model(given, cache, last_only=last_only).cpu().numpy()
                return logits
        finally:
            if was_training:
                self.model.train()


def load(folder: Path, device: Device, runtime: str = "auto") -> Runner:
    """The runner for a folder: ONNX Runtime where it holds an exported graph, else torch.

    Raises:
        UsageError: `runtime` is unknown, or names one that this folder is not for.
        DataError: neither a graph nor a model, or a damaged one.
    """
    if runtime not in ("auto", "onnx", "torch"):
        raise UsageError(f"runtime {runtime!r} is not known", hint="choose auto, onnx or torch")
    exported = (folder / "model.onnx").is_file()
    if runtime == "onnx" and not exported:
        raise UsageError(f"{folder} holds no model.onnx", hint="llmctl export --onnx makes one")
    if runtime == "torch" and exported and not (folder / "model.safetensors").is_file():
        raise UsageError(f"{folder} is an ONNX export", hint="name the model it was made from")
    if exported and runtime != "torch":
        from llmctl.inference.onnx_runner import OnnxRunner

        return OnnxRunner(folder, device)
    return TorchRunner(folder, device)
