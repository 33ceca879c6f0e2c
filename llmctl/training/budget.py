"""`[pretrain] time_budget`: how deep a model and how many tokens make the most of some minutes on this machine.

Depth and tokens are those with the lowest loss by a scaling law, among the models that can be trained in the time. The
law is Chinchilla's (Hoffmann et al. 2022, arXiv:2203.15556, approach 3) with the constants of Besiroglu et al. 2024
(arXiv:2404.10102), who mended its fit; text that is read again counts less each time (Muennighoff et al. 2023,
arXiv:2305.16264, equation 5). Both were fitted on models of 10 M parameters and more: below that they are extrapolated,
and what they are trusted with here is only which of two models is better at one cost, a wide and shallow minimum.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from llmctl import console, device, launch
from llmctl.artifact import Job, write_json
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.recipe import ModelSection, PretrainSection, seconds
from llmctl.training import compiling, footprint, loop, optim, outlook, planning, watching
from llmctl.training.batch import Batch
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision

DEPTHS = range(2, 33)
LOSS, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658  # Besiroglu et al. 2024, table 1
REPEATS = 15.39  # R*_D of Muennighoff et al.: past so many readings more, another one teaches next to nothing
MANY_EPOCHS = 4  # up to here it teaches nearly as much as new text (ibid., section 6)
BETWEEN = 0.05  # of the time is spent between steps: evaluations, samples, checkpoints
MEASURED = 3  # steps; the first warms up


@dataclass(frozen=True)
class Chosen:
    """What a time budget became; made once and stored beside the checkpoints, as every choice that a clock makes."""

    depth: int | None  # None: the recipe says the shape
    epochs: float
    speed: float  # FLOP/s of a device, as measured
    told: str


def settle(job: Job, vocabulary: int, unique: int) -> Job:
    """The job with a depth and epochs in place of its time budget.

    Args:
        vocabulary: pieces. unique: tokens of training text at hand.
    """
    path, section = job.work / "budget.json", job.recipe.section("pretrain")
    if path.exists():
        chosen = Chosen(**json.loads(path.read_text()))
    else:
        chosen = choose(job, vocabulary, unique)
        write_json(path, dataclasses.asdict(chosen))
    console.detail(chosen.told)
    if chosen.epochs > MANY_EPOCHS:
        console.warn(
            f"{chosen.epochs:.1f} epochs: past {MANY_EPOCHS}, text that is read again teaches less and less; more text "
            "or less time would do better, and --set model.dropout=0.1 keeps it from being learned by heart"
        )
    model = job.recipe.section("model")
    made = {
        "pretrain": section.model_copy(update={"epochs": chosen.epochs, "time_budget": ""}),
        "model": model if chosen.depth is None else model.model_copy(update={"depth": chosen.depth}),
    }
    job.resolved["time_budget"] = dataclasses.asdict(chosen)
    return dataclasses.replace(job, recipe=job.recipe.model_copy(update=made))


def choose(job: Job, vocabulary: int, unique: int) -> Chosen:
    """Measures the machine and picks: by its best matrix product which depth, then by steps of that model how far."""
    section, model = job.recipe.section("pretrain"), job.recipe.section("model")
    torch.set_num_threads(job.device.threads)
    dtype = job.device.dtype(section.dtype)[0]
    start = hf.read_config(job.inputs["model"].path) if model.source else None
    time = seconds(section.time_budget) * (1 - BETWEEN) * launch.size()
    speed, _ = outlook.rate(job.device, dtype, _gemm(job, dtype))
    _, config = best(model, vocabulary, time * speed, unique, start)
    speed = _measure(job, section, config, dtype)
    compiles = section.compile is not False and not compiling.possible(job.device.torch, config.kind)
    if compiles and time > 4 * compiling.SECONDS:
        speed, time = speed * compiling.GAIN, time - compiling.SECONDS * launch.size()
    depth, config = best(model, vocabulary, time * speed, unique, start)
    tokens = time * speed / watching.flops_per_token(config, config.longest)
    count, parameters = console.count, config.parameters
    told = (
        f"time_budget {section.time_budget} = {config.num_hidden_layers} layers x {config.hidden_size}, "
        f"{count(tokens)} tokens: {speed / 1e9:,.0f} GFLOP/s as measured, {tokens / parameters:.2g} tokens for each of "
        f"{count(parameters)} parameters, {tokens / unique:.2g} epochs"
    )
    return Chosen(depth, tokens / unique, speed, told)


def best(
    model: ModelSection, vocabulary: int, flops: float, unique: int, start: Config | None = None
) -> tuple[int | None, Config]:
    """The depth, and the model of it, that so many operations train best; the recipe's own where it says a depth, or
    `start`, the shape of the model that it starts from.
    """
    if start is not None or model.depth or model.num_hidden_layers:
        return None, start or shapes.derive(model, vocabulary)[0]
    found: list[tuple[float, int, Config]] = []
    for depth in DEPTHS:
        config = shapes.derive(model.model_copy(update={"depth": depth}), vocabulary)[0]
        found.append((loss(config, flops, unique), depth, config))
        if len(found) > 3 and min(found, key=lambda row: row[0])[1] <= depth - 3:  # from here on it only gets worse
            break
    _, depth, config = min(found, key=lambda row: row[0])
    return depth, config


def loss(config: Config, flops: float, unique: int) -> float:
    """What the law expects of a model that so many operations train, in nats a token of the law's own text."""
    tokens = flops / watching.flops_per_token(config, config.longest)
    again = max(0.0, tokens / unique - 1)
    worth = min(tokens, unique) + unique * REPEATS * (1 - math.exp(-again / REPEATS))
    return float(LOSS + A / config.parameters**ALPHA + B / worth**BETA)


def _gemm(job: Job, dtype: str) -> float:
    return 0.0 if job.device.listed is not None else device.gemm_rate(job.device.kind, dtype)


def _measure(job: Job, section: PretrainSection, config: Config, dtype: str) -> float:
    """FLOP/s of eager steps of this model on random tokens, one micro-batch each."""
    size = max(1, planning.MICRO_TOKENS // config.longest)
    model, random = hf.random(config, 0).to(job.device.torch), np.random.default_rng(0)
    lengths = footprint.lengths(config, config.longest)
    read = [random.integers(0, config.vocab_size, (size, tokens)) for tokens in lengths]
    batch = Batch(tuple(read), read[-1])
    optimizers = optim.build(model, section.optimizer, 1e-5, dtype=dtype)
    steps = loop.train(
        Learner(model),
        optimizers,
        iter([batch] * MEASURED),
        steps=range(MEASURED),
        rate=lambda _: 1.0,
        micro_batch=size,
        max_grad_norm=section.max_grad_norm,
        precision=Precision(job.device.torch, dtype),
        stop=lambda: False,
    )
    took = [step.seconds for step in steps]
    return float(watching.flops_per_token(config, config.longest) * batch.tokens / min(took[1:]))
