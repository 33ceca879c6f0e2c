"""The JSON objects of a model's folder: read with errors that name file and line, written as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl.errors import DataError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a DataError that names the file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as reason:
        raise DataError(f"is not JSON ({reason.msg})", file=path, line=reason.lineno) from reason
    except (OSError, UnicodeDecodeError, RecursionError) as reason:
        raise DataError(f"cannot be read ({reason})", file=path) from reason
    if not isinstance(value, dict):
        raise DataError("is not a JSON object", file=path)
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as transformers does: indented, keys sorted, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
