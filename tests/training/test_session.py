"""What a training counts."""

from __future__ import annotations

import math

import pytest

from llmctl.training import session
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step


def step(number: int, loss: float, skipped: bool = False) -> Step:
    return Step(number, loss, 1.0, 0.1, tokens=100, seconds=2.0, position=4 * number, skipped=skipped)


def test_what_is_counted() -> None:
    state = State()
    for finished in (step(1, math.nan, skipped=True), step(2, 4.0), step(3, math.inf, skipped=True), step(4, 2.0)):
        session.follow(state, finished)
    assert (state.step, state.position, state.tokens, state.seconds, state.skipped) == (4, 16, 400, 8.0, 2)
    assert state.train_loss == pytest.approx(0.98 * 4.0 + 0.02 * 2.0)  # the smoothed mean of what was a number
    figures = session.figures(state)
    assert figures["tokens_per_second"] == 50.0
    assert figures["skipped_steps"] == 2


def test_nothing_trained_is_no_speed() -> None:
    assert session.figures(State())["tokens_per_second"] == 0.0


def test_every_so_many_steps() -> None:
    assert [number for number in range(1, 8) if step(number, 1.0).every(3)] == [3, 6]
    assert not any(step(number, 1.0).every(0) for number in range(1, 8))
