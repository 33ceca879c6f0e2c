"""What a training run will do, derived from the recipe and the data, with the formula of every derived value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from llmctl.recipe import TrainingSection
from llmctl.training import optim

# Small runs are limited by the number of updates, not by the noise of their gradients. The batch up to which more of it
# saves steps grows with the data and hardly with the model (Zhang et al. 2024, arXiv:2410.21676).
STEPS_WANTED = 400
BATCH_TOKENS = (2_048, 524_288)
MICRO_TOKENS = 8_192  # tokens at a time on a CPU: past this, activations leave the caches and nothing gets faster
EVALUATIONS, CHECKPOINTS = 10, 10
# An LSTM wants larger steps than a transformer of its width: 60 and 300 steps of recipes/tiny.toml are best at 5 to 10
# times its rate with Muon, and at 5 with AdamW.
GAIN = {"recurrent": 6.0}


@dataclass(frozen=True)
class Plan:
    """The run, in optimiser steps and sequences."""

    steps: int
    batch: int  # sequences a step
    micro_batch: int
    length: int  # tokens a sequence
    learning_rate: float
    warmup: int
    eval_every: int
    save_every: int
    rate: Callable[[int], float]  # step -> share of the peak learning rate
    formulas: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Positions the whole run trains on."""
        return self.steps * self.batch * self.length


def make(section: TrainingSection, *, sequences: int, length: int, width: int, peak: float, cap: int = 0) -> Plan:
    """The plan for `sequences` training sequences of `length` tokens an epoch.

    `peak` is the learning rate of a model 256 wide; wider models take less (muP, Yang et al. 2022, arXiv:2203.03466:
    1/width for hidden matrices under Adam; square root here, as embeddings and norms share the rate). `cap`: most
    sequences a step.
    """
    told: list[str] = []
    epochs = section.epochs or 1.0
    total = sequences * epochs
    batch = section.global_batch_size or 0
    if not batch:
        wanted = min(max(total * length / STEPS_WANTED, BATCH_TOKENS[0]), BATCH_TOKENS[1])
        batch = max(1, min(2 ** math.floor(math.log2(wanted)) // length, cap or sequences, sequences))
        told.append(
            f"global_batch_size {batch} = tokens / {STEPS_WANTED} steps, at least {BATCH_TOKENS[0]:,} tokens, a "
            f"power of two"
        )
    steps = section.max_steps
    if steps is None:
        steps = max(1, round(total / batch))
        told.append(f"max_steps {steps:,} = {sequences:,} sequences x {epochs:g} epochs / {batch}")
    rate = section.learning_rate or 0.0
    if not rate:
        rate = float(f"{peak * math.sqrt(256 / width):.2g}")
        told.append(f"learning_rate {rate:g} = {peak:g} x sqrt(256 / width)")
    warmup = section.warmup_steps if section.warmup_steps is not None else min(max(10, steps // 50), max(1, steps // 4))
    if section.warmup_steps is None:
        told.append(f"warmup_steps {warmup} = 2 % of the steps, at least 10, at most a quarter")
    if section.micro_batch_size != "auto":
        micro = min(section.micro_batch_size, batch)
    else:
        micro = next(size for size in range(min(batch, max(1, MICRO_TOKENS // length)), 0, -1) if batch % size == 0)
    eval_every = section.eval_every if section.eval_every is not None else max(1, steps // EVALUATIONS)
    save_every = section.save_every if section.save_every is not None else max(1, steps // CHECKPOINTS)

    def share(step: int) -> float:
        return optim.schedule(
            step,
            kind=section.lr_scheduler,
            steps=steps,
            warmup=warmup,
            decay_ratio=section.decay_ratio,
            floor=section.min_lr_ratio,
        )

    return Plan(steps, batch, micro, length, rate, warmup, eval_every, save_every, share, told)
