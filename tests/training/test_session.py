"""What a training decides once and keeps, and what it counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmctl import console
from llmctl.device import Device
from llmctl.recipe import PretrainSection
from llmctl.training import objectives, session
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from tests.test_artifact import job


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    console.configure()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)


def chosen(folder: Path, device: Device, micro_batch: int = 4, **keys: object) -> session.Choices:
    work = job(folder, "pretrain")
    work.device = device
    section = PretrainSection.model_validate(keys)
    return session.choose(work, section, objectives.loss, 1e6, micro_batch)[0]


HERE, THERE = Device("cpu", "here", 1, frozenset({"avx2"})), Device("cpu", "there", 2, frozenset({"avx512_bf16"}))


def test_choices_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed on another machine, it goes on as it began, and says that it may not be bitwise the same."""
    first = chosen(tmp_path, HERE)
    assert (first.dtype, first.threads, first.micro_batch) == ("fp32", 1, 4)
    assert chosen(tmp_path, HERE) == first
    assert capsys.readouterr().out == ""
    assert chosen(tmp_path, THERE, micro_batch=8) == first
    assert "warning: this run was begun on another machine" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


def test_a_micro_batch_that_is_asked_for_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who ran out of memory must be able to go on with less of it."""
    chosen(tmp_path, HERE, 8)
    assert chosen(tmp_path, HERE, 2, micro_batch_size=2).micro_batch == 2
    assert "micro_batch_size 8 -> 2" in capsys.readouterr().out
    assert chosen(tmp_path, HERE, 8).micro_batch == 8


def test_choices_that_cannot_be_read_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = chosen(tmp_path, HERE)
    path = job(tmp_path, "pretrain").work / "choices.json"
    for text in ("", "{}", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert chosen(tmp_path, HERE) == first
        assert "cannot be read" in capsys.readouterr().out


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


def test_choices_are_plain_and_shown() -> None:
    made = session.Choices("bf16", "amx_bf16", True, "torch.compile", 2, 8, ("amx_bf16",))
    assert made.describe() == "bf16 (amx_bf16) · torch.compile"
    assert made.autocast
    assert not dataclasses.replace(made, dtype="fp32").autocast
