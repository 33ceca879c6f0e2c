"""Stopped or killed and gone on with: the weights, the losses and the identity of the run that never was."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harder import STEPS, begun_again, harder, losses, same
from tests.project import Project
from tests.warm import Call, Warm


def test_it_is_as_hard_as_it_says(whole: Project) -> None:
    tokens = json.loads((whole.run / "prep" / "index.json").read_text())["splits"]["train"]["tokens"]
    assert 2 * tokens < STEPS * 8 * 64
    for stage, score in (("pretrain", "val_loss"), ("finetune", "answer_bits_per_byte")):
        rows = losses(whole, stage)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["step"] for row in rows if row[score] is not None] == [5, 10, 15]
        assert [path.name for path in sorted((whole.run / "checkpoints" / stage).iterdir())] == [
            f"step-{step:08}" for step in (4, 8, 12, 16)
        ]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_ten_steps_and_ten_are_twenty(whole: Project, tmp_path: Path, stage: str) -> None:
    """Faults 4 and 5: the same command goes on with the next sample, bitwise."""
    made = begun_again(whole, stage, tmp_path / "made")
    done = made.llmctl(stage, "t.toml", "--until-step", 10, "--json")
    assert done.code == 0, done.err
    assert done.json["paused"] == {"stage": stage, "step": 10, "steps": STEPS}
    assert (done.json["ok"], done.json["artifact"], done.json["identity"]) == (True, None, None)
    assert not (made.run / stage).exists()
    assert made.states("t.toml")[stage] == "unfinished"
    again = made.llmctl(stage, "t.toml", "--until-step", 10)  # nothing is left to do
    assert again.code == 0
    assert f"{stage} is at step 10 of {STEPS}" in again.out
    assert made.llmctl(stage, "t.toml", "--until-step", 11).code == 0
    done = made.llmctl(stage, "t.toml", "--until-step", STEPS)
    assert f"resuming at step 11 of {STEPS}" in done.out
    assert made.llmctl("finetune", "t.toml").code == 0
    same(made, whole, stage)


def test_until_step_is_about_the_stage_that_was_asked_for(whole: Project, tmp_path: Path) -> None:
    made = begun_again(whole, "pretrain", tmp_path / "made")
    done = made.llmctl("finetune", "t.toml", "--until-step", 2)
    assert done.code == 0, done.err
    assert f"finetune is at step 2 of {STEPS}" in done.out
    assert made.weights("pretrain") == whole.weights("pretrain")
    assert made.llmctl("pretrain", "t.toml", "--until-step", 0).code == 2


def kill(call: Call, after: float) -> int:
    """Kills a training so many seconds after it said that it trains; how the call ended."""
    try:
        call.until("steps of 8", timeout=30)
    except AssertionError:
        return call.wait().code
    time.sleep(after)
    call.kill()
    return call.wait().code


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_at_random_moments(whole: Project, tmp_path: Path, stage: str) -> None:
    """Faults 1 and 4: SIGKILL."""
    made, chance = begun_again(whole, stage, tmp_path / "made"), random.Random(3)
    for _ in range(4):
        if kill(made.start(stage, "t.toml"), chance.uniform(0, 0.4)) == 0:
            break
    assert made.llmctl("finetune", "t.toml").code == 0
    same(made, whole, stage)


EVALUATING = """
import time, llmctl.inference.scoring as s
def score(*a, **k): print('evaluating', flush=True); time.sleep(300)
s.score = score
"""


def test_a_signal_while_the_average_stands_in_for_the_weights(whole: Project, tmp_path: Path) -> None:
    """Fault 9: an evaluation is broken off, and what is saved are the weights, not their average."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    call = made.start("pretrain", "t.toml", before=EVALUATING)
    call.until("evaluating")
    call.kill(signal.SIGTERM)
    done = call.wait(20)
    assert done.code == 143, done.err
    assert f"stopped at step 5 of {STEPS}; its state is saved" in done.err
    assert made.llmctl("pretrain", "t.toml").code == 0
    assert made.weights() == whole.weights()
    assert [row["step"] for row in losses(made, "pretrain")] == list(range(1, STEPS + 1))  # the fifth, too


WRITING = """
import time, llmctl.training.checkpoint as c
write = c.write
def slow(work, state, *more):
    print('writing', state['step'], flush=True)
    time.sleep(0.5)
    write(work, state, *more)
c.write = slow
"""


def test_a_signal_while_a_checkpoint_is_written(whole: Project, tmp_path: Path) -> None:
    """Fault 9: the one under way becomes whole, and so does that of the last finished step."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    call = made.start("pretrain", "t.toml", before=WRITING)
    call.until("writing 3")
    call.kill(signal.SIGINT)
    done = call.wait(20)
    assert done.code == 130, done.err
    kept = sorted(path.name for path in (made.run / ".work" / "pretrain").glob("step-*"))
    told = int(done.err.partition("stopped at step ")[2].split()[0])
    assert kept == sorted({"step-00000003", f"step-{told:08}"})
    assert made.llmctl("pretrain", "t.toml").code == 0
    assert made.weights() == whole.weights()


FULL = """
import errno, llmctl.training.checkpoint as c
save_file, calls = c.save_file, 0
def full(*args):
    global calls
    calls += 1
    if calls > 4:
        raise OSError(errno.ENOSPC, 'No space left on device')
    save_file(*args)
c.save_file = full
"""


def test_a_disk_that_fills_up_while_it_trains(whole: Project, tmp_path: Path) -> None:
    """Fault 3: the write in the background fails, the training says so and ends, the checkpoint before is whole."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    done = made.llmctl("pretrain", "t.toml", "--json", before=FULL)
    assert done.code == 4, done.err
    error = done.json["error"]
    assert error["message"] == "cannot save the checkpoint of step 6: No space left on device"
    assert "make room and run the same command again" in error["hint"]
    assert [path.name for path in (made.run / ".work" / "pretrain").glob("step-*")] == ["step-00000003"]
    assert not list(made.run.rglob(".staging*"))
    done = made.llmctl("pretrain", "t.toml")
    assert f"resuming at step 3 of {STEPS}" in done.out
    assert made.weights() == whole.weights()


@pytest.mark.parametrize("name", ["model", "optimizer", "ema"])
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(whole: Project, tmp_path: Path, name: str) -> None:
    """Fault 2: the average of the weights is as much of it as the weights."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    assert made.llmctl("pretrain", "t.toml", "--until-step", 12).code == 0
    path = made.run / ".work" / "pretrain" / "step-00000012" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    done = made.llmctl("pretrain", "t.toml")
    assert "checkpoint step-00000012 is damaged" in done.out
    assert f"resuming at step 9 of {STEPS}" in done.out
    assert made.weights() == whole.weights()


KILLS = 50


@pytest.mark.slow
def test_fifty_kills(warm: Warm, tmp_path: Path) -> None:
    """Faults 1 and 4: SIGKILL at fifty random moments, and a training that is over before them begins again."""
    whole = harder(tmp_path / "one", warm, steps=400)
    assert whole.llmctl("pretrain", "t.toml").code == 0
    made, chance, kills = begun_again(whole, "pretrain", tmp_path / "made"), random.Random(1), 0
    while kills < KILLS:
        code = kill(made.start("pretrain", "t.toml"), chance.uniform(0, 0.6))
        assert code in (0, -9)
        kills += code != 0
        if code == 0:
            same(made, whole, "pretrain")
            shutil.rmtree(made.run / "pretrain")
    assert made.llmctl("pretrain", "t.toml").code == 0
    same(made, whole, "pretrain")
