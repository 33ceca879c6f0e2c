"""What a training is expected to take, said when it begins and compared with what it took when it ends."""

from __future__ import annotations

import dataclasses
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from llmctl import console, device, launch
from llmctl.artifact import Job
from llmctl.device import Device
from llmctl.model.config import Config
from llmctl.recipe import FinetuneSection, PretrainSection
from llmctl.training import footprint, loop, watching
from llmctl.training.checkpoint import State
from llmctl.training.footprint import HOLES, ROOM, Memory, Training
from llmctl.training.planning import Plan

Section = PretrainSection | FinetuneSection
# Assumed where nothing was measured: of a maker's peak, a little less than well-tuned trainings of large models reach
# (PaLM 0.46, Chowdhery et al. 2022, arXiv:2204.02311, table 3); of a CPU's best matrix product, what small models do
# eagerly (13.8 M parameters: 150e9 FLOP/s on two threads in bf16); and that product's FLOP/s a thread.
MFU = {"cuda": 0.4, "cpu": 0.4}
GEMM = {"fp32": 60e9, "bf16": 190e9, "fp16": 60e9}


def training(
    section: Section,
    config: Config,
    made: Plan,
    dtype: str,
    gpu: bool,
    ranks: int = 1,
    teacher: Config | None = None,
) -> Training:
    """What decides the memory of a recipe's training step, on each of so many ranks."""
    adapters, sparse = None, False
    if isinstance(section, FinetuneSection):
        adapters = (section.lora_r, section.lora_target_modules) if section.method == "lora" else None
        sparse = section.is_sparse
    mine = -(-made.batch // ranks)
    return Training(
        config,
        made.length,
        min(made.micro_batch, mine),
        dtype,
        section.optimizer,
        average=section.ema_decay > 0,
        checkpointing=section.activation_checkpointing,
        accumulates=made.micro_batch < mine,
        saves=0 < made.save_every < made.steps,
        gpu=gpu,
        ranks=ranks,
        strategy=section.strategy,
        lora=adapters,
        sparse=sparse,
        teacher=teacher,
    )


def fitting(wanted: Training, batch: int, room: float) -> Training | None:
    """With the largest micro-batch, no larger than wanted and one that divides `batch`, whose step takes at most `room`
    bytes; None where not even one sequence at a time does.
    """
    sizes = [size for size in range(1, wanted.micro_batch + 1) if batch % size == 0] or [1]

    def of(size: int) -> Training:
        return dataclasses.replace(wanted, micro_batch=size, accumulates=size < batch)

    if (least := footprint.memory(of(sizes[0])).total) > room:
        return None
    while (size := sizes[-1]) > sizes[0]:
        if (most := footprint.memory(of(size)).total) <= room:
            break
        # a sequence takes about the same in each size, so sizes twice as large as would just fit need no look
        likely = 1 + (size - 1) * (room - least) / (most - least)
        sizes = [smaller for smaller in sizes[:-1] if smaller <= 2 * likely]
    return of(sizes[-1])


def rate(chosen: Device, dtype: str, gemm: float = 0.0) -> tuple[float, str]:
    """FLOP/s that a training is expected to do on one device, and where that comes from; `gemm` was measured."""
    share = MFU[chosen.kind]
    if (known := chosen.listed) is not None:
        return share * known.peak, f"{100 * share:.0f} % of the maker's peak"
    best = gemm or GEMM[dtype] * chosen.threads
    return share * best, f"{100 * share:.0f} % of the best matrix product" + ("" if gemm else ", assumed")


def memory_now() -> int:
    """Bytes that this process holds, or has allocated on its GPU; its peak counts anew from here."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):  # no Linux: the peak is that of the whole process
        return loop.peak_memory()
    return pages * resource.getpagesize()


@dataclass(frozen=True)
class Outlook:
    """What one training is expected to take."""

    memory: Memory
    seconds: float
    before: int  # bytes that the process held before the model was built

    def compare(self, state: State) -> dict[str, float]:
        """Says how what happened compares, and gives it as metrics."""
        held = max(0, loop.peak_memory() - self.before)
        console.detail(
            f"planned {console.size(self.memory.total)} and {console.duration(self.seconds)}; the steps took "
            f"{console.duration(state.seconds)}, the process {console.size(held)}, evaluations and free pages included"
        )
        return {"planned_memory_bytes": self.memory.total, "memory_bytes": held, "planned_seconds": self.seconds}


def micro_batch(
    job: Job, section: Section, config: Config, made: Plan, ranks: int = 1, teacher: Config | None = None
) -> int:
    """Sequences at a time: as the recipe says, or the most that keep the speed and fit in ROOM of the free memory.

    What keeps the speed on a CPU is `planning.MICRO_TOKENS`; a GPU takes all of the batch that it can. Where a CPU's
    memory is too short for the holes of malloc's heap, freed memory is given back at once (`footprint.give_back`).
    """
    if section.micro_batch_size != "auto":
        return made.micro_batch
    on_gpu, mine = job.device.kind == "cuda", -(-made.batch // ranks)
    if on_gpu:
        made = dataclasses.replace(made, micro_batch=mine)
    free = ROOM * device.free_memory(job.device.kind)
    wanted = training(section, config, made, job.device.dtype(section.dtype)[0], on_gpu, ranks, teacher)
    if not free:
        return wanted.micro_batch
    found = fitting(wanted, mine, free if on_gpu else free / HOLES)
    if found is None and not on_gpu and (found := fitting(wanted, mine, free)) is not None and footprint.give_back():
        console.note("memory is short: what is freed goes back to the system at once, which costs time")
    if found is None:
        least = footprint.memory(dataclasses.replace(wanted, micro_batch=1, accumulates=mine > 1)).total
        console.warn(
            f"one sequence at a time takes {console.size(least)}, and {console.size(free)} may be used: "
            "llmctl plan says what would make it fit"
        )
        return 1
    return found.micro_batch


def begin(
    job: Job,
    section: Section,
    config: Config,
    made: Plan,
    size: int,
    gemm: float,
    tokens: int,
    before: int,
    teacher: Config | None = None,
) -> Outlook:
    """Says what the training will take.

    Args:
        size: of a micro-batch. gemm: FLOP/s of the best matrix product, 0 if not measured. tokens: of the whole run.
        before: of `memory_now` before the model was built.
    """
    if section.max_steps is not None and section.epochs is not None:
        console.warn(f"max_steps = {section.max_steps:,} counts; epochs = {section.epochs:g} is not looked at")
    on_gpu = job.device.kind == "cuda"
    dtype, ranks = job.device.dtype(section.dtype)[0], launch.size()
    made = dataclasses.replace(made, micro_batch=size)
    memory = footprint.memory(training(section, config, made, dtype, on_gpu, ranks, teacher))
    speed, why = rate(job.device, dtype, gemm)
    if (budget := job.resolved.get("time_budget")) is not None:
        speed, why = budget["speed"], "the speed that the time budget was planned with"
    seconds = tokens * watching.flops_per_token(config, made.length, teacher=teacher) / (speed * ranks)
    parts = (f"{part} {console.size(held)}" for part, held in memory.parts.items() if held)
    kept = "" if on_gpu or footprint.returns else f", up to {console.size(HOLES * memory.total)} with what malloc keeps"
    rank = " a rank" if ranks > 1 else ""
    console.detail(f"memory {console.size(memory.total)}{rank} ({' · '.join(parts)}){kept}")
    console.detail(f"about {console.duration(seconds)} at {why}")
    return Outlook(memory, seconds, before)
