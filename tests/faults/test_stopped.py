"""Ctrl-C, SIGTERM and --max-time: the last finished step is saved, the exit code says why, and going on is bitwise."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest

from tests.project import Project

# A training in which each step waits to be told apart: the test signals in the middle of one.
SLOW = """
import time, llmctl.training.objectives as o, llmctl.training.loop as loop
loss, calls = o.loss, 0
def slow(*args, **more):
    global calls
    calls += type(args[1]).__name__ == 'Tensor'  # of the training; the plan before it computes with fake ones
    if calls == {at}:
        print('in the middle', flush=True)
        time.sleep({seconds})
    return loss(*args, **more)
o.loss = slow
"""


def told(project: Project, stage: str, signum: int, at: int = 6) -> str:
    """Signals in the middle of the step whose micro-batch is call `at`; the document's message."""
    call = project.start(stage, "t.toml", "--json", before=SLOW.format(at=at, seconds=0.5))
    call.until("in the middle")
    call.kill(signum)
    done = call.wait()
    assert done.code == 128 + signum, done.err
    document = json.loads(done.out.removeprefix("in the middle\n"))
    assert document["error"]["code"] == "interrupted"
    assert "the same command again goes on" in document["error"]["hint"]
    return str(document["error"]["message"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_finished_step(fresh: Project, signum: signal.Signals) -> None:
    """Fault 9: the step at hand is dropped, the one before it is saved."""
    fresh.edit("max_steps = 12", "max_steps = 12\nmicro_batch_size = 2")
    message = told(fresh, "pretrain", signum, at=9)  # the first of two micro-batches of step 5
    assert message == "stopped at step 4 of 12; its state is saved"
    assert (fresh.run / ".work/pretrain/step-00000004/state.json").exists()
    done = fresh.llmctl("pretrain", "t.toml")
    assert "resuming at step 4 of 12" in done.out
    kept = fresh.weights()
    shutil.rmtree(fresh.run / "pretrain")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == kept


def test_a_signal_in_finetune(finished: Project) -> None:
    whole = finished.weights("finetune")
    shutil.rmtree(finished.run / "finetune")
    assert told(finished, "finetune", signal.SIGTERM, at=4) == "stopped at step 4 of 6; its state is saved"
    assert finished.llmctl("finetune", "t.toml").code == 0
    assert finished.weights("finetune") == whole


def test_stopped_in_the_first_step_and_in_the_last(fresh: Project, finished: Project) -> None:
    assert told(fresh, "pretrain", signal.SIGTERM, at=1) in (
        "stopped at step 0 of 12; its state is saved",
        "stopped at step 1 of 12; its state is saved",
    )
    assert told(fresh, "pretrain", signal.SIGINT, at=11).endswith("of 12; its state is saved")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == finished.weights()


def test_a_signal_during_an_evaluation_breaks_it_off(fresh: Project, finished: Project) -> None:
    """CI systems kill 2.5 s after SIGTERM; an evaluation may take longer than that."""
    fresh.edit("eval_every = 0\nsave_every = 3", "eval_every = 4\nsave_every = 0")
    endless = (
        "import time, llmctl.inference.scoring as s\n"
        "def score(*a, **k): print('evaluating', flush=True); time.sleep(300)\n"
        "s.score = score"
    )
    call = fresh.start("pretrain", "t.toml", before=endless)
    call.until("evaluating")
    call.kill(signal.SIGTERM)
    done = call.wait(20)
    assert done.code == 143
    assert "stopped at step 4 of 12; its state is saved" in done.err
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == finished.weights()


SAVING = """
import os, time, llmctl.training.checkpoint as c
save_file = c.save_file
def slow(*args):
    print('saving', flush=True)
    time.sleep(0.5)
    save_file(*args)
c.save_file = slow
"""


def test_a_sigterm_after_ctrl_c_is_no_second_request(fresh: Project, finished: Project) -> None:
    """CI systems send SIGINT, and SIGTERM some seconds later, while the state is being written."""
    fresh.edit("save_every = 3", "save_every = 0")
    call = fresh.start("pretrain", "t.toml", before=SLOW.format(at=6, seconds=0.3) + SAVING)
    call.until("in the middle")
    call.kill(signal.SIGINT)
    call.until("saving")
    call.kill(signal.SIGTERM)
    done = call.wait()
    assert done.code == 130
    assert "its state is saved" in done.err
    done = fresh.llmctl("pretrain", "t.toml")
    assert "resuming at step" in done.out
    assert fresh.weights() == finished.weights()


def test_a_second_ctrl_c_quits_at_once(fresh: Project, finished: Project) -> None:
    call = fresh.start("pretrain", "t.toml", before=SLOW.format(at=6, seconds=0.3) + SAVING.replace("0.5", "300"))
    call.until("saving")
    for _ in range(2):
        call.kill(signal.SIGINT)
        time.sleep(0.5)  # two at once would be one
    assert call.wait(20).code in (-signal.SIGINT, 130)
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert fresh.weights() == finished.weights()


def test_out_of_time_is_try_again(fresh: Project, finished: Project) -> None:
    codes = []
    for _ in range(20):
        slow = (
            "import time, llmctl.training.objectives as o\nloss = o.loss\n"
            "o.loss = lambda *a, **k: (time.sleep(0.3), loss(*a, **k))[1]"
        )
        done = fresh.llmctl("pretrain", "t.toml", "--max-time", "2.5s", "--json", before=slow)
        codes.append(done.code)
        if done.code == 0:
            break
        assert done.code == 75, done.err
        assert done.json["error"]["code"] == "time"
    assert codes[-1] == 0
    assert len(codes) > 1
    assert fresh.weights() == finished.weights()


def test_a_nan_on_the_way_is_counted_and_told(fresh: Project) -> None:
    """Fault 11, through the command line: the figures stay numbers."""
    nan = """
import llmctl.training.objectives as o
loss, calls = o.loss, 0
def sometimes(*args, **more):
    global calls
    calls += type(args[1]).__name__ == 'Tensor'  # of the training; the plan before it computes with fake ones
    return loss(*args, **more) * (float("nan") if calls in (1, 5) else 1)
o.loss = sometimes
"""
    done = fresh.llmctl("pretrain", "t.toml", "--events", "events.jsonl", before=nan)
    assert done.code == 0, done.err
    assert "warning: step 5: the loss or gradient was no number; the step was skipped (2 so far)" in done.out
    metrics = fresh.manifest("pretrain")["metrics"]
    assert metrics["skipped_steps"] == 2
    assert 1 < metrics["train_loss"] < 7
    for path in (fresh.run / "pretrain" / "metrics.jsonl", fresh.path / "events.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_nothing_but_nan_stops_the_training(fresh: Project) -> None:
    fresh.edit("max_steps = 12", "max_steps = 40")
    nan = "import llmctl.training.objectives as o\nloss = o.loss\no.loss = lambda *a, **k: loss(*a, **k) * float('inf')"
    done = fresh.llmctl("pretrain", "t.toml", "--json", before=nan)
    assert done.code == 4
    assert "no number for 20 steps in a row" in done.json["error"]["message"]
    assert not (fresh.run / "pretrain").exists()
