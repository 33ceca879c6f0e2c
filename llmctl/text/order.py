"""In which order samples are drawn: shuffled, and mixed from several sources, without a table of all of them.

Both are functions of a sample's number, so that where a training stands is one integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

ROUNDS = 8  # of the Feistel network; 4 make a strong permutation of a large domain, small ones want more
SLOTS = 1 << 14  # of the pattern in which sources are mixed: a weight is met to 1 part in so many


def shuffled(numbers: Ids, count: int, keys: Ids) -> Ids:
    """Where each of `numbers` (any shape, 0 <= number < count) goes in a permutation of [0, count) drawn by `keys`.

    A Feistel network over pairs of numbers below a = ceil(sqrt(count)), walked again where it leads out of [0, count):
    "Generalized-Feistel" and "cycle-walking" of Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains". No
    memory but the numbers themselves.

    Args:
        keys: `ROUNDS` of them, 0 <= key < 2**63.
    """
    side = np.uint64(math.isqrt(count - 1) + 1)
    found = numbers.astype(np.uint64)
    outside = np.ones(found.shape, dtype=np.bool_)
    while outside.any():  # rarely twice: the square of the side is hardly larger than `count`
        left, right = np.divmod(found[outside], side)
        for key in keys.astype(np.uint64):
            left, right = right, (left + _mixed(right ^ key) % side) % side
        found[outside] = left * side + right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input changes half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Which component a sample comes from, and the how-manieth of it, as functions of the sample's number alone.

    A pattern of `SLOTS` samples is repeated. In it, each component's samples lie evenly spread, so any stretch of
    samples, a batch for one, has about the shares that the whole has.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive and need no particular sum."""
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * SLOTS
        slots = np.maximum(1, np.floor(exact)).astype(np.int64)
        while (rest := SLOTS - int(slots.sum())) != 0:  # one to those that lack most, or from the largest
            slots[np.argmax(exact - slots) if rest > 0 else np.argmax(slots)] += 1 if rest > 0 else -1
        owner = np.repeat(np.arange(len(slots)), slots)
        rank = np.concatenate([np.arange(share) for share in slots])
        order = np.argsort((rank + 0.5) / slots[owner], kind="stable")
        self._slots, self._owner, self._rank = slots, owner[order], rank[order]

    @property
    def shares(self) -> list[float]:
        """Of the samples, each component's."""
        return [int(share) / SLOTS for share in self._slots]

    def __call__(self, numbers: Ids) -> tuple[Ids, Ids]:
        """Samples by number (N,) -> the component of each and its number within that component, (N,) each."""
        turn, slot = np.divmod(numbers, SLOTS)
        owner = self._owner[slot]
        return owner, turn * self._slots[owner] + self._rank[slot]
