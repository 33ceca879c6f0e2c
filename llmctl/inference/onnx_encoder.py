"""An exported encoder under ONNX Runtime, and sentence embeddings made with it.

B batch, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.inference.encode import Embedder, Vectors
from llmctl.inference.onnx_runner import GRAPH, open_session
from llmctl.model import hf

OUTPUTS = {"embedding": ("sentence_embedding",), "question-answering": ("start_logits", "end_logits")}


class EncoderRunner:
    """Runs the model.onnx of export/encoder_graph.py on the CPU or a CUDA GPU."""

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graph.

        Raises:
            DataError, UnavailableError: see `OnnxRunner`; or the graph is not of this model's task.
        """
        self.config = hf.read_config(folder)
        self.session = open_session(folder, device)
        self.names = OUTPUTS.get(self.config.task, ("logits",))
        given = {value.name for value in self.session.get_outputs()}
        if missing := [name for name in self.names if name not in given]:
            raise DataError(f"gives no {missing[0]}, which a model for {self.config.task} does", file=folder / GRAPH)
        self.takes_types = "token_type_ids" in {value.name for value in self.session.get_inputs()}

    def forward(self, ids: np.ndarray, mask: np.ndarray, token_types: np.ndarray | None = None) -> np.ndarray:
        """What `model.transformer.Encoder.forward` gives, of (B, T) ids; `mask` (B, T) is false at padding.

        Raises:
            ValueError: ids outside the vocabulary, or more tokens than the model has positions for.
        """
        found = self.run(ids, mask, token_types, self.names)
        whole: np.ndarray = found[0] if len(found) == 1 else np.stack(found, axis=-1)
        return whole

    def fill(self, ids: np.ndarray) -> np.ndarray:
        """`forward` of texts without padding."""
        return self.forward(ids, np.ones(ids.shape, bool))

    def run(
        self, ids: np.ndarray, mask: np.ndarray, token_types: np.ndarray | None, names: Sequence[str]
    ) -> list[np.ndarray]:
        """The outputs of the graph called `names`; otherwise as `forward`."""
        c = self.config
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= c.vocab_size:
            raise ValueError(f"token ids lie outside 0 .. {c.vocab_size - 1}")
        if ids.shape[1] > c.longest:
            raise ValueError(f"{ids.shape[1]} positions do not fit in {c.longest}")
        given = {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": mask.astype(np.int64)}
        if self.takes_types:
            types = np.zeros_like(ids) if token_types is None else token_types
            given["token_type_ids"] = np.ascontiguousarray(types, np.int64)
        found: list[np.ndarray] = self.session.run(list(names), given)
        return found


class OnnxEmbedder(Embedder):
    """An exported sentence encoder."""

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graph; raises what `EncoderRunner` and `Embedder` raise."""
        self.runner = EncoderRunner(folder, device)
        self._take(folder, self.runner.config)

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> Vectors:
        return self.runner.forward(ids, mask)
