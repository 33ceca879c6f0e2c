"""What this machine decides for a training: made once, stored with its resume state and used again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl import console, device, launch
from llmctl.artifact import Job, write_json
from llmctl.device import Device
from llmctl.recipe import FinetuneSection, PretrainSection, TrainingSection
from llmctl.training import compiling, distributed, outlook, watching
from llmctl.training.compiling import Compiling
from llmctl.training.objectives import Learner
from llmctl.training.planning import Plan

SHORT_FLOPS = 60 * 150e9  # a run with fewer takes about a minute on two cores, too little to spend 0.3 s on a yardstick


@dataclass(frozen=True)
class Choices:
    """What this machine decided. Made once, kept beside the checkpoints and used again on resume."""

    dtype: str
    dtype_reason: str
    compiled_since: int | None  # the step (0-based) from which it is compiled
    compile_reason: str
    threads: int
    micro_batch: int
    isa: tuple[str, ...]
    gemm: float = 0.0  # FLOP/s of the best matrix product in this dtype; 0 where it was not measured
    ranks: int = 1

    def describe(self) -> str:
        """`bf16 (avx512_bf16) · torch.compile`."""
        return f"{self.dtype} ({self.dtype_reason}) · {self.compile_reason}"

    @property
    def autocast(self) -> bool:
        """Whether evaluations multiply in bf16 too; with fp16 they are in fp32, which nothing overflows."""
        return self.dtype == "bf16"

    @property
    def opening(self) -> str:
        """What to say before the first step, where it is long in coming."""
        return "compiling: the first step takes up to a minute" if self.compiled_since is not None else ""


UNDECIDED = "compiled if the first steps say that it pays"


def choose(
    job: Job, section: PretrainSection | FinetuneSection, learner: Learner, plan: Plan, tokens: int = 0
) -> tuple[Choices, Compiling]:
    """The choices of this run, old ones where it was begun before, and what compiles it. Rank 0's hold for all.

    Args:
        tokens: of the whole run; in a short one nothing is measured.

    Raises:
        RecipeError: a batch that the ranks cannot share out.
    """
    launch.check_batch(plan.batch, "the derived global_batch_size")
    ranks = distributed.here(job.device.torch)
    micro_batch = outlook.micro_batch(job, section, learner.model.config, plan, ranks.size, learner.taught_by)
    with ranks.first_goes():
        return _choose(job, section, learner, plan, micro_batch, tokens)


def _choose(
    job: Job, section: TrainingSection, learner: Learner, plan: Plan, micro_batch: int, tokens: int
) -> tuple[Choices, Compiling]:
    path, config = job.work / "choices.json", learner.model.config
    dtype, why = job.device.dtype(section.dtype)
    impossible = compiling.possible(job.device.torch, config.kind)
    since: int | None = None
    torch.set_num_threads(job.device.threads)
    if (choices := _kept(path)) is not None:
        if choices.threads != job.device.threads or set(choices.isa) != job.device.isa:
            console.warn("this run was begun on another machine or with other threads: it goes on, but not bitwise")
        if section.micro_batch_size != "auto" and micro_batch != choices.micro_batch:
            console.warn(f"micro_batch_size {choices.micro_batch} -> {micro_batch}: it goes on, but not bitwise")
            choices = dataclasses.replace(choices, micro_batch=micro_batch)
        if choices.ranks != launch.size():
            choices = dataclasses.replace(choices, threads=job.device.threads, ranks=launch.size())
        since = choices.compiled_since
        undecided = section.compile == "auto" and choices.compile_reason == UNDECIDED and not impossible
        if section.compile != "auto":
            since = 0 if section.compile else None
    else:
        undecided = section.compile == "auto" and not impossible
        since = 0 if section.compile is True and not impossible else None
        reason = UNDECIDED if undecided else f"eager: {impossible or 'compile = false'}"
        choices = Choices(
            dtype,
            why,
            since,
            "torch.compile" if since == 0 else reason,
            job.device.threads,
            micro_batch,
            tuple(sorted(job.device.isa)),
            _gemm(job.device, dtype, tokens * watching.flops_per_token(config, plan.length)),
            launch.size(),
        )
        write_json(path, dataclasses.asdict(choices))
    torch.set_num_threads(choices.threads)
    repeatable(job.device)
    job.resolved |= {key: value for key, value in dataclasses.asdict(choices).items() if key not in ("isa", "gemm")}

    def decided(since: int | None, told: str) -> None:
        console.detail(told)
        made = {"compiled_since": since, "compile_reason": told}
        if launch.rank() == 0:
            write_json(path, json.loads(path.read_text()) | made)
        job.resolved |= made

    shape = (config, choices.micro_batch, plan.length, choices.dtype, choices.threads, choices.isa, job.device.name)
    return choices, Compiling(learner, plan.steps, compiling.key(*shape), since, undecided, decided)


def halved(job: Job, section: TrainingSection) -> Callable[[int], int] | None:
    """For `loop.train`: half of a micro-batch that was found automatically and is too large for the GPU after all. The
    choice is stored. None where the recipe says the size, or other ranks would have to follow.
    """
    if section.micro_batch_size != "auto" or launch.size() > 1:
        return None

    def half(size: int) -> int:
        path, smaller = job.work / "choices.json", size // 2
        console.warn(f"out of memory with {size} sequences at a time; going on with {smaller}")
        write_json(path, json.loads(path.read_text()) | {"micro_batch": smaller})
        job.resolved["micro_batch"] = smaller
        torch.cuda.empty_cache()
        return smaller

    return half


def repeatable(chosen: Device) -> None:
    """Has compiled code on a CPU add up the embedding's gradient in one order, not in that its threads arrive in."""
    if chosen.kind == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # its module's property


def _gemm(chosen: Device, dtype: str, flops: float) -> float:
    """What utilisation is measured against; 0 for a GPU whose maker says it, and where a run takes under a minute."""
    return 0.0 if chosen.listed is not None or flops < SHORT_FLOPS else device.gemm_rate(chosen.kind, dtype)


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
