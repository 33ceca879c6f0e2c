"""The training step: an iterator of finished steps over plain arguments. The stage that runs it writes the rare
events.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from llmctl.training import distributed, movement, optim, randomness
from llmctl.training.batch import Batch
from llmctl.training.distributed import ALONE, Ranks
from llmctl.training.ema import Ema
from llmctl.training.guard import Guard, OnSpike
from llmctl.training.precision import LossScale, Precision


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
    skipped: bool = False  # a NaN, an Inf or a leap of the loss: the weights were left alone
    update_norm: float | None = None  # of what the step changed, over that of the weights; measured now and then

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def every(self, steps: int) -> bool:
        """Whether it is one of every so many; 0 is never."""
        return steps > 0 and self.number % steps == 0


def train(
    learner: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterable[Batch],
    *,
    steps: range,
    rate: Callable[[int], float],
    micro_batch: int,
    max_grad_norm: float,
    precision: Precision,
    stop: Callable[[], bool],
    measure_every: int = 0,
    scale: LossScale | None = None,
    ranks: Ranks = ALONE,
    guard: Guard | None = None,
    on_spike: OnSpike = "skip",
    roll_back: Callable[[], int | None] = lambda: None,
    halved: Callable[[int], int] | None = None,
    ema: Ema | None = None,
) -> Iterator[Step]:
    """Trains for `steps` (0-based) and yields each when it is finished.

    When `stop()` turns true it ends at the next micro-batch: the gradients of the step at hand are dropped and the
    random state is as it was before it, so that going on from the last finished step is bitwise what an uninterrupted
    run does.

    Args:
        learner: `objectives.Learner`, or what DDP or FSDP made of it.
        micro_batch: sequences at a time, on each of the `ranks`.
        scale: of the loss, with fp16; its numbers belong to the resume state, as the guard's do.
        measure_every: of every so many steps, `Step.update_norm`; 0: of none.
        roll_back: loads the last checkpoint and returns the step (0-based) to go on with, if there is one.
        halved: says which micro-batch to go on with where one is too large for the GPU; asked in the first step alone.

    Raises:
        RunError: see `Guard.judge`.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    source, number, guard = iter(batches), steps.start, guard or Guard()
    learner.train()
    seed = torch.initial_seed()
    while number < steps.stop:
        start = time.perf_counter()
        if ranks.any(stop()):
            return
        batch = next(source)
        mine = ranks.mine(batch)
        drawn = randomness.states(precision.device)
        ranks.stir(seed, number)
        share = (1.0 if scale is None else scale.scale) / batch.supervised
        optim.set_rate(optimizers, rate(number))
        # ------------------------------------------------------------------------------------- a single training step
        total = torch.zeros((), device=precision.device, dtype=torch.float64)
        first = 0
        while first < len(mine):
            if ranks.any(stop()):
                randomness.put_back(drawn, precision.device)
                _forget(optimizers)
                return
            tensors, named = mine.rows(slice(first, first + micro_batch)).tensors(precision.device)
            try:
                with distributed.accumulating(learner, last=first + micro_batch >= len(mine)):
                    with precision.autocast():
                        part = learner(*tensors, **named)
                    (part * share).backward()
            except torch.OutOfMemoryError:
                if halved is None or number > steps.start or micro_batch == 1:
                    raise
                randomness.put_back(drawn, precision.device)
                _forget(optimizers)
                micro_batch, first = halved(micro_batch), 0
                total.zero_()
                continue
            total += part.detach()
            first += micro_batch
        if scale is not None:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / scale.scale)
        norm = distributed.clip(parameters, max_grad_norm or math.inf)
        mean, gradient_norm = float(ranks.total(total)) / batch.supervised, float(norm)
        verdict = guard.judge(mean, gradient_norm, on_spike)
        update_norm = None
        if verdict == "step":
            before = movement.snapshot(parameters) if measure_every and (number + 1) % measure_every == 0 else None
            for optimizer in optimizers:
                optimizer.step()
            if before is not None:
                change, weight = ranks.total(movement.movement(parameters, before).to(precision.device)).tolist()
                update_norm = math.sqrt(change / weight) if weight else None
            if ema is not None:
                ema.follow(number + 1)
        _forget(optimizers)
        # ------------------------------------------------------------------------------------------------------------
        if scale is not None:
            scale.follow(overflowed=not math.isfinite(gradient_norm))
        if verdict == "roll back" and (back := roll_back()) is not None:
            number = back
            continue
        number += 1
        lr, seconds, skipped = optimizers[0].param_groups[0]["lr"], time.perf_counter() - start, verdict != "step"
        yield Step(number, mean, gradient_norm, lr, batch.tokens, seconds, batch.position, skipped, update_norm)


def _forget(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes: of its GPU where it has used one, else of the machine."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
