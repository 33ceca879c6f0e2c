"""`llmctl bench train`: how fast a recipe's training step is here, without its text.

The step is the real one (`training.loop.train`, with the recipe's optimiser, micro-batch and clipping) on random tokens
of the recipe's vocabulary and shape: what a step costs does not depend on which tokens they are.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llmctl import console, device
from llmctl.device import Device
from llmctl.errors import RecipeError
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.pretrain import stage
from llmctl.recipe import Recipe, TokenizerSection
from llmctl.training import choices, compiling, corruption, loop, objectives, optim, planning, watching
from llmctl.training.batch import IGNORED, Batch, ahead
from llmctl.training.compiling import Compiling
from llmctl.training.objectives import Learner
from llmctl.training.precision import LossScale, Precision

WARMUP = 3  # steps that are not counted: the first compiles, the next ones fill caches
MEASURED, SECONDS = 8, 5.0  # at least so many steps, for at least so long
BATCH_TOKENS = 8_192  # a step, where the recipe leaves global_batch_size to the text


def train(recipe: Recipe, chosen: Device) -> dict[str, Any]:
    """Trains `[model]` for some seconds.

    Returns:
        tokens_per_second: the median over the measured steps.
        first_step_seconds: of the first, compiling included.
        gflops: what the median does a second, in 10^9 operations, by `watching.flops_per_token`.
        gemm_share: that over the best bf16 matrix product that this process measured; `gemm_share_of_dtype`: over the
            best in the dtype used; `gemm_gflops`: both rates. `mfu`: over the maker's figure, of a GPU that is known.
        peak_memory_bytes: of the process, or of the GPU.
        And what was measured: model, parameters, dtype, compile, batch, threads, machine.
    """
    section = recipe.section("pretrain")
    config = _shape(recipe)
    length = config.longest
    batch = section.global_batch_size or max(1, BATCH_TOKENS // length)
    dtype, why = chosen.dtype(section.dtype)
    torch.set_num_threads(chosen.threads)
    choices.repeatable(chosen)
    model = hf.random(config, recipe.seed).to(chosen.torch)
    plan = planning.make(
        section.model_copy(update={"global_batch_size": batch, "max_steps": section.max_steps or 1000}),
        sequences=batch,
        length=length,
        width=config.hidden_size,
        peak=stage.PEAK[section.optimizer],
    )
    learner = Learner(model)
    impossible = compiling.possible(chosen.torch, config.kind)
    compiled = section.compile is True or (section.compile == "auto" and not impossible)
    rates = _rates(chosen, dtype)
    told = f"{console.count(config.parameters)} parameters · {batch} x {length} tokens a step · {dtype} ({why})"
    console.stage("bench", f"{told} · {'torch.compile' if compiled else 'eager'}")
    opening = "compiling: the first step takes up to a minute" if compiled else ""
    adjusted = {"beta2": section.adam_beta2, "dtype": dtype}
    optimizers = optim.build(model, section.optimizer, plan.learning_rate, section.weight_decay, **adjusted)
    Compiling(learner, 0, compiling.key("bench"), 0 if compiled else None, False, lambda *_: None).begin(0)
    steps = loop.train(
        learner,
        optimizers,
        ahead(_batches(config, batch, length)),
        steps=range(plan.steps + 1000),
        rate=plan.rate,
        micro_batch=plan.micro_batch,
        max_grad_norm=section.max_grad_norm,
        precision=Precision(chosen.torch, dtype),
        stop=lambda: False,
        scale=LossScale() if dtype == "fp16" else None,
    )
    first, times = 0.0, []
    with console.progress("bench", unit="steps", opening=opening) as live:
        begun = time.perf_counter()
        for step in steps:
            live.update(step.number, f"step {step.number} · {console.count(step.tokens_per_second)} tok/s")
            if step.number == 1:
                first = step.seconds
            elif step.number > WARMUP:
                times.append(step.seconds / step.tokens)
            else:
                begun = time.perf_counter()
            if len(times) >= MEASURED and time.perf_counter() - begun >= SECONDS:
                break
    rates = {name: max(rate, rates[name]) for name, rate in _rates(chosen, dtype).items()}
    return _figures(config, chosen, dtype, first, 1 / statistics.median(times), rates) | {
        "compile": compiled,
        "optimizer": section.optimizer,
        "batch": {"sequences": batch, "tokens_each": length, "micro_batch": plan.micro_batch},
        "steps": len(times),
    }


def _shape(recipe: Recipe) -> Config:
    section = recipe.section("model")
    tokenizer = recipe.prep.tokenizer if recipe.prep is not None else TokenizerSection()
    if section.source:
        folder = recipe.root / section.source
        if not (folder / "config.json").is_file():
            raise RecipeError(
                f"[model] from = {section.source!r}: bench train takes a shape or a Hugging Face folder",
                hint="name its folder, or --set model.from='\"\"' for the shape that [model] gives",
            )
        return hf.read_config(folder)
    return shapes.derive(section, shapes.likely_vocabulary(tokenizer))[0]


def _batches(config: Config, size: int, length: int) -> Iterator[Batch]:
    """Random tokens, framed as the kind of model learns them."""
    random = np.random.default_rng(0)
    for position in itertools.count(size, size):
        ids = random.integers(0, config.vocab_size, (size, length + 1))
        if config.kind == "encoder":
            yield Batch((ids[:, :-1],), np.where(random.random((size, length)) < 0.15, ids[:, :-1], IGNORED), position)
        elif config.kind == "encoder-decoder":
            marks = np.arange(corruption.span_count(length))
            pairs = [corruption.spans(row, random, sentinels=marks, eos=0) for row in ids[:, :-1]]
            read, labels = (np.stack(part) for part in zip(*pairs, strict=True))
            yield Batch((read, objectives.shifted(labels, 0)), labels, position)
        else:
            yield Batch((ids[:, :-1],), ids[:, 1:], position)


def _rates(chosen: Device, dtype: str) -> dict[str, float]:
    return {name: device.gemm_rate(chosen.kind, name) for name in dict.fromkeys(("bf16", dtype))}


def _figures(
    config: Config, chosen: Device, dtype: str, first: float, speed: float, rates: dict[str, float]
) -> dict[str, Any]:
    flops = speed * watching.flops_per_token(config, config.longest)
    known = chosen.listed
    return {
        "tokens_per_second": speed,
        "first_step_seconds": first,
        "gflops": flops / 1e9,
        "gemm_share": flops / rates["bf16"],
        "gemm_share_of_dtype": flops / rates[dtype],
        "gemm_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        **({} if known is None else {"mfu": flops / known.peak}),
        "peak_memory_bytes": loop.peak_memory(),
        "model": f"{config.family}, {config.num_hidden_layers} layers x {config.hidden_size}",
        "parameters": config.parameters,
        "vocabulary": config.vocab_size,
        "dtype": dtype,
        "threads": chosen.threads,
        "machine": chosen.name,
    }


def show(found: dict[str, Any]) -> None:
    """The figures as a small table."""
    gemm = " · ".join(f"{rate:,.0f} {name}" for name, rate in found["gemm_gflops"].items())
    rows = [
        ["tokens a second", f"{found['tokens_per_second']:,.0f}", f"median of {found['steps']} steps"],
        ["first step", console.duration(found["first_step_seconds"]), "compiling included" if found["compile"] else ""],
        ["GFLOP/s", f"{found['gflops']:,.0f}", f"{100 * found['gemm_share']:.0f} % of the best bf16 product here"],
        ["GEMM", gemm, "GFLOP/s, measured in this process"],
        ["peak memory", console.size(found["peak_memory_bytes"]), ""],
    ]
    if "mfu" in found:
        rows.insert(3, ["MFU", f"{100 * found['mfu']:.0f} %", "of the maker's dense peak"])
    console.columns(rows)
