"""`report_to`: the rows of metrics.jsonl, sent to a dashboard as well. Each is an extra, imported where it is used."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl import console
from llmctl.errors import UnavailableError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reporter:
    """Where rows go: `log(numbers, step)` for each, `close()` after the last."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Subject:
    """What is reported on. A training that goes on after a stop is the same one: `key` tells it from those before."""

    run: str
    stage: str
    folder: Path  # of the run's logs
    key: str
    step: int  # finished before; what a dashboard has from later steps is out of date
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run}-{self.stage}-{self.key}"


def require(names: Sequence[str]) -> None:
    """Before anything is trained: whether they can be imported.

    Raises:
        UnavailableError: one cannot; the mend is the extra to install.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as reason:
            raise UnavailableError(
                f'report_to = ["{name}"], and {name} is not installed ({reason})',
                hint=f"pip install 'llmctl[{name}]', or leave it out of report_to",
            ) from reason


def key_of(work: Path, step: int) -> str:
    """The name of this training among those of its run, kept with its resume state."""
    path = work / "report_key"
    if step == 0 or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def start(names: Sequence[str], subject: Subject) -> list[Reporter]:
    """The reporters called `names`.

    Raises:
        UnavailableError: one refuses (no account, no network).
    """
    made = []
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # trackio prints, and stdout may belong to a document
                made.append(_START[name](subject))
        except Exception as reason:
            hint = "wandb login, or WANDB_MODE=offline, which keeps it on this machine" if name == "wandb" else ""
            raise UnavailableError(
                f"{name} does not start: {reason}", hint=hint or "leave it out of report_to"
            ) from reason
    return made


def tell(reporters: list[Reporter], row: Row) -> None:
    """Sends a row's numbers. A dashboard that fails is dropped with a warning: no training ends because of one."""
    step = row["step"]
    numbers = {
        key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }
    for reporter in list(reporters):
        try:
            reporter.log(numbers, step)
        except Exception as reason:
            reporters.remove(reporter)
            console.warn(f"a dashboard of report_to failed and gets no more rows: {reason}")


def close(reporters: Sequence[Reporter]) -> None:
    """Lets each write what it still holds."""
    for reporter in reporters:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                reporter.close()
            except Exception as reason:
                console.warn(f"a dashboard of report_to did not take the last rows: {reason}")


def _tensorboard(subject: Subject) -> Reporter:
    from torch.utils.tensorboard import SummaryWriter

    folder = subject.folder / "tensorboard" / subject.stage
    writer = SummaryWriter(folder, purge_step=subject.step + 1)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Reporter(log, writer.close)


def _wandb(subject: Subject) -> Reporter:
    """Online unless WANDB_MODE says otherwise, as everywhere; a run that goes on is the same run there."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "llmctl"),
        name=f"{subject.run}-{subject.stage}",
        id=subject.name,
        resume="allow",
        dir=str(subject.folder),
        config=dict(subject.config),
        settings={"console": "off"},  # it would take over stdout
    )
    return Reporter(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _trackio(subject: Subject) -> Reporter:
    """On this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""
    import trackio

    run = trackio.init(project="llmctl", name=subject.name, resume="allow", config=dict(subject.config), embed=False)
    return Reporter(lambda numbers, step: run.log(numbers, step=step), trackio.finish)


_START: dict[str, Callable[[Subject], Reporter]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
