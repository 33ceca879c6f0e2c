"""How fast it is said to be: tokens over the time they took, against what the device could do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llmctl import console
from llmctl.training import session, watching
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from llmctl.training.reporters import Reporter
from llmctl.training.watching import Watch
from tests.shapes import SHAPES


@pytest.fixture(autouse=True)
def _plain() -> None:
    console.configure()


def step(number: int, seconds: float, tokens: int = 1000, **more: float) -> Step:
    return replace(Step(number, 2.5, 0.5, 0.01, tokens, seconds, number * 4), **more)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_about_the_steps_since_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own. Waiting for data is part of a step's seconds, an evaluation between steps is not; the
    speed is tokens over seconds, never a mean of speeds, nor a division by a time of day (litgpt#1805).
    """
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    state = State(step=10, tokens=10_000, seconds=50.0)  # resumed
    sent: list[tuple[dict[str, float], int]] = []
    board = Reporter(lambda numbers, at: sent.append((numbers, at)), lambda: None)
    with Watch(tmp_path / "metrics.jsonl", state, flops=3.0, peak=6_000.0, dashboards=[board]) as watch:
        for number, seconds in ((11, 1.0), (12, 3.0), (13, 0.5), (14, 0.5)):
            now += seconds
            made = step(number, seconds)
            session.follow(state, made)
            if number % 2 == 0:
                watch.record(made, {"val_loss": 3.5} if number == 14 else None)
                now += 1.25  # an evaluation
    assert [(row["step"], row["tokens"], row["seconds"], row["tokens_per_second"]) for row in rows(tmp_path)] == [
        (12, 12_000, 54.0, 500.0),
        (14, 14_000, 55.0, 2000.0),
    ]
    assert [row["mfu"] for row in rows(tmp_path)] == [0.25, 1.0]
    assert rows(tmp_path)[1]["val_loss"] == 3.5
    assert [(numbers["tokens_per_second"], at) for numbers, at in sent] == [(500.0, 12), (2000.0, 14)]
    assert watch.figures == {"overhead": pytest.approx(2.5 / 7.5), "mfu": pytest.approx(4000 / 5 * 3 / 6000)}


def test_a_row_says_what_happened(tmp_path: Path) -> None:
    state = State()
    with Watch(tmp_path / "metrics.jsonl", state, 1.0, 0.0) as watch:
        for made in (step(1, 1.0, update_norm=0.001), replace(step(2, 1.0, loss=math.nan), skipped=True)):
            session.follow(state, made)
            watch.record(made)
    first, second = rows(tmp_path)
    assert first | {"peak_memory_bytes": 0} == {
        "step": 1,
        "train_loss": 2.5,
        "learning_rate": 0.01,
        "gradient_norm": 0.5,
        "update_norm": 0.001,
        "tokens": 1000,
        "seconds": 1.0,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 0,
        "skipped": 0,
    }
    assert first["peak_memory_bytes"] > 50e6
    assert (second["train_loss"], second["skipped"]) == (None, 1)
    assert "update_norm" not in second
    assert "mfu" not in watch.figures


def test_a_roll_back_leaves_the_speed_right(tmp_path: Path) -> None:
    state = State()
    watch = Watch(tmp_path / "metrics.jsonl", state, 1.0, 0.0)
    for number, seconds in ((1, 1.0), (2, 1.0), (3, 1.0)):
        session.follow(state, step(number, seconds))
    watch.record(step(3, 1.0))
    state.step, state.tokens, state.seconds = 1, 1000, 1.0  # back to the checkpoint of step 1
    again = step(2, 0.5)
    session.follow(state, again)
    assert "· 2.0k tok/s ·" in watch.text(again, 9, "")
    watch.record(again)
    assert [row["tokens_per_second"] for row in rows(tmp_path)] == [1000.0, 2000.0]


def test_the_live_line(tmp_path: Path) -> None:
    state = State()
    watch = Watch(tmp_path / "metrics.jsonl", state, flops=1.0, peak=40_000.0)
    made = step(1, 2.0, tokens=41_384)
    session.follow(state, made)
    assert watch.text(made, 10, "1.500 bits/byte").startswith(
        "step 1/10 · loss 2.500 · 1.500 bits/byte · lr 0.01 · 20.7k tok/s · 52 % of GEMM · "
    )
    session.follow(state, step(2, 1000.0))
    assert " · lr 0.01 · 42 tok/s · " in watch.text(step(2, 1000.0), 10, "")


def test_the_formula() -> None:
    """6 N and, of attention, 6 L H D T; an LSTM has no attention, and a token passes one of two stacks."""
    shape = replace(SHAPES["qwen3"], num_hidden_layers=3, num_attention_heads=4, head_dim=8)
    assert watching.flops_per_token(shape, 100, parameters=1000) == 6_000 + 6 * 3 * 32 * 100
    assert watching.flops_per_token(replace(shape, kind="recurrent"), 100, parameters=1000) == 6_000
    both = replace(shape, kind="encoder-decoder", num_decoder_layers=3)
    assert watching.flops_per_token(both, 100, parameters=2000) == 6_000 + 6 * 3 * 32 * 100
