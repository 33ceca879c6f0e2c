"""Fault 12: two llmctl in one run."""

from __future__ import annotations

from tests.project import Project

SLOW = "import time, llmctl.pretrain.stage as s; p = s.pretrain; s.pretrain = lambda job: (time.sleep(2), p(job))[1]"


def test_of_several_at_once_one_trains(fresh: Project, finished: Project) -> None:
    """Started together they race for the lock: one has it, the others are told who and touch nothing."""
    assert fresh.llmctl("prep", "t.toml").code == 0
    calls = [fresh.start("pretrain", "t.toml", "--json", before=SLOW) for _ in range(4)]
    done = [call.wait() for call in calls]
    assert sorted(found.code for found in done) == [0, 75, 75, 75], [found.err for found in done]
    winner = next(call.pid for call, found in zip(calls, done, strict=True) if found.code == 0)
    for found in done:
        if found.code == 75:
            assert found.json["error"]["code"] == "busy"
            assert f"process {winner}" in found.json["error"]["message"]
            assert "--wait-lock" in found.json["error"]["hint"]
    assert fresh.weights() == finished.weights()


def test_a_lock_ends_with_its_process(fresh: Project) -> None:
    """A killed one leaves nothing to remove by hand."""
    first = fresh.start("run", "t.toml")
    first.until("prep")
    first.kill()
    assert first.wait().code == -9
    assert fresh.llmctl("prep", "t.toml").code == 0
