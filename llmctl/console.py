"""The only module that prints: lines for people, one JSON document for scripts, JSON lines for dashboards.

Everything for people goes to stdout, or to stderr when stdout belongs to a document (`--json`) or to an answer
(`chat -p`).
On a terminal long work is a live line; in a pipe it is one plain line every 30 seconds; `--events FILE` gets every
event as
JSON. A reader that closes the pipe silences us: it never ends the work.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llmctl.errors import LlmctlError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY = 30.0  # seconds between progress lines where nobody watches a terminal
NAME_WIDTH = 10  # the column of stage names: " pretrain   ..."
_ANNOTATE = os.environ.get("GITHUB_ACTIONS") == "true"


@dataclass
class _State:
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    to_stderr: bool = False
    events: IO[str] | None = None
    log: IO[str] | None = None
    rich: Console | None = None
    silenced: bool = False
    live: Progress | None = None


_state = _State()


def configure(
    *,
    json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    events: Path | None = None,
    to_stderr: bool = False,
) -> None:
    """Sets how this process prints; called once by the command line."""
    close()
    _state.json, _state.quiet, _state.verbose, _state.to_stderr = json, quiet, verbose, to_stderr or json
    _state.rich, _state.silenced = None, False
    if events is not None:
        try:
            events.parent.mkdir(parents=True, exist_ok=True)
            _state.events = events.open("a", encoding="utf-8")
        except OSError as reason:
            raise UsageError(
                f"cannot write events: {reason.strerror}", file=events, hint="name a file that can be written"
            ) from reason


def close() -> None:
    """Closes the event and log files."""
    for stream in (_state.events, _state.log):
        if stream is not None:
            stream.close()
    _state.events = _state.log = None


def mute() -> None:
    """Prints nothing from now on: this process takes part in what another one reports."""
    _state.json, _state.quiet, _state.silenced, _state.live = False, True, True, None
    _state.events = _state.log = None
    if not _state.verbose:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # libraries have their say too
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Copies every line, without colour, to `path` for as long as the block runs."""
    previous = _state.log
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as _state.log:
        try:
            yield
        finally:
            _state.log = previous


def verbose() -> bool:
    """Whether `-v` was given."""
    return _state.verbose


def is_terminal() -> bool:
    """Whether a person watches the stream we print to."""
    return bool(_rich().is_terminal) and not _state.quiet


def _rich() -> Console:
    if _state.rich is None:
        from rich.console import Console

        class Outlasting(Console):
            """A console that outlasts its reader: rich itself would end the program."""

            def on_broken_pipe(self) -> None:
                _silence()

        _state.rich = Outlasting(stderr=_state.to_stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    return _state.rich


def _write(text: str, style: str = "", *, always: bool = False) -> None:
    if _state.log is not None:
        _state.log.write(text + "\n")
        _state.log.flush()
    if _state.silenced or (_state.quiet and not always):
        return
    _rich().print(text, style=style or None)


def _silence() -> None:
    """The reader has gone (`| head`): print no more, and keep the interpreter's last flush from complaining."""
    _state.silenced = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if _state.to_stderr else 1)


def say(text: str = "", *, style: str = "") -> None:
    """One line."""
    _write(text, style)


def stage(name: str, text: str, right: str = "") -> None:
    """The row of a stage: its name, what it works on, and at the right edge how long it took."""
    line = f" {name:<{NAME_WIDTH}} {text}"
    width = min(100, _rich().width) if _rich().is_terminal else 100
    _write(
        f"{line}{right:>{max(_cells(right) + 2, width - _cells(line))}}" if right else line, "bold" if not right else ""
    )


def detail(text: str, right: str = "") -> None:
    """A line below a stage's row, in its text column."""
    stage("", text, right) if right else _write(f" {'':<{NAME_WIDTH}} {text}")


def note(text: str) -> None:
    """Something worth knowing that asks for nothing."""
    _write(f"note: {text}", "dim")


def warn(text: str) -> None:
    """Something a person should look at; shown with `--quiet` too."""
    _write(f"warning: {text}", "yellow", always=True)
    event("warning", message=text)
    if _ANNOTATE:
        _annotate("warning", text, None, None)


def debug(text: str) -> None:
    """A line only `-v` shows."""
    if _state.verbose:
        _write(text, "dim")


def raw(text: str) -> None:
    """Writes `text` as it is to stdout, without a newline, at once: the answer of a model."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first column is text, the others are figures."""
    from rich.table import Table

    drawn = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 1)
    )
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index == 0 else "right", style="", header_style="dim")
    for row in rows:
        drawn.add_row(*row)
    if _state.log is not None:
        _state.log.writelines("  ".join(row) + "\n" for row in [header, *rows])
    if not _state.silenced and not _state.quiet:
        _rich().print(drawn, soft_wrap=False)


def columns(rows: Sequence[Sequence[str]], indent: int = 1) -> None:
    """Rows of plain text under each other, each column as wide as its widest cell."""
    widths = [max(_cells(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    for row in rows:
        cells = (cell + " " * (widths[i] - _cells(cell)) for i, cell in enumerate(row))
        _write(" " * indent + "   ".join(cells).rstrip())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown on stdout, for a CI summary."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    raw("".join("| " + " | ".join(row) + " |\n" for row in lines))


def event(kind: str, **fields: Any) -> None:
    """One JSON line in the file of `--events`; nothing without one."""
    if _state.events is not None:
        _state.events.write(_json({"time": round(time.time(), 3), "event": kind, **fields}) + "\n")
        _state.events.flush()


def result(document: dict[str, Any]) -> None:
    """The one document of `--json`; silent otherwise."""
    event("result", **document)
    if _state.json:
        raw(_json(document, indent=2) + "\n")


def document(value: Any) -> None:
    """A JSON document that is the command's whole answer, whatever the flags (`llmctl init --schema`)."""
    raw(_json(value, indent=2) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have and strict readers choke on."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def error(problem: LlmctlError) -> None:
    """An error as a person reads it: where and what, then the mend, indented below it."""
    where = problem.where()
    head = f"{where}: {problem.message}" if where else problem.message
    _state.to_stderr, _state.rich = True, None
    _write(head, "bold red", always=True)
    for line in problem.hint.splitlines():
        _write(f"   {line}", always=True)
    if _ANNOTATE:
        _annotate("error", problem.message, problem.file, problem.line)


def _annotate(kind: str, message: str, file: str | None, line: int | None) -> None:
    """A GitHub Actions annotation (workflow commands), on stderr so that stdout stays one document."""

    def escaped(text: object, more: str = "") -> str:
        return "".join(f"%{ord(letter):02X}" if letter in "%\r\n" + more else letter for letter in str(text))

    named = ((key, value) for key, value in (("file", file), ("line", line)) if value is not None)
    place = ",".join(f"{key}={escaped(value, ':,')}" for key, value in named)
    sys.stderr.write(f"::{kind} {place}::{escaped(message)}\n" if place else f"::{kind}::{escaped(message)}\n")


class Progress:
    """A live line while work goes on; `with progress("prep", total=10, unit="docs") as p: p.update(3, text="...")`."""

    def __init__(self, name: str, total: float | None, unit: str, opening: str) -> None:
        self.name, self.total, self.unit, self.opening = name, total, unit, opening
        self._start = self._last = self._updated = time.monotonic()
        self._first: float | None = None
        self._shown = opening or "working"
        self._bar: Any = None
        self._ended, self._telling = threading.Event(), threading.Lock()

    def __enter__(self) -> Progress:
        if is_terminal() and not _state.silenced:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn(f" {self.name:<{NAME_WIDTH}}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=_rich(), transient=True, refresh_per_second=4)
            self._task = self._bar.add_task("", total=self.total, text=self.opening)
            self._bar.start()
        else:
            if self.opening:
                stage(self.name, self.opening)
            threading.Thread(target=self._speak_in_silence, name="llmctl-progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def _speak_in_silence(self) -> None:
        """While a step compiles or an evaluation runs: CI systems take a process that says nothing for dead."""
        while not self._ended.wait(max(0.1, self._last + PLAIN_EVERY - time.monotonic())):
            age = time.monotonic() - self._updated
            since = f" · {duration(age)}" + (" ago" if self._first is not None else "")
            self._tell(self._shown + (since if age > PLAIN_EVERY / 10 else ""))

    def _tell(self, text: str) -> None:
        """A plain line, if it is time for one."""
        with self._telling:
            now = time.monotonic()
            if now - self._last >= PLAIN_EVERY and not self._ended.is_set():
                self._last = now
                stage(self.name, text)

    def update(self, done: float, text: str = "") -> None:
        """`done` of the total is finished; `text` says what a person wants to know now."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now  # work done before us (a resumed run) must not count as our speed
        rate = (done - self._first) / (now - self._start) if now > self._start else 0.0
        eta = f"ETA {duration((self.total - done) / rate)}" if self.total and rate > 0 and done < self.total else ""
        shown = " · ".join(part for part in (text or f"{count(done)} {self.unit}", eta) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=shown)
            return
        share = f"{100 * done / self.total:3.0f} % · " if self.total else ""
        self._shown, self._updated = share + shown, now
        self._tell(self._shown)


def progress(name: str, *, total: float | None = None, unit: str = "", opening: str = "") -> Progress:
    """A progress line for `total` units (None: nobody knows); `opening` is said at once, before the first of them."""
    return Progress(name, total, unit, opening)


def size(bytes_: float) -> str:
    """`9.9 MB`: decimal units, as disks and the field count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(bytes_) < 1000:
            return f"{bytes_:.0f} {unit}" if unit == "bytes" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} TB"


def count(number: float) -> str:
    """`12,345`, `2.9 M`, `1.2 G`."""
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if abs(number) >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `11 s`, `6 min 06 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def ago(seconds: float) -> str:
    """`2 min ago`: one unit is enough to place a moment."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
