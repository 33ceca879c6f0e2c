"""`llmctl bench decode`: how fast a model writes here, in torch and in each form it was exported in.

Each variant runs in a process of its own (`worker.py`). Everything is measured in rounds, and in a round the variants
take turns, so that whatever else the machine does falls on all of them; the figures are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmctl import chain, console, device
from llmctl.artifact import MANIFEST, Artifact, Run
from llmctl.bench import traffic
from llmctl.device import Device
from llmctl.errors import DataError, RunError
from llmctl.inference.onnx_runner import GRAPH
from llmctl.inference.onnx_seq2seq import DECODER
from llmctl.model import hf
from llmctl.model.config import Config

ROUNDS = 3
READ, PROMPT, WRITE = 256, 16, 128  # tokens: of the prompt that is timed, and of a prompt and its answer
BATCHES = (2, 4, 8, 16)
SWEEP = 32  # tokens a row in a batch
SECONDS = 5.0  # that one measurement of decoding takes at most
SPARE = 3  # of the free memory, 1/SPARE is for weights if all variants are to be loaded at once
WEIGHTS = (".safetensors", ".onnx", ".data", ".gguf", ".bin", ".engine", ".plan")


@dataclass(frozen=True)
class Variant:
    """One form of the model; `why` it can't be measured, where it can't."""

    name: str
    folder: Path
    runtime: str = "torch"  # or "onnx"
    dtype: str = "fp32"  # torch's
    why: str = ""


@dataclass(eq=False)
class Worker:
    """A variant's process, and what it has answered so far."""

    variant: Variant
    process: subprocess.Popen[str]
    answers: defaultdict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    error: str = ""
    imports_bytes: int = 0  # the memory it held before it loaded anything

    def ask(self, name: str, **request: Any) -> None:
        """Asks and keeps the answer under `name`; an error, or an end, is this variant's last."""
        if self.error:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        found = self.heard()
        self.error = found.get("error", "")
        if not self.error:
            self.answers[name].append(found)

    def heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.process.wait()
        return {"error": "was killed: out of memory?" if code == -9 else f"its process ended with code {code}"}


def variants(model: Artifact, run: Run, chosen: Device) -> list[Variant]:
    """An export alone; or a model in torch, and every export of the run that was made from it."""
    if model.kind == "export":
        return [_exported(model.path)]
    fast, _ = chosen.dtype("auto")
    kinds = dict.fromkeys(("fp32", fast))
    every = [Variant(f"torch-{dtype}", model.path, dtype=dtype) for dtype in kinds]
    for manifest in sorted((run.path / chain.exports(model.place)).glob("*/" + MANIFEST)):
        try:
            export = Artifact.open(manifest.parent)
        except DataError as problem:
            every.append(Variant(manifest.parent.name, manifest.parent, why=f"{problem.where()}: {problem.message}"))
            continue
        if any(entry["identity"] == model.identity for entry in export.inputs):
            every.append(_exported(export.path))
        else:
            console.note(f"{export.place} was made from another {model.place}; left aside")
    return every


def _exported(folder: Path) -> Variant:
    name = folder.name
    if name.startswith("onnx-"):
        return Variant(name, folder, "onnx")
    if name.startswith("hf-"):
        return Variant(name, folder)
    others = {
        "hf": "holds the model's own weights: torch's rows are its",
        "gguf": "llama.cpp runs it: llama-bench -m measures it",
        "tensorrt": "TensorRT runs it: trtexec measures it",
    }
    return Variant(name, folder, why=others.get(name.partition("-")[0], "holds nothing that llmctl runs"))


def decode(model: Artifact, run: Run, chosen: Device) -> dict[str, Any]:
    """Measures every variant of a model of `run`, or one export.

    Returns:
        variants: a list of objects: name, runtime, dtype, prefill_tokens_per_second, decode_tokens_per_second,
            batch_tokens_per_second (by batch size), time_to_first_token_seconds, bandwidth_share (what decoding reads
            a second, of what the machine reads), choosing_share (of decoding's time, outside the model),
            peak_memory_bytes (the process's), model_memory_bytes (of it, above the bare imports), load_seconds, bytes
            (of its weights on disk), bits_per_weight; `error`
            where it did not run, and then null for all that is not known.
        memory_bandwidth_bytes_per_second: the best that this process read, by as many threads.
        And what was measured: model, parameters, tokens, rounds, threads, machine.

    Raises:
        RunError: no variant ran at all.
    """
    every = variants(model, run, chosen)
    config = hf.read_config(every[0].folder)
    torch.set_num_threads(chosen.threads)
    lengths = _lengths(config)
    told = f"{config.family}, {console.count(config.parameters)} parameters · {chosen.describe()}"
    console.stage("bench", f"{told} · {len(every)} variants, {ROUNDS} rounds in turns")
    rows, best = dict[str, dict[str, Any]](), 0.0
    groups = _groups([variant for variant in every if not variant.why], chosen)
    steps = sum(len(group) for group in groups) * (ROUNDS * len(_requests(config, lengths)) + 2)
    with console.progress("bench", total=steps, unit="measurements") as live:
        for group in groups:
            workers = list[Worker]()
            with _workers(group, chosen, workers):
                for done, worker in _asked(workers, _requests(config, lengths)):
                    live.update(len(rows) * steps / len(every) + done, worker.variant.name if worker else "memory")
                    best = best if worker else max(best, device.read_rate(chosen.kind))
            for worker in workers:
                rows[worker.variant.name] = _figures(worker, config, lengths)
    for row in rows.values():
        moved = row.pop("moved")
        row["bandwidth_share"] = moved / best if moved else None
    listed = [rows.get(variant.name) or _empty(variant, config, variant.why) for variant in every]
    if all(row["error"] for row in listed):
        reasons = "; ".join(f"{row['name']}: {row['error']}" for row in listed)
        raise RunError(f"no variant could be measured: {reasons}", hint="llmctl export --onnx makes one that can")
    return {
        "variants": listed,
        "memory_bandwidth_bytes_per_second": best,
        "model": f"{config.family}, {config.num_hidden_layers} layers x {config.hidden_size}",
        "parameters": config.parameters,
        "tokens": lengths,
        "rounds": ROUNDS,
        "threads": chosen.threads,
        "machine": chosen.name,
    }


def _lengths(config: Config) -> dict[str, int]:
    """Tokens of each measurement, cut to the model's context."""
    room = config.longest
    prompt = min(PROMPT, room // 2)
    return {"read": min(READ, room), "prompt": prompt, "write": min(WRITE, room - prompt)}


def _requests(config: Config, lengths: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What a round asks of each variant, by the name that the answers are kept under."""
    read = {"read": {"do": "read", "tokens": lengths["read"]}}
    if config.kind == "encoder":
        each = {"do": "read", "tokens": lengths["write"]}
        return read | {str(batch): {**each, "batch": batch} for batch in (1, *BATCHES)}
    write = {"do": "write", "prompt": lengths["prompt"], "seconds": SECONDS}
    sweep = {"tokens": min(SWEEP, lengths["write"]), "seconds": SECONDS / 2}
    batched = {str(batch): {**write, **sweep, "batch": batch} for batch in BATCHES}
    return read | {"1": {**write, "tokens": lengths["write"], "batch": 1}} | batched


def _groups(every: Sequence[Variant], chosen: Device) -> list[list[Variant]]:
    """Which variants are loaded at the same time: all of them where they fit."""
    if SPARE * sum(map(_size, every)) < (device.free_memory(chosen.kind) or sys.maxsize):
        return [list(every)]
    console.note("the variants do not fit into the memory together: measured one after the other")
    return [[variant] for variant in every]


def _size(variant: Variant) -> int:
    """Bytes of its weights on disk."""
    return sum(file.stat().st_size for file in variant.folder.iterdir() if file.name.endswith(WEIGHTS))


@contextlib.contextmanager
def _workers(group: Sequence[Variant], chosen: Device, workers: list[Worker]) -> Iterator[None]:
    """Fills `workers` with processes that have imported what they need; they end with the block."""
    try:
        for variant in group:
            command = [sys.executable, "-m", "llmctl.bench.worker", str(variant.folder), variant.runtime, variant.dtype]
            workers.append(
                Worker(
                    variant,
                    subprocess.Popen(
                        [*command, chosen.kind, str(chosen.threads)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=None if console.verbose() else subprocess.DEVNULL,
                        text=True,
                    ),
                )
            )
        for worker in workers:
            greeting = worker.heard()
            worker.error, worker.imports_bytes = greeting.get("error", ""), greeting.get("imports_bytes", 0)
        yield
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()


def _asked(workers: Sequence[Worker], requests: dict[str, dict[str, Any]]) -> Iterator[tuple[int, Worker | None]]:
    """Asks everything of everyone, in turns; tells how much is done and who is next, None for a look at the memory."""
    done = 0
    once = {"load": {"do": "load"}, "warm": {**requests["1"], "tokens": 2}}
    for requested in (once, *[requests] * ROUNDS):
        yield done, None
        for name, request in requested.items():
            for worker in workers:
                yield done, worker
                worker.ask(name, **request)
                done += 1


def _empty(variant: Variant, config: Config, error: str = "") -> dict[str, Any]:
    size = _size(variant)
    bits = 8 * traffic.SIZES[variant.dtype] if variant.name.startswith("torch-") else 8 * size / config.parameters
    unknown = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds")
    more = ("bandwidth_share", "choosing_share", "peak_memory_bytes", "model_memory_bytes", "load_seconds")
    return {
        "name": variant.name,
        "runtime": variant.runtime,
        "dtype": variant.dtype if variant.runtime == "torch" else None,
        **dict.fromkeys((*unknown, *more)),
        "batch_tokens_per_second": {},
        "bytes": size,
        "bits_per_weight": bits,
        "error": error or None,
    }


def _figures(worker: Worker, config: Config, lengths: dict[str, int]) -> dict[str, Any]:
    """The medians of what a worker answered; `moved`: bytes that it read a second while it decoded one stream."""
    row, told = _empty(worker.variant, config, worker.error), worker.answers

    def median(name: str, of: str) -> float:
        return float(statistics.median(answer[of] for answer in told[name]))

    rates = {}
    for name in ("1", *map(str, BATCHES)):
        if config.kind == "encoder" and told[name]:
            rates[name] = int(name) * lengths["write"] / median(name, "seconds")
        elif told[name]:
            rates[name] = statistics.median(answer["tokens"] / answer["seconds"] for answer in told[name])
    if told["load"]:
        row["load_seconds"] = median("load", "load_seconds")
        row["peak_memory_bytes"] = max(answer["peak_memory_bytes"] for answers in told.values() for answer in answers)
        row["model_memory_bytes"] = row["peak_memory_bytes"] - worker.imports_bytes
    if told["read"]:
        row["prefill_tokens_per_second"] = lengths["read"] / median("read", "seconds")
        row["time_to_first_token_seconds"] = median("read", "first") if config.kind != "encoder" else None
    row["batch_tokens_per_second"], row["moved"] = rates, None
    if "1" in rates and config.kind != "encoder":
        row["decode_tokens_per_second"] = rates["1"]
        row["choosing_share"] = statistics.median(answer["choosing"] / answer["seconds"] for answer in told["1"])
        row["moved"] = rates["1"] * _moved(worker.variant, config, lengths["prompt"] + lengths["write"] / 2)
    return row


def _moved(variant: Variant, config: Config, positions: float) -> float:
    if variant.runtime == "onnx":
        name = DECODER if config.kind == "encoder-decoder" else GRAPH
        return traffic.of_graph(variant.folder / name, config, positions)
    return traffic.of_model(config, variant.dtype, positions)


def show(found: dict[str, Any]) -> None:
    """The figures as two small tables: how fast, and what it takes."""
    sweep = [str(batch) for batch in (1, *BATCHES)]
    fast = [["tokens a second", "prefill", "first token", *(f"x {size}" for size in sweep), "bandwidth"]]
    takes = [["", "on disk", "bits a weight", "to load", "peak memory", "above the imports"]]
    for row in found["variants"]:
        if row["decode_tokens_per_second"] is None and not row["batch_tokens_per_second"]:
            continue
        rates, share = [row["batch_tokens_per_second"].get(size) for size in sweep], row["bandwidth_share"]
        first = row["time_to_first_token_seconds"]
        waited = "" if first is None else f"{1e3 * first:,.0f} ms"
        fast.append([row["name"], _rate(row["prefill_tokens_per_second"]), waited, *map(_rate, rates)])
        fast[-1].append("" if share is None else f"{100 * share:.0f} %")
        size, bits = console.size(row["bytes"]), f"{row['bits_per_weight']:.1f}"
        peak = console.size(row["peak_memory_bytes"])
        above = console.size(row["model_memory_bytes"])
        takes.append([row["name"], size, bits, f"{row['load_seconds']:.2f} s", peak, above])
    console.columns(_aligned(fast))
    console.say()
    console.columns(_aligned(takes))
    console.say()
    for row in found["variants"]:
        if row["error"]:
            console.say(f" {row['name']}: {row['error']}", style="yellow")
    length, bandwidth = found["tokens"], console.size(found["memory_bandwidth_bytes_per_second"])
    what = f"prompt of {length['read']} tokens; {length['write']} decoded behind {length['prompt']}"
    if all(row["decode_tokens_per_second"] is None for row in found["variants"]):
        what = f"a text of {length['read']} tokens; batches of texts of {length['write']}"
    console.say(f" {what}; medians of {found['rounds']} rounds; this machine reads {bandwidth}/s", style="dim")
    if len(fast) > 2:
        console.say(f" fastest: {' · '.join(_fastest(found['variants']))}")


def _fastest(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Which variant to take for what, and how much faster than the first one it is."""

    def rates(row: dict[str, Any]) -> dict[str, float]:
        found = {"prefill": row["prefill_tokens_per_second"], "one stream": row["decode_tokens_per_second"]}
        found["8 at once"] = row["batch_tokens_per_second"].get("8")
        return {what: rate for what, rate in found.items() if rate}

    for what, least in rates(rows[0]).items():
        best = max(rows, key=lambda row: rates(row).get(what, 0.0))
        yield f"{what}: {best['name']}" + (f" ({rates(best)[what] / least:.1f} x)" if best is not rows[0] else "")


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _aligned(rows: list[list[str]]) -> list[list[str]]:
    """Figures to the right, below their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [[row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))] for row in rows]
