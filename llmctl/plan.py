"""`llmctl plan`: what a training will cost, before it starts: parameters, tokens, operations, memory, time, and whether
it fits; if not, the smallest change that makes it fit.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmctl import console, device
from llmctl.device import GPUS, Device, Gpu
from llmctl.errors import UsageError
from llmctl.finetune import prune
from llmctl.finetune import stage as finetuning
from llmctl.model import config as shapes
from llmctl.model import hf, origin
from llmctl.model.config import Config
from llmctl.recipe import FinetuneSection, PretrainSection, TokenizerSection, seconds
from llmctl.target import Target
from llmctl.training import budget, footprint, outlook, planning, watching
from llmctl.training.footprint import ROOM, Memory, Training
from llmctl.training.outlook import Section
from llmctl.training.planning import Plan

UNKNOWN, NAME = "unknown", console.NAME_WIDTH + 2
RANKS = (2, 4, 8, 16, 32, 64)  # over which FSDP is tried


@dataclass(frozen=True)
class Found:
    """The plan of one training. None: nobody knows yet."""

    stage: str
    config: Config
    parameters: dict[str, int]
    made: Plan
    tokens: int | None  # of the whole run
    epochs: float | None
    memory: Memory
    training: Training
    room: float  # bytes
    fits: bool
    change: str  # what makes it fit, where it does not; empty where nothing does
    flops_per_token: float
    rate: float  # FLOP/s of all ranks
    why: str  # where the rate comes from
    unknown: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        return None if self.tokens is None else self.tokens * self.flops_per_token / self.rate


def plan_of(target: Target, chosen: Device, *, gpu: str = "", nproc: int = 1, mfu: float = 0.0) -> dict[str, Any]:
    """Shows the plan of each training of the recipe; returns the document for --json.

    Args:
        chosen: this machine's device, used unless `gpu` names a row of `device.GPUS`.
        mfu: the share of the device's peak that is expected; 0: `outlook.MFU`.

    Raises:
        UsageError: a GPU that is not known, or a recipe that trains nothing.
    """
    if gpu and gpu.lower() not in GPUS:
        raise UsageError(f"--gpu {gpu} is not known", hint=f"choose one of {', '.join(GPUS)}")
    names = [name for name in ("pretrain", "finetune") if getattr(target.recipe, name) is not None]
    if not names:
        raise UsageError(f"{target.recipe.file} trains nothing", hint="a plan is of [pretrain] and [finetune]")
    found = [_found(target, name, chosen, gpu.lower(), nproc, mfu) for name in names]
    for one in found:
        _show(one, gpu.lower() or chosen.describe(), nproc)
    return {one.stage: _document(one, gpu.lower() or chosen.kind, nproc) for one in found}


def _found(target: Target, name: str, chosen: Device, gpu: str, nproc: int, mfu: float) -> Found:
    section: Section = target.recipe.section(name)
    row, on_gpu = GPUS.get(gpu), bool(gpu) or chosen.kind == "cuda"
    dtype = chosen.dtype(section.dtype)[0] if row is None else _dtype(section.dtype, row.bf16)
    speed, why = _rate(chosen, row, dtype, mfu)
    config, unknown = _config(target)
    teacher = None
    if isinstance(section, FinetuneSection):
        teacher = _teacher(target, section, config)
        config = prune.shape(config, section) if section.prune == "structured" else config
    epoch = _epoch(target, section)
    if isinstance(section, PretrainSection) and section.time_budget:
        flops = seconds(section.time_budget) * speed * nproc
        if epoch is not None:
            start = config if target.recipe.section("model").source else None
            _, config = budget.best(target.recipe.section("model"), config.vocab_size, flops, epoch, start)
        tokens = flops / watching.flops_per_token(config, config.longest)
        end = {"epochs": tokens / epoch} if epoch is not None else {"max_steps": 1}
        section = section.model_copy(update={"time_budget": "", **end})
    made, more = _made(section, config, epoch)
    known = epoch is not None or (section.max_steps is not None and section.global_batch_size is not None)
    tokens_known = made.tokens if known else None
    room = ROOM * (row.memory if row is not None else device.free_memory(chosen.kind))
    mine = -(-made.batch // nproc)
    if on_gpu and section.micro_batch_size == "auto":
        made = dataclasses.replace(made, micro_batch=mine)
    wanted = outlook.training(section, config, made, dtype, on_gpu, nproc, teacher)
    fitting = outlook.fitting(wanted, mine, room) if section.micro_batch_size == "auto" else wanted
    training = fitting or dataclasses.replace(wanted, micro_batch=1, accumulates=mine > 1)
    memory = footprint.memory(training)
    fits = memory.total <= room
    return Found(
        stage=name,
        config=config,
        parameters=_parameters(config),
        made=made,
        tokens=tokens_known,
        epochs=made.tokens / epoch if epoch is not None else None,
        memory=memory,
        training=training,
        room=room,
        fits=fits,
        change="" if fits else _change(name, training, mine, room, nproc),
        flops_per_token=watching.flops_per_token(config, made.length, teacher=teacher),
        rate=speed * nproc,
        why=why,
        unknown=(*unknown, *more),
    )


def _rate(chosen: Device, row: Gpu | None, dtype: str, mfu: float) -> tuple[float, str]:
    """FLOP/s of one device, and where that comes from."""
    if row is not None:
        share = mfu or outlook.MFU["cuda"]
        return share * row.peak, f"{100 * share:.0f} % of the maker's {row.peak / 1e12:,.0f} TFLOP/s"
    share, gemm = mfu or outlook.MFU[chosen.kind], device.gemm_rate(chosen.kind, dtype)
    return share * gemm, f"{100 * share:.0f} % of the best matrix product, {gemm / 1e9:,.0f} GFLOP/s as measured"


def _dtype(wanted: str, bf16: bool) -> str:
    return wanted if wanted != "auto" else "bf16" if bf16 else "fp16"


def _config(target: Target) -> tuple[Config, list[str]]:
    """The shape of the model that is trained, and what of it is not known yet."""
    made, prep = target.recipe, target.run.artifact("prep")
    if made.model is not None and made.model.source:
        folder = target.run.artifact("import")
        path = folder.path if folder is not None else made.root / made.model.source
        if not (path / "config.json").is_file():
            raise UsageError(
                f"[model] from = {made.model.source!r} is not brought in yet, so its shape is not known",
                hint=f"llmctl import {made.model.source} --as {made.name}",
            )
        return hf.read_config(path), []
    if prep is not None:
        return shapes.derive(made.section("model"), int(prep.metrics["vocab_size"]))[0], []
    tokenizer = made.prep.tokenizer if made.prep is not None else TokenizerSection()
    size = shapes.likely_vocabulary(tokenizer)
    guessed = tokenizer.source or size != tokenizer.vocab_size
    unknown = [f"the vocabulary is known when prep has run; taken as {size:,} pieces"] if guessed else []
    return shapes.derive(made.section("model"), size)[0], unknown


def _teacher(target: Target, section: FinetuneSection, base: Config) -> Config | None:
    """The shape of the model that finetuning learns from, if there is one."""
    name = section.taught_by
    return base if name == "base" else hf.read_config(origin.find(name, target.recipe.root).path) if name else None


def _epoch(target: Target, section: Section) -> int | None:
    """Tokens to train on, where prep has run."""
    prep = target.run.artifact("prep") if isinstance(section, PretrainSection) else None
    return int(prep.metrics["train_tokens"]) if prep is not None else None


def _made(section: Section, config: Config, epoch: int | None) -> tuple[Plan, list[str]]:
    """Steps and batch, and what of them is not known."""
    length, cap, peak, unknown = config.longest, 0, 1e-3, list[str]()
    usual = max(1, planning.BATCH_TOKENS[0] // length)
    sequences = epoch // length if epoch is not None else 1
    if isinstance(section, FinetuneSection):
        length, cap = min(section.max_seq_length or length, length), finetuning.BATCH
        usual, sequences = cap, section.max_examples or 1
    if epoch is None:
        guess: dict[str, Any] = {}
        if section.global_batch_size is None:
            guess["global_batch_size"] = usual
            unknown.append(f"global_batch_size follows from the text; taken as {usual}")
        if section.max_steps is None:
            guess["max_steps"] = 1
            unknown.append("steps follow from the text")
        section = section.model_copy(update=guess)
    made = planning.make(section, sequences=sequences, length=length, width=config.hidden_size, peak=peak, cap=cap)
    return made, unknown


def _parameters(config: Config) -> dict[str, int]:
    """Trained values by part; a head that is the embedding itself is counted there."""
    found: Counter[str] = Counter()
    for name, parameter in hf.build(config).named_parameters():
        part = next((part for key, part in NAMES.items() if key in name), "other")
        found[part] += parameter.numel()
    return dict(found)


NAMES = {
    "norm": "norms",
    "embed_": "embeddings",
    "attn": "attention",
    "relative_bias": "attention",
    "mlp": "MLP",
    "lstm": "LSTM",
    "head": "head",
}


def _changes(name: str, training: Training, nproc: int) -> Iterator[tuple[str, Training]]:
    """What takes less memory, the least harm first: nothing but time, then more machines, then another model."""
    less = dataclasses.replace(training, checkpointing=True)
    keep = f"--set {name}.activation_checkpointing=true"
    yield keep, less
    if training.config.kind != "recurrent" and training.lora is None:
        for ranks in RANKS:
            if ranks > nproc or (ranks == nproc and training.strategy == "ddp"):
                sharded = dataclasses.replace(training, ranks=ranks, strategy="fsdp")
                yield f"--nproc {ranks} --set {name}.strategy=fsdp", sharded
                yield (
                    f"--nproc {ranks} --set {name}.strategy=fsdp {keep}",
                    dataclasses.replace(sharded, checkpointing=True),
                )
    length = training.length // 2
    while length >= 64:
        config = dataclasses.replace(training.config, max_position_embeddings=length + training.config.position_offset)
        yield f"{keep} --set model.max_seq_length={length}", dataclasses.replace(less, config=config, length=length)
        length //= 2


def _change(name: str, training: Training, batch: int, room: float, nproc: int) -> str:
    """The first of `_changes` that fits, as arguments, with the micro-batch that it fits with."""
    if training.micro_batch > 1 and (small := outlook.fitting(training, batch, room)) is not None:
        return f"--set {name}.micro_batch_size={small.micro_batch}"
    for told, smaller in _changes(name, training, nproc):
        if outlook.fitting(dataclasses.replace(smaller, micro_batch=1, accumulates=batch > 1), batch, room) is not None:
            return told
    return ""


def _show(found: Found, where: str, nproc: int) -> None:
    made, config, count, training = found.made, found.config, console.count, found.training
    layers = f"{config.num_hidden_layers}" + (f" + {config.num_decoder_layers}" if config.num_decoder_layers else "")
    total = sum(found.parameters.values())
    many = f" x {nproc}" if nproc > 1 else ""
    console.stage(found.stage, f"{layers} layers x {config.hidden_size}, {count(total)} parameters · {where}{many}")
    steps = f"{made.steps:,} steps of" if found.tokens is not None else "steps of"
    epochs = f", {found.epochs:.2g} epochs" if found.epochs is not None else ""
    flops = f"{(found.tokens or 0) * found.flops_per_token:.2e}" if found.tokens is not None else UNKNOWN
    at_once = f"{training.micro_batch} of {-(-made.batch // nproc)} sequences at a time"
    held = "there" if training.gpu else f"free; malloc may hold up to {footprint.HOLES:g} times what is planned"
    rows = [
        ("parameters", count(total), _listed(found.parameters, count)),
        (
            "tokens",
            count(found.tokens) if found.tokens is not None else UNKNOWN,
            f"{steps} {made.batch} x {made.length}{epochs}",
        ),
        ("operations", flops, f"{found.flops_per_token:.3g} a token: 6 for each parameter, and attention's"),
        ("memory", console.size(found.memory.total), _listed(found.memory.parts, console.size)),
        (
            "",
            "",
            f"{at_once}, {training.dtype}, {training.optimizer}, not compiled{', on each rank' if nproc > 1 else ''}",
        ),
        ("time", console.duration(found.seconds) if found.seconds is not None else UNKNOWN, found.why),
        (
            "fits",
            "yes" if found.fits else "no",
            f"{console.size(found.room)} may be used, {100 * ROOM:.0f} % of what is {held}",
        ),
    ]
    console.columns(rows, indent=NAME)
    if not found.fits:
        mend = f"this would: {found.change}" if found.change else "a smaller model would (--set model.depth=...)"
        console.warn(f"{found.stage} does not fit; {mend}")
    for unknown in found.unknown:
        console.note(unknown)


def _listed(parts: dict[str, int], told: Any) -> str:
    return " · ".join(f"{part} {told(value)}" for part, value in parts.items() if value)


def _document(found: Found, where: str, nproc: int) -> dict[str, Any]:
    made = found.made
    return {
        "device": where,
        "ranks": nproc,
        "parameters": sum(found.parameters.values()),
        "parameters_by_part": found.parameters,
        "tokens": found.tokens,
        "epochs": found.epochs,
        "steps": made.steps if found.tokens is not None else None,
        "global_batch_size": made.batch,
        "micro_batch_size": found.training.micro_batch,
        "sequence_tokens": made.length,
        "dtype": found.training.dtype,
        "flops_per_token": found.flops_per_token,
        "flops": None if found.tokens is None else found.tokens * found.flops_per_token,
        "memory_bytes": found.memory.total,
        "memory_by_part": found.memory.parts,
        "room_bytes": found.room,
        "fits": found.fits,
        "change": found.change,
        "flops_per_second": found.rate,
        "rate": found.why,
        "seconds": found.seconds,
        "unknown": list(found.unknown),
    }
