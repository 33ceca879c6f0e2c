"""Logs that grow while a training runs and are cut off by kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl.training import journal


def test_rewound_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        journal.append(path, {"step": step, "text": "grüße"})
    journal.rewind(path, 3)
    assert [row["step"] for row in journal.read(path)] == [1, 2, 3]
    journal.append(path, {"step": 4})
    assert [row["step"] for row in journal.read(path)] == [1, 2, 3, 4]
    journal.rewind(path, 0)
    assert path.read_text() == ""


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert list(journal.read(tmp_path / "none")) == []
    journal.rewind(tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()


def test_cut_off_at_any_byte(tmp_path: Path) -> None:
    """A kill may cut the last line anywhere, in the middle of a character too."""
    path = tmp_path / "samples.jsonl"
    for step in (1, 2):
        journal.append(path, {"step": step, "text": "grüße 论文"})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal.rewind(path, 9)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows] == [1, 2][: whole[:size].count(b"}")]


def test_line_separators_inside_a_text_are_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    journal.append(path, {"step": 1, "text": "a\u2028b\x85c\x0cd"})
    journal.append(path, {"step": 2})
    assert [row["step"] for row in journal.read(path)] == [1, 2]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"step": 1, "train_loss": float("nan")})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "train_loss": None}
