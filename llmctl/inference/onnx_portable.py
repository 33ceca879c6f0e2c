"""An exported decoder of the `portable` profile under ONNX Runtime, behind the interface of runners.py.

Past and present are one buffer a layer, bound once, which the graph writes in place at each row's own position. Its
attention reads the whole buffer, so a cache begins short and moves to twice the room when a row outgrows it: a text
pays for at most twice its length.

B batch, T new tokens, M places of the buffers, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from llmctl.inference.onnx_runner import OnnxCache, OnnxRunner

SHORTEST = 64  # places that a cache begins with


class GrowingCache(OnnxCache):
    """Keys and values of B sequences, (B, K, M, D) a layer, where M grows up to `limit`."""

    def __init__(
        self,
        runner: OnnxRunner,
        buffers: dict[str, Any],
        lengths: np.ndarray,
        limit: int,
        first: int = 0,
        whole: GrowingCache | None = None,
    ) -> None:
        super().__init__(runner, buffers, lengths, first)
        self.limit, self.whole = limit, whole or self
        self.generation: int = whole.generation if whole else 0  # how often the buffers had moved when they were bound

    @property
    def max_length(self) -> int:
        """Positions a row may come to have room for."""
        return self.limit

    @property
    def room(self) -> int:
        """M: positions that the buffers hold."""
        return int(next(iter(self.buffers.values())).shape()[2])

    def rows(self, start: int, stop: int) -> GrowingCache:
        """Some rows; the same view each time."""
        found = self.views.get((start, stop))
        if not isinstance(found, GrowingCache):
            place = (self.lengths[start:stop], self.limit, self.first + start, self.whole)
            found = self.views[start, stop] = GrowingCache(self.runner, self.buffers, *place)
        return found

    def select(self, rows: Sequence[int]) -> GrowingCache:
        """A copy whose row i goes on from row rows[i]."""
        made = super().select(rows)
        return GrowingCache(self.runner, made.buffers, made.lengths, self.limit)

    def reserve(self, length: int) -> None:
        """Makes room for `length` positions a row."""
        whole, room = self.whole, self.whole.room
        if length > room:
            wider = min(bucket(length), self.limit) - room
            for name, buffer in whole.buffers.items():
                values = np.pad(buffer.numpy(), ((0, 0), (0, 0), (0, wider), (0, 0)))
                whole.buffers[name] = ort.OrtValue.ortvalue_from_numpy(values, buffer.device_name())
            whole.generation += 1
            whole.bind()
        if self.generation != whole.generation:
            self.generation = whole.generation
            self.bind()


class PortableRunner(OnnxRunner):
    """Runs an export's model.onnx on the CPU or a CUDA GPU; the attributes are `OnnxRunner`'s."""

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> GrowingCache:
        """Empty buffers for `batch` sequences of up to `max_length` positions (default: the model's)."""
        limit = max_length or self.max_length
        return GrowingCache(self, self.buffers(batch, min(SHORTEST, limit)), np.zeros(batch, np.int64), limit)

    def _apart(self, cache: OnnxCache, new: np.ndarray) -> bool:
        """Whether what pads a row would be written past the end of the longest buffers."""
        return len(new) > 1 and cache.length + int(new.max()) > cache.max_length and bool((new < new.max()).any())

    def _where(self, cache: OnnxCache, new: np.ndarray) -> dict[str, np.ndarray]:
        """Positions, (B, T), after making room for them; padding stands at the last one at most."""
        T = int(new.max())
        assert isinstance(cache, GrowingCache)
        cache.reserve(cache.length + T)
        places = np.minimum(cache.lengths[:, None] + np.arange(T), self.max_length - 1)
        return {"position_ids": np.ascontiguousarray(places, np.int64)}


def bucket(length: int) -> int:
    """The room that a row of `length` positions gets: the next power of two."""
    return max(SHORTEST, 1 << (length - 1).bit_length())
