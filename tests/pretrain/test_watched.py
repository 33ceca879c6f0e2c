"""What a pretraining tells of itself, and what telling costs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmctl.pretrain import stage
from tests.project import Project


def test_rows_add_up_and_a_dashboard_gets_them(fresh: Project) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = ("log_every=4", "eval_every=5", 'report_to=["tensorboard"]')
    done = fresh.llmctl("pretrain", "t.toml", "--json", *(f"--set=pretrain.{key}" for key in keys))
    assert done.code == 0, done.err
    assert 0 < done.json["metrics"]["overhead"] < 1
    rows = [json.loads(line) for line in (fresh.run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12]
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10]
    assert [row["step"] for row in rows if "update_norm" in row] == [4, 8, 12]
    tokens, seconds = 0, 0.0
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 64
        speed = (row["tokens"] - tokens) / (row["seconds"] - seconds)
        assert row["tokens_per_second"] == pytest.approx(
            speed, rel=0.25
        )  # seconds are rounded, and a step takes ten ms
        tokens, seconds = row["tokens"], row["seconds"]
    board = EventAccumulator(str(fresh.run / "logs" / "tensorboard" / "pretrain")).Reload()
    told = {point.step: point.value for point in board.Scalars("train_loss")}
    assert told == pytest.approx({row["step"]: row["train_loss"] for row in rows})


def test_a_missing_extra_is_told_before_anything_is_trained(fresh: Project) -> None:
    missing = "import sys; sys.modules['wandb'] = None"
    done = fresh.llmctl("pretrain", "t.toml", "--json", '--set=pretrain.report_to="wandb"', before=missing)
    assert done.code == 6
    assert "pip install 'llmctl[wandb]'" in done.json["error"]["hint"]
    assert not (fresh.run / ".work" / "pretrain" / "metrics.jsonl").exists()


def test_dashboards_make_no_other_model(finished: Project) -> None:
    finished.edit("log_every = 1\n\n[finetune]", 'log_every = 1\nreport_to = ["trackio"]\n\n[finetune]')
    assert finished.states("t.toml")["pretrain"] == "up to date"


def plan(tokens: int, steps: int = 100, eval_every: int = 10, length: int = 50) -> Any:
    return SimpleNamespace(steps=steps, eval_every=eval_every, tokens=tokens, length=length)


def test_evaluations_on_the_way_cost_little() -> None:
    """A share of the run's operations, whatever its length, and windows from all over the text."""
    text: Any = np.arange(200_000)
    for tokens in (10**6, 10**7):
        part = stage._part(text, plan(tokens))
        assert 10 * (len(part) - 1) / 3 == pytest.approx(0.0075 * tokens, rel=0.1)
        assert (part.min(), part.max()) == (0, 199_999)
        assert len(set(part // 20_000)) == 10
    assert len(stage._part(text, plan(10**12))) == 1310 * 50 + 1  # 65,536 at most
    assert len(stage._part(text, plan(100))) == 20 * 50 + 1  # 1,024 at least
    assert len(stage._part(text, plan(100, length=4096))) == 4097
    assert stage._part(text[:300], plan(10**6)).tolist() == list(range(300))
