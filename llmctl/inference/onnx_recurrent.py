"""An exported recurrent model under ONNX Runtime, behind the interface of runners.py.

Its state is a few vectors a layer, whatever the length of the text: it goes in and comes out with every call, and the
rows of a batch may hold and get different numbers of tokens.

B batch, T new tokens, C channels, L layers, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.inference.onnx_runner import GRAPH, check, open_session
from llmctl.model import hf


@dataclass(eq=False)
class RecurrentCache:
    """What each layer remembers of B sequences; `lengths` (B,) counts the tokens each has read.

    A view (`rows`) shares memory and lengths with the whole.
    """

    h: np.ndarray  # (L, B, C)
    c: np.ndarray
    lengths: np.ndarray
    max_length: int

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max(initial=0))

    def rows(self, start: int, stop: int) -> RecurrentCache:
        """Some rows."""
        part = slice(start, stop)
        return RecurrentCache(self.h[:, part], self.c[:, part], self.lengths[part], self.max_length)

    def reset(self) -> None:
        """Forgets every row."""
        self.h[:], self.c[:], self.lengths[:] = 0.0, 0.0, 0


class RecurrentRunner:
    """Runs the model.onnx of export/lstm_graph.py on the CPU or a CUDA GPU; the attributes are `OnnxRunner`'s."""

    start_ids: tuple[int, ...] = ()

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads the graph; raises what `OnnxRunner` raises."""
        config = hf.read_config(folder)
        self.folder, self.device = folder, device
        self.vocab_size, self.eos_ids = config.vocab_size, config.eos_ids
        self.max_length = config.max_position_embeddings
        self.state_shape = (config.num_hidden_layers, config.hidden_size)
        self.session = open_session(folder, device)
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        for name in ("past.h", "past.c"):
            found = shapes.get(name, [])
            if [*found[:1], *found[2:]] != [*self.state_shape]:
                L, C = self.state_shape
                raise DataError(f"has the state {name} {found} for {L} layers of {C}", file=folder / GRAPH)

    def begin(self, prompt: Sequence[int], new: int) -> tuple[RecurrentCache, list[int]]:
        """See `runners.Runner`."""
        return self.new_cache(max_length=len(prompt) + new), list(prompt)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> RecurrentCache:
        """States of zeros for `batch` sequences of up to `max_length` positions (default: the model's)."""
        L, C = self.state_shape
        h, c = np.zeros((2, L, batch, C), np.float32)
        return RecurrentCache(h, c, np.zeros(batch, np.int64), max_length or self.max_length)

    def forward(
        self,
        ids: np.ndarray,
        cache: RecurrentCache | None = None,
        last_only: bool = True,
        new: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads new tokens and returns their logits; as `OnnxRunner.forward`."""
        B, T = ids.shape
        new = np.full(B, T) if new is None else np.asarray(new)
        cache = cache if cache is not None else self.new_cache(B, T)
        check(ids, cache, new, self.vocab_size, self.max_length)
        T = int(new.max())
        ragged = bool((new < T).any())
        given = {
            "input_ids": np.ascontiguousarray(ids[:, :T], np.int64),
            "sequence_lengths": new.astype(np.int32),
            "past.h": np.ascontiguousarray(cache.h),
            "past.c": np.ascontiguousarray(cache.c),
            "logits_to_keep": np.array([1 if last_only and not ragged else T], np.int64),
        }
        logits, cache.h[:], cache.c[:] = self.session.run(["logits", "present.h", "present.c"], given)
        cache.lengths += new
        found: np.ndarray = logits[np.arange(B), new - 1][:, None] if last_only and ragged else logits
        return found

    def select(self, cache: RecurrentCache, rows: Sequence[int]) -> RecurrentCache:
        """See `runners.Runner`."""
        kept = list(rows)
        return RecurrentCache(cache.h[:, kept], cache.c[:, kept], cache.lengths[kept], cache.max_length)
