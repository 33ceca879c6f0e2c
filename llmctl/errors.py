"""Everything that llmctl raises on purpose, and the exit code a shell script sees.

    LlmctlError          message, hint, file, line
    ├── UsageError       2   the command line or its target
    ├── RecipeError      2   the recipe (file:line)
    ├── DataError        3   a source, a dataset, an artifact's contents
    ├── RunError         4   the work itself failed (disk full, loss is NaN)
    ├── GateError        5   finished, but below what was required
    ├── UnavailableError 6   not on this machine: a device, an extra, a compiler
    ├── BusyError       75   another process holds the run: try again
    ├── TimeUp          75   --max-time is over; the state is saved
    └── Interrupted  130/143 Ctrl-C or SIGTERM; the state is saved

Paused is none of them: --until-step was reached, exit 0. Anything else that escapes is a bug in llmctl: exit 70.
`status --exit-code` alone uses 1.
"""

from __future__ import annotations

import signal
from pathlib import Path

BUG = 70


class LlmctlError(Exception):
    """An error for people: what was found, where, what was expected (`message`), and the mend (`hint`)."""

    exit_code = BUG
    code = "bug"

    def __init__(
        self, message: str, *, hint: str = "", file: Path | str | None = None, line: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.file = str(file) if file is not None else None
        self.line = line

    def where(self) -> str:
        """`file:line`, `file` or nothing, ready to stand before the message."""
        if self.file is None:
            return ""
        return f"{self.file}:{self.line}" if self.line is not None else self.file

    def __str__(self) -> str:
        where = self.where()
        return f"{where}: {self.message}" if where else self.message


class UsageError(LlmctlError):
    exit_code, code = 2, "usage"


class RecipeError(LlmctlError):
    exit_code, code = 2, "recipe"


class DataError(LlmctlError):
    exit_code, code = 3, "data"


class RunError(LlmctlError):
    exit_code, code = 4, "run"


class GateError(LlmctlError):
    exit_code, code = 5, "gate"


class UnavailableError(LlmctlError):
    exit_code, code = 6, "unavailable"


class BusyError(LlmctlError):
    exit_code, code = 75, "busy"


class TimeUp(LlmctlError):
    exit_code, code = 75, "time"


class Paused(Exception):
    """--until-step was reached and the state is saved: what was asked for, and no artifact yet."""

    def __init__(self, stage: str, step: int, steps: int) -> None:
        super().__init__(f"{stage} is at step {step:,} of {steps:,}; its state is saved, and there is no artifact yet")
        self.stage, self.step, self.steps = stage, step, steps


class Interrupted(LlmctlError):
    """A signal asked the work to stop; what it had finished is saved."""

    code = "interrupted"

    def __init__(self, message: str, *, hint: str = "", signum: int = signal.SIGINT) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum
