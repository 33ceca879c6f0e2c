"""When torch.compile pays, on clocks of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmctl.model.transformer import Decoder
from llmctl.training import compiling
from llmctl.training.compiling import Compiling
from llmctl.training.loop import Step
from llmctl.training.objectives import Learner
from tests.shapes import SHAPES


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Compiling, "_compile", lambda self: setattr(self, "_on", True))


def step(number: int, seconds: float) -> Step:
    return Step(number, 1.0, 1.0, 0.1, tokens=100, seconds=seconds, position=number)


def followed(
    seconds: list[float], steps: int, since: int | None = None, undecided: bool = True
) -> tuple[Compiling, list[str]]:
    told: list[str] = []
    made = Compiling(
        Learner(Decoder.random(SHAPES["qwen3"], 1)), steps, "key", since, undecided, lambda since, why: told.append(why)
    )
    made.begin(0)
    for number, each in enumerate(seconds, 1):
        made.follow(step(number, each))
    return made, told


def test_a_long_run_is_compiled_and_a_short_one_is_not() -> None:
    """30 s are assumed to compile, and steps 1.3 times faster: 0.115 s saved of 0.5 s."""
    short, told = followed([3.0, 0.5, 0.5, 0.5], steps=200)
    assert (short.since, short._on) == (None, False)
    assert told == ["eager: 30 s to compile (assumed) against 23 s that 196 steps of 0.5 s save by it"]
    long, told = followed([3.0, 0.5, 0.5, 0.5], steps=400)
    assert (long.since, long._on) == (4, True)
    assert told[0].startswith("torch.compile: 30 s to compile (assumed) against 46 s")


def test_what_compiling_cost_is_known_the_next_time(tmp_path: Path) -> None:
    """In Inductor's own cache: what is lost with it is what has to be compiled again."""
    followed([3.0, 0.5, 0.5, 0.5, 20.25, 0.25, 0.25, 0.25], steps=400)
    assert json.loads((tmp_path / "llmctl" / "key.json").read_text()) == {"seconds": 20.0, "gain": 2.0}
    again, told = followed([3.0, 0.5, 0.5, 0.5], steps=40)
    assert again.since == 4
    assert "5 s to compile (cached) against 9 s that 36 steps" in told[0]
    (tmp_path / "llmctl" / "key.json").rename(tmp_path / "llmctl" / "other.json")
    _, told = followed([3.0, 0.5, 0.5, 0.5], steps=40)
    assert "20 s to compile (as others took here) against 9 s" in told[0]


def test_a_record_that_cannot_be_read_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "llmctl").mkdir()
    (tmp_path / "llmctl" / "key.json").write_text("[")
    assert "assumed" in followed([3.0, 0.5, 0.5, 0.5], steps=40)[1][0]


def test_a_decision_is_made_once() -> None:
    """Resumed behind the step that decided, it is what was decided then."""
    later, told = followed([], steps=400, since=4, undecided=False)
    later.begin(10)
    assert (later._on, told) == (True, [])
    before = followed([9.0, 9.0], steps=400, since=4, undecided=False)[0]
    assert not before._on
    before.follow(step(4, 9.0))
    assert before._on
    never, told = followed([1000.0] * 9, steps=400, since=None, undecided=False)
    assert (never._on, told) == (False, [])


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kernel" in compiling.possible(torch.device("cuda"), "recurrent")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "apt-get install g++" in compiling.possible(torch.device("cpu"), "decoder")
    assert compiling.possible(torch.device("cuda"), "decoder") == ""
