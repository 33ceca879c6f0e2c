"""What one optimiser step learns from."""

# B batch, T time

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

IGNORED = -100  # a label that is not supervised (torch's and Hugging Face's convention)


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimiser step, and where the loader stands after them."""

    inputs: tuple[Ids, ...]  # what the model reads, (B, T) each: ids, and for an encoder-decoder the decoder's ids
    labels: Ids  # (B, T) of the last input, IGNORED where nothing is supervised
    position: int = 0

    def __len__(self) -> int:
        """Sequences."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """Positions that go through the model."""
        return sum(part.size for part in self.inputs)

    @property
    def supervised(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())

    def rows(self, first: int, count: int) -> Batch:
        """Sequences [first : first + count]."""
        return Batch(
            tuple(part[first : first + count] for part in self.inputs),
            self.labels[first : first + count],
            self.position,
        )
