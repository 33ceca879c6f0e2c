"""What pretraining and finetuning do around their steps: resume, stop when asked, and remember."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from llmctl import console, launch
from llmctl.artifact import Job, stoppable
from llmctl.errors import Interrupted, Paused, TimeUp
from llmctl.model.config import Config
from llmctl.model.hf import Model
from llmctl.recipe import FinetuneSection, PretrainSection, TrainingSection
from llmctl.training import checkpoint, distributed, journal, loop, optim, outlook, reporters, watching
from llmctl.training.batch import Batch, ahead
from llmctl.training.checkpoint import Saver, State
from llmctl.training.choices import Choices, halved
from llmctl.training.compiling import Compiling
from llmctl.training.distributed import Ranks
from llmctl.training.ema import Ema
from llmctl.training.loop import Step
from llmctl.training.objectives import Learner
from llmctl.training.outlook import Outlook
from llmctl.training.planning import Plan
from llmctl.training.precision import LossScale, Precision

LOGS = (METRICS, SAMPLES) = ("metrics.jsonl", "samples.jsonl")
SMOOTHING = 0.98  # of the training loss that is reported: a mean over about fifty steps


@dataclass
class Session:
    """A training under way: a context around a stage's loop over its steps, which writes the rare events itself."""

    job: Job
    section: TrainingSection
    plan: Plan
    model: Model
    learner: nn.Module  # the model and its loss, as DDP or FSDP wrapped them
    average: Ema
    state: State
    saver: Saver
    stop: Stop
    watch: watching.Watch
    compiling: Compiling
    ranks: Ranks
    expected: Outlook
    steps: Iterator[Step]
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Session:
        for part in (self.stop, self.saver, self.watch):
            self._open.enter_context(part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, value, trace)

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left. After the last of this session its checkpoint is whole."""
        for step in self.steps:
            follow(self.state, step)
            self.compiling.follow(step)
            yield step
        self.saver.finish(self.state)  # still deaf to the second signal that CI systems send

    def every(self, step: Step, steps: int) -> bool:
        """Whether it is one of every so many, and not the last: that is saved and measured when all is done."""
        return step.every(steps) and step.number != self.plan.steps

    @contextlib.contextmanager
    def measuring(self) -> Iterator[bool]:
        """Whether this rank measures the model, which has its averaged weights meanwhile. A signal breaks it off."""
        with self.average.instead(), distributed.one_alone(self.learner) as mine, self.stop.breaks_off():
            yield mine

    def keep(self, save: Callable[[Model, Path], object]) -> None:
        """Keeps the model of this step for good: an artifact in `checkpoints/<stage>/`, which every command takes.

        Args:
            save: writes the model's folder.
        """
        with self.average.instead():
            whole = distributed.whole(self.model)
            if not self.ranks.is_first:
                return
            place = f"checkpoints/{self.job.place}/step-{self.state.step:08}"
            with dataclasses.replace(self.job, place=place, sources_index={}).publishing() as staging:
                save(whole, staging.path)
                staging.seal(figures(self.state))

    def finish(self) -> tuple[Model | None, dict[str, Any]]:
        """The trained model, on rank 0, and what is to be told of the training.

        Raises:
            Interrupted, TimeUp, Paused: it ended before its last step; its state is saved.
        """
        self.stop.raise_if_early(self.state, self.plan.steps)
        compared = self.expected.compare(self.state)
        self.average.exchange()
        whole = distributed.whole(self.model)
        if not self.ranks.is_first:
            return None, {}
        return whole.to(self.job.device.torch), {**figures(self.state), **self.watch.figures, **compared}


def begin(
    job: Job,
    section: PretrainSection | FinetuneSection,
    learner: Learner,
    plan: Plan,
    choices: Choices,
    compiling: Compiling,
    batches: Callable[[int], Iterator[Batch]],
    *,
    tokens: int,
    length: int,
    held: int,
) -> Session:
    """Says what the training will take, and puts it where it stands: at its start, or behind its last checkpoint.

    Args:
        batches: from a position of the loader on.
        tokens: of the whole run. length: of a sequence, as it is in the middle.
        held: of `outlook.memory_now` before the model was built.
    """
    model, ranks = learner.model, distributed.here(job.device.torch)
    shapes = (model.config, plan, choices.micro_batch, choices.gemm, tokens, held, learner.taught_by)
    expected = outlook.begin(job, section, *shapes)
    wrapped = distributed.wrap(
        learner,
        ranks,
        section.strategy,
        checkpointing=section.activation_checkpointing,
        bf16=choices.dtype == "bf16",
    )
    average = Ema(model, section.ema_decay)
    optimizers = optim.build(
        model,
        section.optimizer,
        plan.learning_rate,
        section.weight_decay,
        beta2=section.adam_beta2,
        dtype=choices.dtype,
    )
    if isinstance(section, FinetuneSection) and section.is_sparse:
        optim.hold_zeros(model, optimizers)
    saver = Saver(job.work, model, optimizers, average.tensors or None, keep=section.keep_last)
    state = resume(job, saver, plan.steps)
    compiling.begin(state.step)
    stop = Stop(job, compiling)
    steps = loop.train(
        wrapped,
        optimizers,
        ahead(batches(state.position)),
        steps=range(state.step, min(plan.steps, job.until_step or plan.steps)),  # the schedule is that of the plan
        rate=plan.rate,
        micro_batch=choices.micro_batch,
        max_grad_norm=section.max_grad_norm,
        precision=Precision(job.device.torch, choices.dtype),
        stop=stop,
        ranks=ranks,
        measure_every=section.log_every,
        scale=_scale(choices, state),
        guard=state.guard,
        on_spike=section.on_spike,
        roll_back=lambda: roll_back(job, state, saver),
        halved=halved(job, section),
        ema=average,
    )
    watch = _watch(job, section, choices, model.config, length, state)
    return Session(
        job, section, plan, model, wrapped, average, state, saver, stop, watch, compiling, ranks, expected, steps
    )


def resume(job: Job, saver: Saver, steps: int) -> State:
    """The state of the newest whole checkpoint, loaded into the training, else a fresh one. Logs are rewound to it."""
    torch.manual_seed(job.recipe.seed)
    begun = bool(checkpoint.checkpoints(job.work))
    with distributed.here(job.device.torch).first_goes():  # it drops what is damaged
        found = checkpoint.newest(job.work)
    state = State()
    if begun and found is None:
        console.warn(f"no checkpoint is left; {job.settings.stage} starts over")
    if found is not None:
        folder, state = found
        saver.restore(folder)
        console.detail(f"resuming at step {state.step:,} of {steps:,} from {folder.name}")
        console.event("resumed", stage=job.settings.stage, step=state.step)
    for log in LOGS:
        journal.rewind(job.work / log, state.step)
    return state


def roll_back(job: Job, state: State, saver: Saver) -> int | None:
    """Takes a training back to its newest checkpoint, in place: the step (0-based) to go on with; None without one.

    Every roll back is counted, also in the state that it goes back to; the loader is not the training's and goes on
    where it is.
    """
    with distributed.here(job.device.torch).first_goes():
        saver.wait()
        found = checkpoint.newest(job.work)
    if found is None:
        return None
    folder, before = found
    saver.restore(folder)
    before.guard.roll_backs = state.guard.roll_backs + 1
    console.warn(f"step {state.step + 1}: the loss leapt; going back to step {before.step} and on past that text")
    console.event("rolled_back", stage=job.settings.stage, step=before.step)
    for ours, theirs in ((state.guard, before.guard), (state.scale, before.scale)):
        if ours is not None:
            vars(ours).update(vars(theirs))  # the loop holds them
    vars(state).update(vars(before) | {"guard": state.guard, "scale": state.scale})
    for log in LOGS:
        journal.rewind(job.work / log, state.step)
    return state.step


def _scale(choices: Choices, state: State) -> LossScale | None:
    """fp16's loss scale, which the state keeps."""
    if choices.dtype != "fp16":
        return None
    state.scale = state.scale or LossScale()
    return state.scale


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
        known = math.isfinite(step.loss) and math.isfinite(step.gradient_norm)
        why = f"the loss leapt to {step.loss:.2f}" if known else "the loss or gradient was no number"
        console.warn(f"step {step.number}: {why}; the step was skipped ({state.skipped} so far)")


def _watch(
    job: Job, section: TrainingSection, choices: Choices, config: Config, length: int, state: State
) -> watching.Watch:
    """What tells of this training; its dashboards are those of `report_to`.

    Raises:
        UnavailableError: a dashboard refuses.
    """
    known = job.device.listed
    return watching.Watch(
        job.work / METRICS,
        state,
        watching.flops_per_token(config, length),
        launch.size() * (known.peak if known is not None else choices.gemm),
        "peak" if known is not None else "GEMM",
        _dashboards(job, section, state) if section.report_to and launch.rank() == 0 else (),
    )


def _dashboards(job: Job, section: TrainingSection, state: State) -> list[reporters.Reporter]:
    stage, key = job.settings.stage, reporters.key_of(job.work, state.step)
    told = {name: job.recipe.section(name).model_dump(mode="json") for name in ("model", stage)}
    subject = reporters.Subject(job.run.name, stage, job.run.path / "logs", key, state.step, told)
    return reporters.start(section.report_to, subject)


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

    def __init__(self, job: Job, compiling: Compiling) -> None:
        self._job, self._compiling = job, compiling
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
                with self._compiling.eagerly():
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
            Interrupted: a signal. TimeUp: --max-time. Paused: --until-step. All say that the state is saved.
        """
        hint = "the same command again goes on from there"
        if signum := distributed.here(self._job.device.torch).greatest(self._asked[0] if self._asked else 0):
            raise Interrupted(
                f"stopped at step {state.step:,} of {steps:,}; its state is saved", hint=hint, signum=signum
            )
        if state.step < steps and state.step >= (self._job.until_step or steps):
            raise Paused(self._job.place, state.step, steps)
        if state.step < steps:
            raise TimeUp(f"--max-time is over at step {state.step:,} of {steps:,}; its state is saved", hint=hint)
