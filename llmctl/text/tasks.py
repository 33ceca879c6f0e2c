"""Evaluation sets: questions from a JSONL file, one a line.

{"question": "...", "choices": ["...", "..."], "answer": 1}      multiple choice; the answer by index or in words
{"question": "...", "answer": "..."}                             an exact answer
{"sentence_good": "...", "sentence_bad": "..."}                  a minimal pair (BLiMP, Warstadt et al. 2020)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import sources

SHAPES = 'a line is {"question", "choices", "answer"}, {"question", "answer"} or {"sentence_good", "sentence_bad"}'


@dataclass(frozen=True)
class Question:
    """One question; `choices` is empty where the answer must be produced."""

    prompt: str
    choices: tuple[str, ...]
    answer: str
    origin: str


def name_of(spec: str) -> str:
    """What a task's metrics are called: its file's name."""
    return Path(spec).stem.replace("-", "_").replace(" ", "_")


def questions(spec: str, root: Path) -> list[Question]:
    """All questions of a task file, or of every file a glob or folder names.

    Raises:
        DataError: naming file and line.
    """
    found: list[Question] = []
    for path in sources.resolve(spec, root):
        found += _read(path)
    if not found:
        raise DataError("no question in it", file=spec, hint=SHAPES)
    return found


def _read(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError("not UTF-8 text", file=path, hint=SHAPES) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as reason:
            raise DataError(f"not JSON ({reason})", file=path, line=number, hint=SHAPES) from None
        yield _question(row, path, number)


def _question(row: Any, path: Path, line: int) -> Question:
    origin = f"{path}:{line}"
    if isinstance(row, dict) and "sentence_good" in row and "sentence_bad" in row:
        return Question("", (str(row["sentence_good"]), str(row["sentence_bad"])), str(row["sentence_good"]), origin)
    if not isinstance(row, dict) or "answer" not in row or "question" not in row:
        raise DataError("not a question", file=path, line=line, hint=SHAPES)
    choices, answer = tuple(map(str, row.get("choices", ()))), row["answer"]
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise DataError(
                f"answer {answer} of {len(choices)} choices", file=path, line=line, hint="the first choice is 0"
            )
        answer = choices[answer]
    if choices and str(answer) not in choices:
        raise DataError(f"the answer {answer!r} is none of the choices", file=path, line=line, hint=SHAPES)
    return Question(str(row["question"]), choices, str(answer), origin)
