"""What dashboards are told: the rows of metrics.jsonl, once each, and nothing that could end a training."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmctl.errors import UnavailableError
from llmctl.training import reporters
from llmctl.training.reporters import Reporter, Subject

ROWS = [{"step": step, "train_loss": 5.0 / step, "mfu": None, "note": "x", "skipped": 0} for step in (1, 2, 3)]


def subject(folder: Path, step: int = 0) -> Subject:
    return Subject("demo", "pretrain", folder, "abcd", step, {"pretrain": {"max_steps": 3}})


def sent(folder: Path, name: str, rows: list[dict[str, Any]], step: int = 0) -> None:
    made = reporters.start([name], subject(folder, step))
    for row in rows:
        reporters.tell(made, row)
    reporters.close(made)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """Its own reader, on a training that was stopped after step 2, had logged 3, and went on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent(tmp_path, "tensorboard", ROWS)
    sent(tmp_path, "tensorboard", [{"step": 3, "train_loss": 1.5}, {"step": 4, "train_loss": math.inf}], step=2)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "pretrain")).Reload()
    assert set(found.Tags()["scalars"]) == {"train_loss", "skipped"}
    points = {(point.step, round(point.value, 4)) for point in found.Scalars("train_loss")}
    assert points == {(1, 5.0), (2, 2.5), (3, 1.5)}


class Fake(ModuleType):
    """A dashboard that remembers."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(name)
        self.given: dict[str, Any] = {}
        self.rows: list[tuple[dict[str, float], int]] = []
        self.closed, self.fails = 0, fails

    def init(self, **given: Any) -> Fake:
        print(f"* {self.__name__} initialized")
        self.given = given
        if self.fails:
            raise RuntimeError("no API key")
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((row, step))

    def finish(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_row_once_and_stdout_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    reporters.require([name])
    sent(tmp_path, name, ROWS)
    assert fake.rows == [({"train_loss": 5.0 / step, "skipped": 0.0}, step) for step in (1, 2, 3)]
    assert fake.closed == 1
    assert (fake.given["project"], fake.given["config"]) == ("llmctl", {"pretrain": {"max_steps": 3}})
    assert "demo-pretrain-abcd" in fake.given.values()
    assert "mode" not in fake.given  # WANDB_MODE=offline decides
    assert capsys.readouterr().out == ""


def test_a_dashboard_that_refuses_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", fails=True))
    with pytest.raises(UnavailableError, match="wandb does not start: no API key") as caught:
        reporters.start(["wandb"], subject(tmp_path))
    assert caught.value.exit_code == 6
    assert "WANDB_MODE=offline" in caught.value.hint


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_extra_names_itself(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what an import of a missing module finds
    with pytest.raises(UnavailableError, match=f"{name} is not installed") as caught:
        reporters.require([name])
    assert f"pip install 'llmctl[{name}]'" in caught.value.hint
    assert caught.value.exit_code == 6


def test_one_that_fails_on_the_way_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def broken(row: dict[str, float], step: int) -> None:
        raise ConnectionError("gone")

    def nothing() -> None:
        return None

    made = [Reporter(broken, nothing), Reporter(lambda row, step: seen.append(step), nothing)]
    for row in ROWS:
        reporters.tell(made, row)
    assert seen == [1, 2, 3]
    assert capsys.readouterr().out.count("gone") == 1


def test_a_training_that_goes_on_is_the_same_one(tmp_path: Path) -> None:
    first = reporters.key_of(tmp_path, 0)
    assert reporters.key_of(tmp_path, 40) == first
    assert reporters.key_of(tmp_path, 0) != first  # begun anew
