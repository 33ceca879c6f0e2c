"""JSON lines: read one at a time, with file and line in every error, and unusable ones left out if the recipe says so.

Standard library only, as `sources`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import DataError

OnError = Literal["stop", "skip"]

MAX_LINE = 256 << 20  # characters: no document is that long, and it has to fit in memory
MAX_BAD = 0.1  # with on_error = "skip": the share of a file's lines that may be unusable before it is the wrong file


SKIP_HINT = 'fix the line, or set on_error = "skip" to count and leave out such lines'


def records(path: Path, shown: str, skipper: Skipper) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file's lines with their numbers from 1; blank ones are none, unusable ones the skipper's.

    Raises:
        DataError: what the skipper doesn't take, a line longer than `MAX_LINE`, a file that can't be opened.
    """
    try:
        stream = path.open("rb")
    except OSError as reason:
        raise DataError(
            f"the file cannot be read ({reason.strerror})", file=shown, hint=f"chmod u+r '{shown}'"
        ) from reason
    with stream:
        number = 0
        while line := stream.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                hint = "one JSON object a line is expected"
                raise DataError(f"the line is longer than {MAX_LINE >> 20} MiB", file=shown, line=number, hint=hint)
            if line.isspace():
                continue
            skipper.lines += 1
            try:
                yield number, _parse(line, shown, number)
            except DataError as problem:
                skipper.take(problem)
    skipper.finish()


def _parse(line: bytes, shown: str, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as reason:
        message = f"not UTF-8: byte 0x{reason.object[reason.start]:02x} at offset {reason.start:,} of the line"
    except json.JSONDecodeError as reason:
        message = f"not JSON ({reason})"
    except (ValueError, RecursionError):
        message = "not JSON (nested too deep, or a number of thousands of digits)"
    raise DataError(message, file=shown, line=number, hint=SKIP_HINT)


class Skipper:
    """Leaves out a file's unusable lines and counts them, as `on_error` says: a tenth of the lines at most."""

    def __init__(self, on_error: OnError, shown: str) -> None:
        self.on_error, self.shown = on_error, shown
        self.lines = self.bad = 0
        self.first: DataError | None = None

    def take(self, problem: DataError) -> None:
        """Raises `problem`, or counts it."""
        if self.on_error == "stop":
            raise problem
        self.first = self.first or problem
        self.bad += 1

    def finish(self) -> None:
        """At the end of the file.

        Raises:
            DataError: too much was left out.
        """
        if self.first is not None and self.bad > max(10, MAX_BAD * self.lines):
            first = f"line {self.first.line}, {self.first.message}"
            message = f"{self.bad:,} of {self.lines:,} lines can't be used (first: {first})"
            raise DataError(
                message,
                file=self.shown,
                hint=f'on_error = "skip" leaves out up to {MAX_BAD:.0%} of a file: is it the right one?',
            )


def valid(text: str) -> str:
    """The text with each lone surrogate (JSON can spell one; UTF-8 can't) replaced by U+FFFD."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
