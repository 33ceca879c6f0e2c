"""Conversations as batches: what is padded, what is supervised, and the same order for the same seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.finetune.batches import MULTIPLE, Example, batches, collate, pack
from llmctl.training.batch import IGNORED

PAD = 3


def example(length: int, first: int = 10) -> Example:
    return Example(tuple(range(first, first + length)), (False,) * (length // 2) + (True,) * (length - length // 2))


def test_labels_are_what_follows_and_only_where_supervised() -> None:
    batch = collate([Example((1, 5, 7, 8, 6), (False, False, False, True, True))], PAD, 64)
    assert batch.inputs[0][0, :4].tolist() == [1, 5, 7, 8]
    assert batch.labels[0, :4].tolist() == [IGNORED, IGNORED, 8, 6]
    assert set(batch.inputs[0][0, 4:].tolist()) == {PAD}
    assert set(batch.labels[0, 4:].tolist()) == {IGNORED}


def test_padding_is_masked_by_position_not_by_id() -> None:
    """unsloth#416: with pad = eos, masking by id would unteach the model to stop."""
    end = PAD
    batch = collate([Example((1, 5, 8, end), (False, False, True, True)), example(9)], PAD, 64)
    assert batch.labels[0, :3].tolist() == [IGNORED, 8, end]
    assert (batch.labels[0, 3:] == IGNORED).all()


@pytest.mark.parametrize(("longest", "length", "width"), [(10, 512, 64), (65, 512, 64), (66, 512, 128), (90, 100, 100)])
def test_rows_are_as_wide_as_needed_and_never_wider_than_the_context(longest: int, length: int, width: int) -> None:
    batch = collate([example(longest), example(5)], PAD, length)
    assert batch.inputs[0].shape == batch.labels.shape == (2, width)
    assert batch.inputs[0].dtype == np.int64
    assert MULTIPLE == 64


def test_every_epoch_has_each_conversation_once() -> None:
    examples = [example(5 + index % 7, first=100 * index) for index in range(24)]
    stream = batches(examples, size=4, seed=1, pad_id=PAD, length=64)
    for _ in range(3):
        firsts = [row[0] for batch in itertools.islice(stream, 6) for row in batch.inputs[0].tolist()]
        assert sorted(firsts) == [100 * index for index in range(24)]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    examples = [example(5, first=100 * index) for index in range(16)]

    def order(seed: int, count: int = 8) -> list[list[int]]:
        stream = batches(examples, size=4, seed=seed, pad_id=PAD, length=64)
        return [batch.inputs[0][:, 0].tolist() for batch in itertools.islice(stream, count)]

    assert order(1) == order(1)
    assert order(1)[:4] != order(1)[4:]
    assert order(1) != order(2)


@pytest.mark.parametrize("position", range(14))
def test_going_on_from_any_position_gives_the_next_batches(position: int) -> None:
    """Fault 5: in the middle of an epoch and across its edge."""
    examples = [example(4 + index % 9, first=100 * index) for index in range(23)]  # five whole batches and three left

    def stream(at: int) -> list[tuple[list[list[int]], int]]:
        found = batches(examples, size=4, seed=1, pad_id=PAD, length=64, position=at)
        return [(batch.inputs[0].tolist(), batch.position) for batch in itertools.islice(found, 15 - at)]

    assert stream(0)[position:] == stream(position)


def test_fewer_conversations_than_a_batch() -> None:
    stream = batches([example(5), example(6)], size=8, seed=1, pad_id=PAD, length=64)
    found = list(itertools.islice(stream, 3))
    assert [batch.position for batch in found] == [1, 2, 3]
    assert all(batch.inputs[0].shape == (2, 64) for batch in found)


def test_little_is_padding() -> None:
    random = np.random.default_rng(0)
    examples = [example(int(length)) for length in random.integers(10, 500, 2_000)]
    stream = itertools.islice(batches(examples, size=16, seed=1, pad_id=PAD, length=512), 125)
    used = total = 0
    for batch in stream:
        used += int((batch.inputs[0] != PAD).sum())
        total += batch.inputs[0].size
    assert used / total > 0.85


# ------------------------------------------------------------------------------------------------------------- packing


@given(st.lists(st.integers(2, 130), min_size=1, max_size=40), st.integers(1, 3))
@settings(deadline=None, max_examples=80)
def test_a_packed_batch_holds_the_same_conversations(lengths: list[int], ranks: int) -> None:
    """Each in one piece in one row, with its labels, told apart from its neighbours and from padding."""
    examples = [example(length, first=1000 * number + 10) for number, length in enumerate(lengths)]
    batch, padded = pack(examples, PAD, 130, 7, ranks), collate(examples, PAD, 130)
    assert batch.documents is not None
    ids, labels, documents = batch.inputs[0], batch.labels, batch.documents
    assert ids.shape == labels.shape == documents.shape
    assert ids.shape[1] <= 130
    assert len(ids) % ranks == 0
    assert (batch.position, batch.supervised) == (7, padded.supervised)
    for number, one in enumerate(examples):
        rows, columns = np.nonzero(documents == number)
        assert len(set(rows.tolist())) == 1
        assert columns.tolist() == list(range(columns[0], columns[0] + len(one.ids) - 1))
        assert ids[rows, columns].tolist() == list(one.ids[:-1])
        assert labels[rows, columns].tolist() == padded.labels[number, : len(columns)].tolist()
    rest = documents == len(examples)
    assert (ids[rest] == PAD).all()
    assert (labels[rest] == IGNORED).all()
    assert rest.sum() + sum(lengths) - len(lengths) == ids.size


def test_packing_changes_the_layout_and_nothing_else() -> None:
    """The same conversations in the same batches, so the same losses, in two thirds of the positions."""
    random = np.random.default_rng(0)
    examples = [example(int(length), first=1000 * n) for n, length in enumerate(random.integers(10, 60, 300))]
    size, tokens = {}, {}
    for packing in (False, True):
        stream = batches(examples, size=16, seed=1, pad_id=PAD, length=256, packing=packing)
        found = [next(stream) for _ in range(30)]
        size[packing] = sum(batch.tokens for batch in found)
        tokens[packing] = [sorted(batch.labels[batch.labels != IGNORED].tolist()) for batch in found]
    assert tokens[False] == tokens[True]
    assert size[True] < 0.7 * size[False]


def test_what_fits_one_row_takes_no_more_than_it_needs() -> None:
    assert pack([example(20), example(30)], PAD, 4096).inputs[0].shape == (1, 64)
    assert pack([example(20)] * 8, PAD, 100).inputs[0].shape == (2, 100)
