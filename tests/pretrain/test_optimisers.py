"""The optimisers, the average and the guard of a training, through the command line."""

from __future__ import annotations

import shutil
import signal

import pytest
from safetensors.torch import load_file

from tests import project
from tests.faults.test_stopped import told
from tests.project import Project


@pytest.mark.parametrize("more", ['"sgd"\nlr_scheduler = "linear"', '"muon"\nadam_beta2 = 0.99', '"adamw"'])
def test_each_learns(fresh: Project, more: str) -> None:
    fresh.edit(
        "max_steps = 12\nglobal_batch_size = 4\n", f"max_steps = 30\nglobal_batch_size = 4\noptimizer = {more}\n"
    )
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.err
    assert fresh.manifest("pretrain")["metrics"]["val_loss"] < 5.6  # log(400) is 5.99


def test_the_average_is_what_is_validated_and_published(fresh: Project) -> None:
    fresh.edit("eval_every = 0\nsave_every = 3", "eval_every = 4\nsave_every = 3\nema_decay = 0.9\nkeep_last = 9")
    assert fresh.llmctl("prep", "t.toml").code == 0
    without = project.copy(fresh, fresh.path.parent / "without")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    without.edit("ema_decay = 0.9", "")
    assert without.llmctl("pretrain", "t.toml").code == 0
    averaged, raw = (load_file(made.run / "pretrain" / "model.safetensors") for made in (fresh, without))
    assert all(not averaged[name].equal(raw[name]) for name in raw)
    mean, last = (made.manifest("pretrain")["metrics"] for made in (fresh, without))
    assert mean["train_loss"] == last["train_loss"]  # the optimiser never saw the average, nor the evaluations
    assert mean["val_loss"] != last["val_loss"]


def test_stopped_and_resumed_the_average_is_bitwise_the_same(fresh: Project) -> None:
    fresh.edit("eval_every = 0\nsave_every = 3", "eval_every = 5\nsave_every = 3\nema_decay = 0.9")
    assert told(fresh, "pretrain", signal.SIGTERM, at=8).startswith("stopped at step ")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    kept = fresh.weights()
    shutil.rmtree(fresh.run / "pretrain")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == kept


LEAP = """
import llmctl.training.guard as guard
guard.WINDOW, judge, calls = 8, guard.Guard.judge, 0
def leaps(self, loss, *more):
    global calls
    calls += 1
    return judge(self, loss * (9 if calls == 8 else 1), *more)
guard.Guard.judge = leaps
"""


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_leap_is_skipped_or_rolled_back(fresh: Project, finished: Project, stage: str) -> None:
    """Fault 11: 12 steps and 9 are trained, the eighth loss leaps."""
    made = fresh if stage == "pretrain" else finished
    if stage == "finetune":
        shutil.rmtree(made.run / "finetune")
        made.edit("max_steps = 6", "max_steps = 9")
    skipped = made.llmctl(stage, "t.toml", before=LEAP)
    assert skipped.code == 0, skipped.err
    assert "warning: step 8: the loss leapt to" in skipped.out
    assert made.manifest(stage)["metrics"]["skipped_steps"] == 1
    shutil.rmtree(made.run / stage)
    key = "max_steps = 12" if stage == "pretrain" else "max_steps = 9"
    made.edit(key, f'{key}\non_spike = "rollback"')
    back = made.llmctl(stage, "t.toml", "--events", "events.jsonl", before=LEAP)
    assert back.code == 0, back.err
    assert "warning: step 8: the loss leapt; going back to step 6 and on past that text" in back.out
    assert made.manifest(stage)["metrics"]["skipped_steps"] == 0
    assert '"rolled_back"' in (made.path / "events.jsonl").read_text()
    steps = (made.run / stage / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == (12 if stage == "pretrain" else 9)
