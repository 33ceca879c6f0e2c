"""What is hidden: how much, never what must not be, and always so that the text can be put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import RecipeError
from llmctl.training import corruption
from llmctl.training.batch import IGNORED, Ids
from llmctl.training.corruption import generator

MASK, SPECIAL, ORDINARY = 4, np.arange(10), np.arange(10, 500)
SENTINELS, EOS = np.arange(3000, 3032)[::-1], 2  # falling ids, as T5's own vocabulary has them


def masked(ids: Ids, seed: int = 1, sample: int = 0) -> tuple[Ids, Ids]:
    return corruption.mask(ids, generator(seed, sample), mask_id=MASK, special=SPECIAL, ordinary=ORDINARY)


def cut(ids: Ids, seed: int = 1, sample: int = 0) -> tuple[Ids, Ids]:
    return corruption.spans(ids, generator(seed, sample), sentinels=SENTINELS, eos=EOS)


# --------------------------------------------------------------------------------------------------------------- masks


def test_the_shares_are_berts() -> None:
    """15 % of the tokens; of those 80 % masked, 10 % random, 10 % as they were."""
    random = np.random.default_rng(0)
    rows = random.integers(10, 500, (200, 512))
    pairs = [masked(row, sample=sample) for sample, row in enumerate(rows)]
    read, labels = (np.stack(part) for part in zip(*pairs, strict=True))
    chosen = labels != IGNORED
    assert (chosen.sum(1) == round(0.15 * 512)).all()
    assert (read[~chosen] == rows[~chosen]).all()
    assert (labels[chosen] == rows[chosen]).all()
    fates = (read[chosen] == MASK, read[chosen] == rows[chosen])
    count = chosen.sum()
    for found, share in zip(fates, (0.8, 0.1 + 0.1 / 490), strict=True):  # a random token may be the right one
        assert found.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / count))
    swapped = read[chosen & (read != MASK) & (read != rows)]
    assert np.isin(swapped, ORDINARY).all()
    assert len(np.unique(swapped)) > 400
    by_position = chosen.mean(0)  # no place is favoured
    assert by_position.std() == pytest.approx(np.sqrt(0.15 * 0.85 / 200), rel=0.2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 499), min_size=1, max_size=60), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_special_tokens_are_never_chosen(ids: list[int], seed: int, sample: int) -> None:
    row = np.array(ids)
    before = row.copy()
    read, labels = masked(row, seed, sample)
    chosen, ordinary = labels != IGNORED, row >= 10
    assert (row == before).all()
    assert not (chosen & ~ordinary).any()
    assert chosen.sum() == (max(1, round(0.15 * ordinary.sum())) if ordinary.any() else 0)
    assert (read[~chosen] == row[~chosen]).all()


def test_a_sample_is_hidden_in_the_same_way_every_time() -> None:
    row = np.arange(10, 400)
    for hide in (masked, cut):
        one, same, sample, seed = (hide(row, *at)[0].tolist() for at in ((1, 7), (1, 7), (1, 8), (2, 7)))
        assert one == same
        assert one != sample
        assert one != seed


# --------------------------------------------------------------------------------------------------------------- words


class Fixed:
    """Words by the numbers of a table; stands in for `text.words.Words`."""

    def __init__(self, numbers: Ids) -> None:
        self._numbers = numbers

    def numbers(self, ids: Ids) -> Ids:
        return self._numbers[: len(ids)]


def masked_words(ids: Ids, numbers: Ids, sample: int = 0) -> tuple[Ids, Ids]:
    random: Any = Fixed(numbers)
    return corruption.mask(ids, generator(1, sample), mask_id=MASK, special=SPECIAL, ordinary=ORDINARY, words=random)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(0, 2**40))
def test_words_are_hidden_whole_and_no_more_tokens_than_without(lengths: list[int], sample: int) -> None:
    """A word between two special tokens is whole, too; only what is longer than all that may be hidden is split."""
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.random.default_rng(sample).integers(0, 60, len(numbers))  # one in six is special
    _, labels = masked_words(ids, numbers, sample)
    chosen, ordinary = labels != IGNORED, ids >= 10
    count = max(1, round(0.15 * ordinary.sum())) if ordinary.any() else 0
    assert chosen.sum() <= count
    assert chosen.any() == ordinary.any()
    assert not (chosen & ~ordinary).any()
    sizes = np.bincount(numbers[ordinary], minlength=len(lengths))
    if ((sizes > 0) & (sizes <= count)).any():
        for word in range(len(lengths)):
            inside = (numbers == word) & ordinary
            assert chosen[inside].all() or not chosen[inside].any()


def test_the_share_of_hidden_tokens_is_berts_with_words_too() -> None:
    random = np.random.default_rng(0)
    hidden = total = 0
    fates: list[bool] = []
    for sample in range(100):
        lengths = random.integers(1, 5, 200)
        numbers = np.repeat(np.arange(200), lengths)
        ids = random.integers(10, 500, len(numbers))
        read, labels = masked_words(ids, numbers, sample)
        chosen = labels != IGNORED
        hidden, total = hidden + int(chosen.sum()), total + len(ids)
        fates += (read[chosen] == MASK).tolist()
    assert 0.14 < hidden / total <= 0.1505
    assert np.mean(fates) == pytest.approx(0.8, abs=0.02)


# --------------------------------------------------------------------------------------------------------------- spans


def restored(inputs: Ids, targets: Ids) -> list[int]:
    """The text again: each sentinel of the inputs replaced by what follows it in the targets."""
    assert targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token in SENTINELS:
            assert token not in spans
            spans[token] = []
        else:
            list(spans.values())[-1].append(token)
    assert list(spans) == [token for token in inputs.tolist() if token in SENTINELS] == SENTINELS[: len(spans)].tolist()
    return [id for token in inputs.tolist() for id in spans.get(token, [token])]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 649), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_inputs_and_targets_make_the_text_again(length: int, seed: int, sample: int) -> None:
    row = np.random.default_rng(length).integers(3, 3000, length)
    inputs, targets = cut(row, seed, sample)
    assert restored(inputs, targets) == row.tolist()
    hidden = min(max(round(0.15 * length), 1), length - 1)
    count = corruption.span_count(length)
    assert len(inputs) == length - hidden + count  # so batches need no padding
    assert len(targets) == hidden + count + 1
    assert inputs[0] == row[0]
    assert inputs[-1] == SENTINELS[count - 1]


def test_spans_are_three_tokens_long_on_average_and_of_many_lengths() -> None:
    lengths: list[int] = []
    for sample in range(200):
        hidden = corruption.noise(512, generator(3, sample))
        edges = np.flatnonzero(np.diff(np.concatenate(([0], hidden.astype(int), [0]))))
        lengths += (edges[1::2] - edges[::2]).tolist()
    assert np.mean(lengths) == pytest.approx(77 / 26)
    assert min(lengths) == 1
    assert max(lengths) > 9


def test_every_partition_is_equally_likely() -> None:
    """4 = 1 + 3 = 2 + 2 = 3 + 1."""
    random = generator(1, 1)
    found = [tuple(corruption._partition(4, 2, random).tolist()) for _ in range(3000)]
    shares = [found.count(pair) / 3000 for pair in ((1, 3), (2, 2), (3, 1))]
    assert shares == [pytest.approx(1 / 3, abs=0.035)] * 3


def test_more_spans_than_sentinels() -> None:
    corruption.check_sentinels(649, 32)
    with pytest.raises(RecipeError, match="hides 33 spans") as caught:
        corruption.check_sentinels(650, 32)
    assert "max_seq_length = 649 or less" in caught.value.hint


# -------------------------------------------------------------------------------------------------------------- blanks

PAD = 3


def blanked(ids: Ids, seed: int = 1, sample: int = 0) -> tuple[Ids, Ids]:
    return corruption.blanks(ids, generator(seed, sample), sentinels=SENTINELS, eos=EOS, pad=PAD)


@settings(max_examples=150, deadline=None)
@given(st.integers(9, 740), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_blanks_and_what_follows_make_the_text_again(length: int, seed: int, sample: int) -> None:
    """And only the spans, with the end of each, are supervised: where the token before them is read."""
    row = np.random.default_rng(length).integers(10, 2900, length)
    read, labels = blanked(row, seed, sample)
    assert len(read) == len(labels) == length - 1
    kept = corruption.blanks_length(length)
    count = corruption.span_count(kept)
    assert kept + 3 * count <= length < kept + 1 + 3 * corruption.span_count(kept + 1)
    whole = [*read[: kept + 3 * count - 1].tolist(), EOS]
    assert (labels[kept + 3 * count - 1 :] == IGNORED).all()
    begins = whole.index(EOS) - 1  # somewhere in the first span: walk back to the sentinel before it
    while whole[begins] not in SENTINELS:
        begins -= 1
    text, told = whole[:begins], whole[begins:]
    spans: dict[int, list[int]] = {}
    at = begins
    while told:
        end = told.index(EOS)
        sentinel, *span = told[:end]
        spans[sentinel], told = span, told[end + 1 :]
        assert labels[at - 1] == IGNORED  # which blank comes next is for the reader to say
        assert labels[at : at + len(span) + 1].tolist() == [*span, EOS]
        at += len(span) + 2
    assert at == len(whole)
    assert (labels[: begins - 1] == IGNORED).all()
    assert sorted(spans) == sorted(SENTINELS[:count].tolist()) == sorted(id for id in text if id in SENTINELS)
    assert [id for token in text for id in spans.get(token, [token])] == row[:kept].tolist()


def test_blanks_come_in_any_order() -> None:
    row, orders = np.arange(10, 50), set[tuple[int, ...]]()
    for sample in range(60):
        read = blanked(row, sample=sample)[0].tolist()
        found = [token for token in read if token in SENTINELS]
        orders.add(tuple(found[len(found) // 2 :]))
    assert len(orders) == 2  # two spans
