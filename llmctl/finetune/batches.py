"""Conversations as padded batches: an epoch is shuffled, then sorted by length within pools, so that little is
padding.
"""

# B batch, T time

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.training.batch import IGNORED, Batch

POOL = 16  # batches whose conversations are sorted together: enough to waste under a tenth on padding
MULTIPLE = 64  # rows are padded to a multiple of this, so that few different shapes exist


@dataclass(frozen=True)
class Example:
    """A conversation as ids; `supervised` marks the assistant's tokens and the token that ends each of its turns."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def batches(
    examples: Sequence[Example], *, size: int, seed: int, pad_id: int, length: int, position: int = 0
) -> Iterator[Batch]:
    """Endless batches of `size` conversations of at most `length` + 1 tokens. `position` counts batches: the same one
    always gives the same batch."""
    per_epoch = max(1, len(examples) // size)
    while True:
        epoch, within = divmod(position, per_epoch)
        for batch in _epoch(examples, size, np.random.default_rng([seed, epoch]))[within:]:
            position += 1
            yield collate(batch, pad_id, length, position)


def _epoch(examples: Sequence[Example], size: int, random: np.random.Generator) -> list[list[Example]]:
    order = random.permutation(len(examples))
    found: list[list[Example]] = []
    for first in range(0, len(order), size * POOL):
        pool = sorted(order[first : first + size * POOL], key=lambda index: len(examples[index].ids))
        found += [[examples[i] for i in pool[at : at + size]] for at in range(0, len(pool), size)]
    whole = [batch for batch in found if len(batch) == min(size, len(examples))]
    return [whole[i] for i in random.permutation(len(whole))]


def collate(rows: Sequence[Example], pad_id: int, length: int, position: int = 0) -> Batch:
    """Rows padded on the right to one width: (B, T), T at most `length`.

    Padding is masked by position, never by id, so that a supervised end of text is kept whatever the padding id is.
    """
    longest = max(len(row.ids) for row in rows) - 1
    width = min(length, -(-longest // MULTIPLE) * MULTIPLE)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        tokens, mask = np.asarray(row.ids), np.asarray(row.supervised)
        ids[index, : len(tokens) - 1] = tokens[:-1]
        labels[index, : len(tokens) - 1] = np.where(mask[1:], tokens[1:], IGNORED)
    return Batch((ids,), labels, position)
