"""SIGKILL at any moment of any stage: the next run completes, and what it makes is the same to the last bit."""

from __future__ import annotations

import random
import shutil
import time

import pytest

from tests.faults.killing import ARMED
from tests.project import STAGES, Project


def nothing_half(project: Project) -> None:
    """What is left of the kills: nothing that anything would pick up."""
    left = [path.name for path in project.run.rglob("*") if path.name.startswith((".staging", ".old"))]
    assert left == []
    work = [path for path in (project.run / ".work").rglob("*") if path.is_file()]
    assert [path.name for path in work if not path.name.startswith("sources-")] == []


def completes(fresh: Project, finished: Project) -> None:
    done = fresh.llmctl("run", "t.toml")
    assert done.code == 0, done.out + done.err
    assert fresh.identities() == finished.identities()
    for place in ("pretrain", "finetune"):
        assert fresh.weights(place) == finished.weights(place)
    assert fresh.llmctl("verify", "runs/t").code == 0
    nothing_half(fresh)


def killed_over_and_over(fresh: Project, seed: int, times: int) -> int:
    """Runs the chain, each time killed before or after one of its next file operations; how often it was."""
    chance = random.Random(seed)
    for kills in range(times):
        done = fresh.llmctl("run", "t.toml", before=ARMED.format(point=chance.randrange(10, 160)))
        if done.code == 0:
            return kills
        assert done.code == -9, done.out + done.err
        for place in fresh.identities():  # whatever is there is whole
            assert fresh.llmctl("verify", f"runs/t/{place}").code == 0
    return times


def test_killed_over_and_over_at_file_operations(fresh: Project, finished: Project) -> None:
    assert killed_over_and_over(fresh, seed=1, times=5) > 2
    completes(fresh, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_killed_over_and_over_with_other_seeds(fresh: Project, finished: Project, seed: int) -> None:
    assert killed_over_and_over(fresh, seed, times=100) > 2
    completes(fresh, finished)


def killed_by_the_clock(fresh: Project, seed: int, times: int) -> None:
    chance = random.Random(seed)
    for _ in range(times):
        call = fresh.start("run", "t.toml")
        time.sleep(chance.uniform(0.02, 0.5))
        call.kill()
        done = call.wait()
        if done.code == 0:
            return
        assert done.code == -9, done.out + done.err


def test_killed_by_the_clock(fresh: Project, finished: Project) -> None:
    killed_by_the_clock(fresh, seed=1, times=4)
    completes(fresh, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_killed_by_the_clock_with_other_seeds(fresh: Project, finished: Project, seed: int) -> None:
    killed_by_the_clock(fresh, seed, times=40)
    completes(fresh, finished)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_once_at_every_file_operation(finished: Project, stage: str) -> None:
    """Every point of a whole training and its publishing, in turn."""
    whole = finished.weights(stage)
    for point in range(10_000):
        shutil.rmtree(finished.run / stage, ignore_errors=True)
        shutil.rmtree(finished.run / ".work" / stage, ignore_errors=True)
        done = finished.llmctl(stage, "t.toml", before=ARMED.format(point=point))
        if done.code == 0:
            break
        assert done.code == -9
        again = finished.llmctl(stage, "t.toml")
        assert again.code == 0, (point, again.err)
        assert finished.weights(stage) == whole, point
        nothing_half(finished)
    assert point > 100


@pytest.mark.parametrize("place", STAGES[:3])
def test_a_remake_that_is_killed_leaves_the_old_one(finished: Project, place: str) -> None:
    """While it works and while it publishes: until the new one is there, the old one is."""
    before = finished.identities()[place]
    for point in (3, 20, 45):
        done = finished.llmctl(place, "t.toml", "--rebuild", before=ARMED.format(point=point))
        assert done.code in (0, -9)
        assert finished.llmctl("status", "runs/t").code == 0  # mends what was cut off
        assert finished.identities()[place] == before
        assert finished.llmctl("verify", f"runs/t/{place}").code == 0
