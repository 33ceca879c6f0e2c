"""A runner whose answers are known: it says a script, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass
class Scripted:
    """After the prompt, the token at each place is the script's with probability near 1; then token 0 for ever."""

    script: list[int]
    vocab_size: int = 300
    max_length: int = 200
    eos_ids: tuple[int, ...] = (2,)
    start_ids: tuple[int, ...] = ()
    calls: list[int] = field(default_factory=list)  # how many tokens each forward got
    prompt: int = 0

    def begin(self, prompt: Sequence[int], new: int) -> tuple[list[int], list[int]]:
        return [], list(prompt)

    def select(self, cache: list[int], rows: Sequence[int]) -> list[int]:
        raise NotImplementedError

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> list[int]:
        return []

    def forward(
        self, ids: npt.NDArray[np.int64], cache: list[int] | None = None, last_only: bool = True
    ) -> npt.NDArray[np.float32]:
        assert cache is not None
        cache.extend(ids[0].tolist())
        self.calls.append(ids.shape[1])
        if ids.shape[1] > 1 or not self.prompt:
            self.prompt = len(cache)
        at = len(cache) - self.prompt
        logits = np.zeros((1, 1, self.vocab_size), np.float32)
        logits[0, 0, self.script[at] if at < len(self.script) else 0] = 20.0
        return logits
