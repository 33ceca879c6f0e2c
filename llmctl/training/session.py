"""What pretraining and finetuning do around their steps: choose once, resume, stop when asked, and remember."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llmctl import console
from llmctl.artifact import Job, stoppable, write_json
from llmctl.errors import Interrupted, TimeUp
from llmctl.recipe import TrainingSection
from llmctl.training import checkpoint, journal, loop
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from llmctl.training.objectives import Loss

LOGS = (METRICS, SAMPLES) = ("metrics.jsonl", "samples.jsonl")
SMOOTHING = 0.98  # of the training loss that is reported: a mean over about fifty steps


@dataclass(frozen=True)
class Choices:
    """What this machine decided. Made once, kept beside the checkpoints and used again on resume."""

    dtype: str
    dtype_reason: str
    compiled: bool
    compile_reason: str
    threads: int
    micro_batch: int
    isa: tuple[str, ...]

    def describe(self) -> str:
        """`bf16 (avx512_bf16) · torch.compile`."""
        return f"{self.dtype} ({self.dtype_reason}) · {self.compile_reason}"

    @property
    def autocast(self) -> bool:
        return self.dtype == "bf16"

    @property
    def opening(self) -> str:
        """What to say before the first step, where it is long in coming."""
        return "compiling: the first step takes up to a minute" if self.compiled else ""


def choose(
    job: Job, section: TrainingSection, loss: Loss, flops: float, micro_batch: int, *, kind: str = "decoder"
) -> tuple[Choices, Loss]:
    """The choices of this run, old ones where it was begun before, and the loss, compiled or not.

    `kind` is the model's, see `model.config`.
    """
    path = job.work / "choices.json"
    dtype, why = job.device.dtype(section.dtype)
    if (choices := _kept(path)) is not None:
        if choices.threads != job.device.threads or set(choices.isa) != job.device.isa:
            console.warn("this run was begun on another machine or with other threads: it goes on, but not bitwise")
        if section.micro_batch_size != "auto" and micro_batch != choices.micro_batch:
            console.warn(f"micro_batch_size {choices.micro_batch} -> {micro_batch}: it goes on, but not bitwise")
            choices = dataclasses.replace(choices, micro_batch=micro_batch)
        wanted = choices.compiled if section.compile == "auto" else section.compile
        ready, _, _ = loop.compiled(loss, wanted, flops, job.device.torch, kind)
    else:
        ready, is_compiled, reason = loop.compiled(loss, section.compile, flops, job.device.torch, kind)
        choices = Choices(
            dtype, why, is_compiled, reason, job.device.threads, micro_batch, tuple(sorted(job.device.isa))
        )
        write_json(path, dataclasses.asdict(choices))
    torch.set_num_threads(choices.threads)
    if job.device.kind == "cpu":  # or compiled code adds up the embedding's gradient in the order its threads arrive
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # its module's property
    job.resolved |= {key: value for key, value in dataclasses.asdict(choices).items() if key != "isa"}
    return choices, ready


def _kept(path: Path) -> Choices | None:
    """The choices of the session before; None where there was none, or they can't be read."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        return Choices(**{**kept, "isa": tuple(kept["isa"])})
    except (ValueError, TypeError, KeyError):
        console.warn(f"{path} cannot be read; this machine chooses anew, and what follows may not be bitwise the same")
        return None


def resume(job: Job, seed: int, model: nn.Module, optimizers: Sequence[Optimizer], steps: int) -> State:
    """The state of the newest whole checkpoint, loaded into the model, else a fresh one. Logs are rewound to it."""
    torch.manual_seed(seed)
    begun = bool(checkpoint.checkpoints(job.work))
    found = checkpoint.newest(job.work)
    state = State()
    if begun and found is None:
        console.warn(f"no checkpoint is left; {job.settings.stage} starts over")
    if found is not None:
        folder, state = found
        checkpoint.restore(folder, model, optimizers)
        console.detail(f"resuming at step {state.step:,} of {steps:,} from {folder.name}")
        console.event("resumed", stage=job.settings.stage, step=state.step)
    for log in (METRICS, SAMPLES):
        journal.rewind(job.work / log, state.step)
    return state


def follow(state: State, step: Step) -> None:
    """Counts a finished step into the state."""
    if not step.skipped:
        is_first = state.step == state.skipped
        state.train_loss = step.loss if is_first else SMOOTHING * state.train_loss + (1 - SMOOTHING) * step.loss
    state.step, state.position = step.number, step.position
    state.tokens += step.tokens
    state.seconds += step.seconds
    if step.skipped:
        state.skipped += 1
        console.warn(
            f"step {step.number}: the loss or gradient was no number; the step was skipped ({state.skipped} so far)"
        )


def record(work: Path, step: Step, more: dict[str, Any] | None = None) -> None:
    """A line of metrics.jsonl, and the same as an event."""
    row = {
        "step": step.number,
        "train_loss": round(step.loss, 6),
        "learning_rate": step.learning_rate,
        "gradient_norm": round(step.gradient_norm, 5),
        "tokens_per_second": round(step.tokens_per_second, 1),
        "peak_memory_bytes": loop.peak_memory(),
        **(more or {}),
    }
    journal.append(work / METRICS, row)
    console.event("step", **row)


def publish_logs(work: Path, folder: Path) -> None:
    """Copies the logs of a training into the folder that is about to be published."""
    for log in LOGS:
        (folder / log).write_bytes((work / log).read_bytes() if (work / log).exists() else b"")


def figures(state: State) -> dict[str, Any]:
    """The metrics that every training reports, under the field's names."""
    return {
        "train_loss": state.train_loss,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "seconds": state.seconds,
        "peak_memory_bytes": loop.peak_memory(),
    }


class BrokenOff(Exception):
    """A signal came while `Stop.breaks_off` was watching."""


class Stop:
    """Whether to stop: the first Ctrl-C or SIGTERM, or --max-time. A second Ctrl-C quits at once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._asked: list[int] = []
        self._evaluating = False
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Stop:
        self._asked = self._signals.enter_context(stoppable(self._at_once))
        return self

    def _at_once(self) -> None:
        if self._evaluating:
            raise BrokenOff

    @contextlib.contextmanager
    def breaks_off(self) -> Iterator[None]:
        """An evaluation takes longer than CI systems wait: a signal breaks it off, and training loses nothing by it."""
        self._evaluating = True
        with contextlib.suppress(BrokenOff):
            try:
                yield
            finally:
                self._evaluating = False

    def __exit__(self, *problem: object) -> None:
        self._signals.close()

    def __call__(self) -> bool:
        return bool(self._asked) or self._job.out_of_time()

    def raise_if_early(self, state: State, steps: int) -> None:
        """After the last checkpoint: the reason why the training ended before its last step.

        Raises:
            Interrupted: a signal. TimeUp: --max-time. Both say that the state is saved.
        """
        hint = "the same command again goes on from there"
        if self._asked:
            raise Interrupted(
                f"stopped at step {state.step:,} of {steps:,}; its state is saved", hint=hint, signum=self._asked[0]
            )
        if state.step < steps:
            raise TimeUp(f"--max-time is over at step {state.step:,} of {steps:,}; its state is saved", hint=hint)
