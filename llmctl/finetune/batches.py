"""Conversations as batches: an epoch is shuffled, then sorted by length within pools, so that little is padding. Each
has a row of its own, or, packed, shares one with others, which it does not see. What is learned is the same.
"""

# B batch, T time

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.training.batch import IGNORED, Batch, Ids

POOL = 16  # batches whose conversations are sorted together: enough to waste under a tenth on padding
MULTIPLE = 64  # rows are padded to a multiple of this, so that few different shapes exist


@dataclass(frozen=True)
class Example:
    """A conversation as ids; `supervised` marks the assistant's tokens and the token that ends each of its turns.

    Or a window of plain text, all of it supervised.
    """

    ids: Sequence[int]
    supervised: Sequence[bool]


def batches(
    examples: Sequence[Example],
    *,
    size: int,
    seed: int,
    pad_id: int,
    length: int,
    position: int = 0,
    packing: bool = False,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Endless batches of `size` conversations of at most `length` + 1 tokens. `position` counts batches: the same one
    always gives the same batch, packed (into a number of rows that the ranks can share out) or not."""
    per_epoch = max(1, len(examples) // size)
    while True:
        epoch, within = divmod(position, per_epoch)
        for batch in _epoch(examples, size, np.random.default_rng([seed, epoch]))[within:]:
            position += 1
            yield pack(batch, pad_id, length, position, ranks) if packing else collate(batch, pad_id, length, position)


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
        _put(row, ids[index], labels[index])
    return Batch((ids,), labels, position)


def pack(rows: Sequence[Example], pad_id: int, length: int, position: int = 0, ranks: int = 1) -> Batch:
    """The same conversations in fewer and fuller rows (R, T), T at most `length`, R a multiple of `ranks`.

    The longest first, each into the first row that has room. `documents` numbers those of a row; padding, another
    number, sees nothing and is seen by none.
    """
    sizes = [len(row.ids) - 1 for row in rows]
    wanted = -(-sum(sizes) // length)  # rows of equal width that would do if conversations could be cut
    width = min(length, -(-max(*sizes, -(-sum(sizes) // wanted)) // MULTIPLE) * MULTIPLE)
    used: list[int] = []
    places: list[tuple[int, int, int]] = []  # conversation, row, first position
    for index in sorted(range(len(rows)), key=lambda index: -sizes[index]):
        row = next((row for row, taken in enumerate(used) if taken + sizes[index] <= width), len(used))
        used += [0] if row == len(used) else []
        places.append((index, row, used[row]))
        used[row] += sizes[index]
    shape = -(-len(used) // ranks) * ranks, width
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    documents = np.full(shape, len(rows), dtype=np.int64)
    for index, row, first in places:
        _put(rows[index], ids[row, first:], labels[row, first:])
        documents[row, first : first + sizes[index]] = index
    return Batch((ids,), labels, position, documents)


def _put(example: Example, ids: Ids, labels: Ids) -> None:
    """Writes a conversation and what follows each of its tokens to the beginning of (T,) ids and labels."""
    tokens, mask = np.asarray(example.ids), np.asarray(example.supervised)
    ids[: len(tokens) - 1] = tokens[:-1]
    labels[: len(tokens) - 1] = np.where(mask[1:], tokens[1:], IGNORED)
