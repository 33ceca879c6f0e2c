"""The training step: an iterator of finished steps over plain arguments. The stage that runs it writes the rare
events.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from llmctl import console
from llmctl.errors import RunError
from llmctl.training import optim
from llmctl.training.batch import Batch
from llmctl.training.objectives import Loss

BAD_STEPS = 20  # this many steps with a NaN or Inf in a row are no accident


@dataclass(frozen=True)
class Step:
    """A finished optimiser step."""

    number: int  # 1 is the first
    loss: float  # nats a supervised token
    gradient_norm: float
    learning_rate: float
    tokens: int  # positions that went through the model
    seconds: float
    position: int
    skipped: bool = False  # a NaN or an Inf: the weights were left alone

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def every(self, steps: int) -> bool:
        """Whether it is one of every so many; 0 is never."""
        return steps > 0 and self.number % steps == 0


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    steps: range,
    rate: Callable[[int], float],
    micro_batch: int,
    max_grad_norm: float,
    autocast: bool,
    stop: Callable[[], bool],
) -> Iterator[Step]:
    """Trains for `steps` (0-based) and yields each when it is finished.

    When `stop()` turns true it ends at the next micro-batch: the gradients of the step at hand are dropped and the
    random state is as it was before it, so that going on from the last finished step is bitwise what an uninterrupted
    run does.

    Raises:
        RunError: BAD_STEPS steps in a row had a loss or gradient that is no number.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    source, bad = iter(batches), 0
    model.train()
    for number in steps:
        start = time.perf_counter()
        if stop():
            return
        batch = next(source)
        random_state = torch.get_rng_state()
        supervised = batch.supervised
        optim.set_rate(optimizers, rate(number))
        # ------------------------------------------------------------------------------------- a single training step
        total = torch.zeros((), device=device, dtype=torch.float64)
        for first in range(0, len(batch), micro_batch):
            if stop():
                torch.set_rng_state(random_state)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                return
            rows = batch.rows(first, micro_batch)
            tensors = [torch.from_numpy(part).to(device) for part in (*rows.inputs, rows.labels)]
            with precision(device, autocast):
                part = loss(model, *tensors)
            (part / supervised).backward()  # type: ignore[no-untyped-call]
            total += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        mean, gradient_norm = float(total) / supervised, float(norm)
        skipped = not (math.isfinite(mean) and math.isfinite(gradient_norm))
        if not skipped:
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # ------------------------------------------------------------------------------------------------------------
        bad = bad + 1 if skipped else 0
        if bad == BAD_STEPS:
            raise RunError(
                f"the loss was no number for {bad} steps in a row (step {number + 1})",
                hint='lower learning_rate, or dtype = "fp32"',
            )
        lr = optimizers[0].param_groups[0]["lr"]
        yield Step(
            number + 1, mean, gradient_norm, lr, batch.tokens, time.perf_counter() - start, batch.position, skipped
        )


def precision(device: torch.device, autocast: bool) -> contextlib.AbstractContextManager[None]:
    """bf16 matrix products over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()


def compiled(
    loss: Loss, wanted: str | bool, flops: float, device: torch.device, kind: str = "decoder"
) -> tuple[Loss, bool, str]:
    """The loss, compiled where that pays: (loss, whether it is, why).

    "auto" compiles when the run is longer than about two minutes would take eagerly on this kind of device: a first
    compilation takes 30 to 60 s and makes a step 1.5 to 2 times faster.
    """
    if wanted is False:
        return loss, False, "eager: compile = false"
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return loss, False, "eager: no C++ compiler (Debian: apt-get install g++)"
    worth = 120 * (EAGER_FLOPS_CPU if device.type == "cpu" else EAGER_FLOPS_CUDA)
    if wanted == "auto" and flops < worth:
        return loss, False, "eager: too short a run for compiling to pay"
    if wanted == "auto" and kind == "recurrent":
        return loss, False, "eager: torch's LSTM is one kernel, which compiling leaves as it is"
    return torch.compile(loss, dynamic=False), True, "torch.compile"


EAGER_FLOPS_CPU = 150e9  # measured: 13.8 M parameters, bf16, eager, 2 threads
EAGER_FLOPS_CUDA = 50e12  # an assumption: a third of an A100's bf16 peak


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def live_text(step: Step, steps: int, quality: str) -> str:
    """The live line: what a person watching wants to know; `quality` is what the last validation found."""
    speed = step.tokens_per_second
    rate = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    parts = [
        f"step {step.number:,}/{steps:,}",
        f"loss {step.loss:.3f}",
        *([quality] if quality else []),
        f"lr {step.learning_rate:.2g}",
        f"{rate} tok/s",
        console.size(peak_memory()),
    ]
    return " · ".join(parts)
