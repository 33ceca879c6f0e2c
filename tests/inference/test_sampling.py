"""Sampling: each knob does what its name says, and nothing else. Parity with transformers is in tests/parity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmctl.errors import RunError, UsageError
from llmctl.inference.sampling import History, Sampling, generator_of, log_softmax, pick, token, truncated

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def drawn(sampling: Sampling, history: History | None = None, times: int = 300) -> set[int]:
    generator = np.random.default_rng(0)
    return {pick(LOGITS, sampling, generator, history or History([])).id for _ in range(times)}


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert drawn(Sampling(temperature=0.0), times=3) == {1}
    equal = pick(np.zeros(9, np.float32), Sampling(temperature=0.0, logprobs=3), generator_of(Sampling()), History([]))
    assert equal.id == 0
    assert [id for id, _ in equal.top] == [0, 1, 2]


def test_plain_sampling_draws_from_the_model() -> None:
    generator = np.random.default_rng(0)
    ids = [pick(LOGITS, Sampling(), generator, History([])).id for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(ids) / 4000, np.exp(LOGITS), atol=0.03)


@pytest.mark.parametrize(
    ("knobs", "left"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),  # top-p of what top-k leaves: 0.44, 0.33
        ({"temperature": 1e-3}, {1}),
        ({"logit_bias": {1: -100.0, 0: 100.0}}, {0}),
    ],
    ids=str,
)
def test_truncation(knobs: dict[str, Any], left: set[int]) -> None:
    assert drawn(Sampling(**knobs)) == left


def test_penalties_tell_prompt_from_output() -> None:
    strong = Sampling(presence_penalty=50.0, temperature=0.0)
    assert drawn(strong, History([1, 1]), 1) == {1}
    assert drawn(strong, History([], [1]), 1) == {3}
    # 0.4 e^-0.2 is still above 0.3; said twice, 0.4 e^-0.4 is not
    assert drawn(Sampling(frequency_penalty=0.2, temperature=0.0), History([], [1]), 1) == {1}
    assert drawn(Sampling(frequency_penalty=0.2, temperature=0.0), History([], [1, 1]), 1) == {3}
    for history in (History([1]), History([], [1])):
        assert drawn(Sampling(repetition_penalty=2.0, temperature=0.0), history, 1) == {3}


def test_the_seed_draws_again() -> None:
    def ids(seed: int | None) -> list[int]:
        generator = generator_of(Sampling(seed=seed))
        return [pick(LOGITS, Sampling(seed=seed), generator, History([])).id for _ in range(50)]

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)
    assert ids(None) != ids(None)


def test_logprobs_are_the_models_own() -> None:
    """Before temperature, bias and penalties; and the chosen one's is the same float as in the list."""
    sampling = Sampling(temperature=0.0, logprobs=2, logit_bias={1: -50.0}, top_k=1)
    found = pick(LOGITS, sampling, generator_of(sampling), History([]))
    assert found.id == 3
    assert [id for id, _ in found.top] == [1, 3]
    assert found.logprob == found.top[1][1] == pytest.approx(math.log(0.3))


def test_as_many_alternatives_as_there_are() -> None:
    assert [id for id, _ in token(log_softmax(LOGITS), 0, top=99).top] == [1, 3, 2, 0]


@example([0.0, 1e-30], 0, 0.5, 0.0)
@settings(deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.integers(0, 50),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_something_is_always_left_and_the_likeliest_among_it(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    scores = np.array(logits, np.float64)
    left = truncated(scores, Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    assert left[scores.argmax()] == left.max() > 0
    assert np.isfinite(left).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(RunError, match="no numbers"):
        pick(np.full(4, bad, np.float32), Sampling(), generator_of(Sampling()), History([]))


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0},
        {"repetition_penalty": 0.0}, {"presence_penalty": math.inf}, {"max_tokens": -1}, {"logprobs": -1}, {"seed": -1},
        {"logit_bias": {1: math.nan}}, {"stop": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(knobs))):
        Sampling(**knobs)


def test_a_bias_on_no_token_is_named() -> None:
    with pytest.raises(UsageError, match="token 4, but ids end at 3"):
        drawn(Sampling(logit_bias={4: 1.0}))
