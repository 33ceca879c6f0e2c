"""One small interface over torch and ONNX Runtime: token ids in, logits out, both as NumPy arrays."""

# B batch, T new time, V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmctl.device import Device
from llmctl.errors import DataError, UsageError
from llmctl.model import hf, packed
from llmctl.model.lstm import LSTM
from llmctl.model.transformer import Decoder, Encoder, EncoderDecoder

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Writer = Decoder | LSTM | EncoderDecoder
GRAPHS = ("model.onnx", "encoder_model.onnx")  # one of them is in the folder of every export to ONNX


class Runner(Protocol):
    """A model that can be asked for logits.

    Attributes:
        vocab_size: V.
        max_length: positions, prompt and answer together.
        eos_ids: every id that ends a text or a turn.
        start_ids: what an encoder-decoder's answer begins with; empty for a decoder, which goes on from the prompt.
    """

    vocab_size: int
    max_length: int
    eos_ids: tuple[int, ...]
    start_ids: tuple[int, ...]

    def begin(self, prompt: Sequence[int], new: int) -> tuple[Any, list[int]]:
        """A cache with room for an answer of `new` tokens to a prompt, and the ids to `forward` first.

        Those are the prompt itself, or, where an encoder has read it, `start_ids`.
        """
        ...

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

    def select(self, cache: Any, rows: Sequence[int]) -> Any:
        """A cache of len(rows) sequences whose row i goes on from row rows[i] of `cache`: a row may be taken twice."""
        ...


class TorchRunner:
    """A model that writes text behind the interface: a `Decoder`, an `EncoderDecoder` or an `LSTM`."""

    def __init__(self, folder: Path, device: Device, dtype: str = "fp32") -> None:
        """Loads a model folder; `dtype` is what it computes in, "fp32", "bf16" or "fp16".

        Raises:
            DataError: the folder is damaged, or holds a model that writes no text.
        """
        torch.set_num_threads(device.threads)
        model = hf.load(folder, dtype, device.torch, mapped=dtype == "fp32")  # other weights are packed: copied
        if isinstance(model, Encoder):
            config = model.config
            raise DataError(
                f"is a {config.family} {config.kind} for {config.task}, which writes no text",
                file=folder,
                hint="name a causal language model or an encoder-decoder",
            )
        packed.pack(model)
        self._take(model)

    @classmethod
    def of(cls, model: Writer) -> TorchRunner:
        """A runner over a model in memory, which stays what it is: a later step of training shows in its answers."""
        runner = cls.__new__(cls)
        runner._take(model)
        return runner

    def _take(self, model: Writer) -> None:
        config, encodes = model.config, isinstance(model, EncoderDecoder)
        self.model = model
        self.vocab_size = config.vocab_size
        self.max_length = config.max_position_embeddings
        self.eos_ids = config.eos_ids
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
        self.start_ids: tuple[int, ...] = (start or 0,) if encodes else ()

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return next(name for name, kind in hf.DTYPES.items() if kind == self.model.head_weight().dtype)

    def begin(self, prompt: Sequence[int], new: int) -> tuple[Any, list[int]]:
        """See `Runner`."""
        if not isinstance(self.model, EncoderDecoder):
            return self.new_cache(1, len(prompt) + new), list(prompt)
        cache = self.new_cache(1, len(self.start_ids) + new)
        with self._inference(), torch.inference_mode():
            self.model.read(cache, self.model.encode(self._tensor(np.asarray([prompt], np.int64))))
        return cache, list(self.start_ids)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any:
        """See `Runner`."""
        with torch.inference_mode():
            return self.model.new_cache(batch, max_length)

    def forward(self, ids: Ids, cache: Any = None, last_only: bool = True) -> Logits:
        """See `Runner`. An encoder-decoder needs the cache that `begin` gave."""
        step = self.model.decode if isinstance(self.model, EncoderDecoder) else self.model
        with self._inference(), torch.inference_mode():
            logits: Logits = step(self._tensor(ids), cache=cache, last_only=last_only).cpu().numpy()
            return logits

    def select(self, cache: Any, rows: Sequence[int]) -> Any:
        """See `Runner`."""
        with torch.inference_mode():
            return cache.select(torch.tensor(rows, device=self.model.device))

    def _tensor(self, ids: Ids) -> torch.Tensor:
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocab_size:
            raise ValueError(f"token ids lie outside 0 .. {self.vocab_size - 1}")
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.model.device)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No dropout in samples that are drawn in mid-training."""
        if not self.model.training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def has_graph(folder: Path) -> bool:
    """Whether a folder holds a model exported to ONNX."""
    return any((folder / name).is_file() for name in GRAPHS)


def load(folder: Path, device: Device, runtime: str = "auto", dtype: str = "fp32") -> Runner:
    """The runner for a folder: ONNX Runtime where it holds an exported graph, else torch, which computes in `dtype`.

    Raises:
        UsageError: `runtime` is unknown, or names one that this folder is not for.
        DataError: neither a graph nor a model, or a damaged one.
    """
    if runtime not in ("auto", "onnx", "torch"):
        raise UsageError(f"runtime {runtime!r} is not known", hint="choose auto, onnx or torch")
    if runtime == "onnx" and not has_graph(folder):
        raise UsageError(f"{folder} holds no model.onnx", hint="llmctl export --onnx makes one")
    if runtime == "torch" and has_graph(folder) and not (folder / "model.safetensors").is_file():
        raise UsageError(f"{folder} is an ONNX export", hint="name the model it was made from")
    if has_graph(folder) and runtime != "torch":
        from llmctl.inference import exported
        from llmctl.inference.onnx_seq2seq import Seq2SeqRunner

        if hf.read_config(folder).kind == "encoder-decoder":
            return Seq2SeqRunner(folder, device)
        return exported.load(folder, device)
    return TorchRunner(folder, device, dtype)
