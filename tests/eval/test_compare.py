"""Two evaluations side by side: what is significantly worse, and what only looks so."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmctl import console
from llmctl.artifact import Artifact
from llmctl.errors import DataError, GateError
from llmctl.eval import compare
from tests.test_artifact import job, published


def evaluation(
    folder: Path, windows: list[float], text: str = "a" * 64, accuracy: float | None = None, questions: int = 100
) -> Path:
    metrics: dict[str, Any] = {"val_loss": sum(windows) / max(1, len(windows))}
    if accuracy is not None:
        metrics |= {"task_accuracy": accuracy, "task_stderr": (accuracy * (1 - accuracy) / questions) ** 0.5}
    columns = [{"name": "untrained", "weights": "", "metrics": {}}, {"name": "m", "weights": "b", "metrics": metrics}]
    results = {"columns": columns, "windows": windows, "text_sha256": text, "examples": 0}
    made: Artifact = published(
        job(folder, "eval/m", kind="evaluation"), {"results.json": json.dumps(console.finite(results)).encode()}
    )
    return made.path


def compared(tmp_path: Path, now: dict[str, Any], before: dict[str, Any]) -> None:
    baseline = evaluation(tmp_path / "before", **before)
    compare.against(evaluation(tmp_path / "now", **now), compare.read(baseline), baseline)


def windows(worse_by: float, noise: float = 0.0, seed: int = 1) -> list[float]:
    """Pieces that differ much among themselves, as texts do."""
    pieces, wobble = random.Random(0), random.Random(seed)
    return [100 + 20 * pieces.random() + worse_by + noise * (wobble.random() - 0.5) for _ in range(50)]


def test_itself_is_not_worse(tmp_path: Path) -> None:
    same = {"windows": windows(0), "accuracy": 0.5}
    compared(tmp_path, same, same)


def test_a_little_worse_everywhere_is_significant(tmp_path: Path) -> None:
    """Pairing sees a tenth of a nat where the pieces themselves differ by twenty."""
    with pytest.raises(GateError, match="significantly worse") as caught:
        compared(tmp_path, {"windows": windows(0.1, 0.2)}, {"windows": windows(0)})
    assert "val_loss" in caught.value.message
    compared(tmp_path / "better", {"windows": windows(-0.1, 0.2)}, {"windows": windows(0)})


def test_noise_is_not_significant(tmp_path: Path) -> None:
    compared(tmp_path, {"windows": windows(0.05, 5.0)}, {"windows": windows(0)})


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_model_is_worse(tmp_path: Path, broken: float) -> None:
    with pytest.raises(GateError):
        compared(tmp_path, {"windows": [*windows(0)[:-1], broken]}, {"windows": windows(0)})


def test_other_texts_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    compared(tmp_path, {"windows": windows(9), "text": "b" * 64}, {"windows": windows(0)})
    assert "different texts" in capsys.readouterr().out
    compared(tmp_path / "shorter", {"windows": windows(9)[:40]}, {"windows": windows(0)})
    assert "different texts" in capsys.readouterr().out


@pytest.mark.parametrize(("now", "fails"), [(0.30, True), (0.45, False), (0.55, False)])
def test_accuracies_by_their_standard_errors(tmp_path: Path, now: float, fails: bool) -> None:
    pair = {"windows": windows(0), "accuracy": now}, {"windows": windows(0), "accuracy": 0.5}
    if fails:
        with pytest.raises(GateError, match=r"task_accuracy 0\.500 -> 0\.300"):
            compared(tmp_path, *pair)
    else:
        compared(tmp_path, *pair)


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is tokens, not an evaluation"):
        compare.read(published(job(tmp_path)).path)
    with pytest.raises(DataError, match="no artifact here"):
        compare.read(tmp_path / "nothing")


def test_the_table_has_a_row_a_metric_and_a_column_a_model() -> None:
    header, rows = compare.table(
        [
            ("before", {"val_loss": 2.5, "val_perplexity": 12.18}),
            ("after", {"val_loss": 2.25, "answers_ended": 0.961, "task_accuracy": 0.5, "task_stderr": 0.05}),
        ]
    )
    assert header == ["", "before", "after"]
    assert rows == [
        ["loss (nats a token)", "2.500", "2.250"],
        ["perplexity", "12.2", ""],
        ["answers that end by themselves", "", "96 %"],
        ["task_accuracy", "", "50.0 % ± 5.0"],
    ]
