"""Fault 11: what is no number, and what leaps; left out, counted, rolled back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.errors import RunError
from llmctl.model.transformer import Decoder
from llmctl.training import checkpoint, guard, loop, objectives, optim, session
from llmctl.training.batch import Batch
from llmctl.training.checkpoint import Saver, State
from llmctl.training.ema import Ema
from llmctl.training.guard import Guard, OnSpike
from llmctl.training.loop import Step
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision
from tests.shapes import SHAPES


def losses(count: int, level: float = 3.0, deviation: float = 0.05, seed: int = 0) -> list[float]:
    return [float(loss) for loss in np.random.default_rng(seed).normal(level, deviation, count)]


def seasoned(count: int = guard.WINDOW, **more: Any) -> Guard:
    found = Guard()
    assert {found.judge(loss, 1.0, "skip") for loss in losses(count, **more)} == {"step"}
    return found


@pytest.mark.parametrize("on_spike", ["skip", "rollback", "ignore"])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 3.0])
def test_what_is_no_number_is_left_out(on_spike: OnSpike, loss: float) -> None:
    found = seasoned()
    norm = 1.0 if loss != 3.0 else math.nan
    assert found.judge(loss, norm, on_spike) == "skip"
    assert found.in_a_row == 1
    assert all(math.isfinite(kept) for kept in found.recent)
    assert found.judge(3.0, 1.0, on_spike) == "step"  # OLMo's window, once poisoned, skips the next 128
    assert found.in_a_row == 0


def test_a_leap_is_six_deviations_of_a_window_half_full() -> None:
    assert seasoned(guard.WINDOW // 2 - 1).judge(30.0, 1.0, "skip") == "step"
    assert seasoned(guard.WINDOW // 2).judge(30.0, 1.0, "skip") == "skip"
    found = seasoned()
    mean, deviation = float(np.mean(found.recent)), float(np.std(found.recent, ddof=1))
    assert replace(found).judge(mean + 5.99 * deviation, 1.0, "skip") == "step"
    assert replace(found).judge(mean + 6.01 * deviation, 1.0, "skip") == "skip"
    assert replace(found).judge(mean - 20 * deviation, 1.0, "skip") == "step"
    assert replace(found).judge(30.0, 1.0, "ignore") == "step"


def test_a_loss_that_hardly_moves_makes_no_spikes_of_noise() -> None:
    found = seasoned(level=0.01, deviation=1e-6)
    assert found.judge(0.1, 1.0, "skip") == "step"
    assert found.judge(0.2, 1.0, "skip") == "skip"


def test_harder_text_is_learned_from_after_a_few_steps() -> None:
    verdicts, found = [], seasoned()
    for loss in losses(30, level=6.0, seed=1):
        verdicts.append(found.judge(loss, 1.0, "skip"))
    assert 1 <= verdicts.count("skip") <= 5
    assert set(verdicts[5:]) == {"step"}
    assert len(found.recent) == guard.WINDOW


def test_it_goes_on_from_its_json() -> None:
    whole, half = Guard(), Guard()
    every = [*losses(100), math.nan, 30.0, *losses(100, seed=2), 31.0, 32.0]
    verdicts = [whole.judge(loss, 1.0, "skip") for loss in every]
    first = [half.judge(loss, 1.0, "skip") for loss in every[:102]]
    again = State.from_json(json.loads(json.dumps(asdict(State(guard=half))))).guard
    assert first + [again.judge(loss, 1.0, "skip") for loss in every[102:]] == verdicts
    assert again == whole
    assert verdicts.count("skip") == 4


def test_it_ends_when_it_is_no_accident() -> None:
    found = seasoned()
    for _ in range(guard.IN_A_ROW - 1):
        assert found.judge(math.nan, 1.0, "skip") == "skip"
    with pytest.raises(RunError, match="no number for 20 steps in a row") as caught:
        found.judge(math.nan, 1.0, "skip")
    assert "learning_rate" in caught.value.hint
    found = seasoned()
    found.roll_backs = guard.ROLL_BACKS
    with pytest.raises(RunError, match=r"leapt again \(to 30\.00 nats\) after 10 roll backs"):
        found.judge(30.0, 1.0, "rollback")


# --------------------------------------------------------------------------------------------------------- in training

CONFIG = replace(SHAPES["qwen3"], hidden_size=32, num_hidden_layers=1, max_position_embeddings=16, dropout=0.1)
STEPS, BAD, SAVED = 16, 9, 6  # the batch that leaps, and the checkpoint before it
WORST = 90  # the token that marks it


class Run:
    """A training of STEPS steps over numbered batches, of which one leaps and all are written down."""

    def __init__(self, work: Path, numbers: list[int] | None = None, until: int = 1000) -> None:
        torch.manual_seed(5)
        self.model = Decoder.random(CONFIG, seed=1)
        self.optimizers, self.average = optim.build(self.model, "muon", 0.01), Ema(self.model, 0.9)
        self.work, self.seen, self.numbers, self.until = work, list[int](), numbers, until
        self.state = State()
        if (found := checkpoint.newest(work)) is not None:
            folder, self.state = found
            checkpoint.restore(folder, self.model, self.optimizers, self.average.tensors)

    def batches(self) -> Iterator[Batch]:
        for number in self.numbers or range(self.state.position, 1000):
            rows = np.random.default_rng(number).integers(10, WORST, (2, 17))
            if number == BAD:
                rows[:] = WORST
            self.seen.append(number)
            yield Batch((rows[:, :-1],), rows[:, 1:], number + 1)

    def loss(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaps = bool((tensors[0] == WORST).all())
        return objectives.loss(self.model, *tensors) * (20 if leaps else 1)

    def __call__(self, on_spike: OnSpike) -> list[Step]:
        learner, steps = Learner(self.model), []
        learner.forward = self.loss  # type: ignore[assignment, method-assign]
        device = SimpleNamespace(torch=torch.device("cpu"))
        job: Any = SimpleNamespace(work=self.work, settings=SimpleNamespace(stage="pretrain"), device=device)
        with Saver(self.work, self.model, self.optimizers, self.average.tensors) as saver:
            for step in loop.train(
                learner,
                self.optimizers,
                self.batches(),
                steps=range(self.state.step, STEPS),
                rate=lambda number: 1 - number / STEPS,
                micro_batch=2,
                max_grad_norm=1.0,
                precision=Precision(torch.device("cpu")),
                stop=lambda: len(self.seen) >= self.until,
                guard=self.state.guard,
                on_spike=on_spike,
                roll_back=lambda: session.roll_back(job, self.state, saver),
                ema=self.average,
            ):
                session.follow(self.state, step)
                steps.append(step)
                if step.number == SAVED:
                    saver.save(self.state)
        return steps

    def same(self, other: Run) -> bool:
        ours, theirs = self.model.state_dict(), other.model.state_dict()
        averages = zip(self.average.tensors.values(), other.average.tensors.values(), strict=True)
        return all(torch.equal(ours[name], theirs[name]) for name in ours) and all(
            torch.equal(*pair) for pair in averages
        )


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 8)


@pytest.mark.usefixtures("small_window")
def test_a_leap_leaves_the_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Run(tmp_path)("skip")
    assert [step.number for step in steps if step.skipped] == [BAD + 1]
    assert len(steps) == STEPS
    assert f"step {BAD + 1}: the loss leapt to" in "".join(capsys.readouterr())
    assert not any(step.skipped for step in Run(tmp_path / "other")("ignore"))


@pytest.mark.usefixtures("small_window")
def test_a_roll_back_is_as_if_the_batches_had_never_been(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "one")
    steps = run("rollback")
    assert f"step {BAD + 1}: the loss leapt; going back to step {SAVED} and on past that text" in "".join(
        capsys.readouterr()
    )
    assert [step.number for step in steps] == [*range(1, BAD + 1), *range(SAVED + 1, STEPS + 1)]
    passed_over = [*range(SAVED), *range(BAD + 1, BAD + 1 + STEPS - SAVED)]
    straight = Run(tmp_path / "two", passed_over)
    straight("skip")
    assert run.same(straight)
    assert run.state == replace(straight.state, seconds=run.state.seconds, guard=run.state.guard)
    assert run.state.guard == replace(straight.state.guard, roll_backs=1)


@pytest.mark.usefixtures("small_window")
def test_stopped_after_a_roll_back_it_goes_on_bitwise(tmp_path: Path) -> None:
    whole = Run(tmp_path / "one")
    whole("rollback")
    Run(tmp_path / "two", until=BAD + 3)("rollback")  # two steps past it; nothing is saved
    again = Run(tmp_path / "two")
    assert again.state.step == SAVED
    again("rollback")
    assert again.same(whole)
    assert again.state == replace(whole.state, seconds=again.state.seconds)


@pytest.mark.usefixtures("small_window")
def test_without_a_checkpoint_the_step_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "save", lambda *_: None)
    run = Run(tmp_path)
    steps = run("rollback")
    assert [step.number for step in steps if step.skipped] == [BAD + 1]
    assert run.state.guard.roll_backs == 0
