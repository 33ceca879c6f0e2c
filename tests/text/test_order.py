"""Orders that are functions of a number: every sample once, well shuffled, and in the shares that were asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.text.order import ROUNDS, SLOTS, Ids, Mixture, shuffled


def keys(seed: int) -> Ids:
    return np.random.default_rng(seed).integers(2**63 - 1, size=ROUNDS)


# ----------------------------------------------------------------------------------------------------------- shuffling


@given(st.integers(1, 5_000), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_it_is_a_permutation(count: int, seed: int) -> None:
    found = shuffled(np.arange(count), count, keys(seed))
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(count))


@given(st.integers(1, 2**62), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=100)
def test_any_part_of_it_at_a_time(count: int, seed: int, data: st.DataObject) -> None:
    """No number of a large domain comes twice, and a number alone goes where it goes among others."""
    some = st.sets(st.integers(0, count - 1), min_size=1, max_size=20)
    numbers = np.array(sorted(data.draw(some)), dtype=np.int64)
    found = shuffled(numbers, count, keys(seed))
    assert found.min() >= 0
    assert found.max() < count
    assert len(set(found.tolist())) == len(numbers)
    assert [int(shuffled(numbers[at : at + 1], count, keys(seed))[0]) for at in range(len(numbers))] == found.tolist()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_small_ones_come_in_every_order_about_as_often(count: int) -> None:
    found = Counter(tuple(shuffled(np.arange(count), count, keys(seed)).tolist()) for seed in range(2_400))
    orders = {2: 2, 3: 6, 4: 24}[count]
    assert len(found) == orders
    assert min(found.values()) > 0.6 * 2_400 / orders


@pytest.mark.parametrize("count", [100, 1_000, 65_537])
def test_it_looks_shuffled(count: int) -> None:
    """Against the figures of a random permutation: five standard errors."""
    error = 5 / np.sqrt(count)
    for seed in range(3):
        found = shuffled(np.arange(count), count, keys(seed))
        assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < error
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < error
        assert abs((found[1:] > found[:-1]).mean() - 0.5) < error
        assert (found == np.arange(count)).sum() < 8  # one on average
        assert (np.diff(found) == 1).sum() < 8
        halves = found[: count // 2] < count / 2
        assert abs(halves.mean() - 0.5) < error


def test_other_keys_other_orders() -> None:
    one, two = (shuffled(np.arange(1_000), 1_000, keys(seed)) for seed in (1, 2))
    assert (one == two).sum() < 10


# -------------------------------------------------------------------------------------------------------------- mixing


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 10**12))
@settings(deadline=None, max_examples=50)
def test_a_component_is_numbered_through(weights: list[float], first: int) -> None:
    """Each component's numbers go up by one, whatever stretch is looked at, and its share is its weight."""
    mixture = Mixture(weights)
    owner, number = mixture(np.arange(first, first + 3 * SLOTS))
    for index, weight in enumerate(weights):
        mine = number[owner == index]
        assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        assert mixture.shares[index] == len(mine) / (3 * SLOTS)
        assert mixture.shares[index] == pytest.approx(weight / sum(weights), abs=len(weights) / SLOTS)
    assert mixture(np.array([0]))[1][0] == 0


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=5), st.integers(0, 10**9), st.integers(1, 500))
@settings(deadline=None, max_examples=50)
def test_any_stretch_has_the_shares(weights: list[float], first: int, count: int) -> None:
    mixture = Mixture(weights)
    owner, _ = mixture(np.arange(first, first + count))
    for index, share in enumerate(mixture.shares):
        assert abs((owner == index).sum() - share * count) <= len(weights)


def test_the_pattern_of_two_to_one() -> None:
    assert Mixture([2, 1])(np.arange(9))[0].tolist() == [0, 1, 0] * 3
