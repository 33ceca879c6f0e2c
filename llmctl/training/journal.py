"""metrics.jsonl and samples.jsonl: logs that grow line by line while a training runs, and are rewound when it
resumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl import console, launch


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line. `row["step"]` says after which step it was written."""
    if launch.rank() == 0:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(console.finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a killed process may have left the last one cut off."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):  # bytes: the cut may lie inside a character
        try:
            yield json.loads(line)
        except ValueError:
            return


def rewind(path: Path, step: int) -> None:
    """Drops what was written after `step`: those steps are about to run again."""
    kept = [row for row in read(path) if row["step"] <= step]
    if path.exists() and launch.rank() == 0:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(path)
