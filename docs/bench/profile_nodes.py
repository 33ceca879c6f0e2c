"""Where the time of an exported decoder goes: ONNX Runtime's own profile, summed by operator, for each phase.

Usage: python docs/bench/profile_nodes.py FOLDER [--threads N] [--by op|node|shape] [--top N] [--steps N]

FOLDER is an ONNX folder with its config.json: one that llmctl exported, or another tool's with the model's config.json
copied into it. The phases: prefill of 256 tokens, decoding of one stream, and of 8 streams at once, behind a prompt of
16. A row counts the time inside that operator's kernels, its threads' waiting included, and its share of all kernels'
time. `between kernels` is what else the session does, writing the profile down included (some microseconds a node: the
head of a phase gives a step's time without and with it); `around the session` is what Python does a step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PROMPT, PREFILL, BATCH = 16, 256, 8
WARM = 3  # runs of a phase that are not counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="default: all that this process may use")
    parser.add_argument("--by", choices=("op", "node", "shape"), default="op")
    parser.add_argument("--top", type=int, default=14, help="rows of a phase")
    parser.add_argument("--steps", type=int, default=24, help="counted steps of decoding; a quarter of it of prefill")
    return parser.parse_args()


def phases(runner: Any, steps: int) -> dict[str, tuple[int, Callable[[], Callable[[], object]]]]:
    """By name: how many steps are counted, and what makes the function that does one."""
    import numpy as np

    room = runner.max_length
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, (BATCH, max(PROMPT, PREFILL)))

    def prefill() -> Callable[[], object]:
        length = min(PREFILL, room)
        cache = runner.new_cache(1, length)

        def step() -> None:
            cache.reset()
            runner.forward(ids[:1, :length], cache)

        return step

    def decode(rows: int) -> Callable[[], object]:
        prompt = min(PROMPT, room // 2)
        cache = runner.new_cache(rows, min(room, prompt + WARM + steps))
        runner.forward(ids[:rows, :prompt], cache)

        def step() -> None:
            if cache.length == cache.max_length:  # a context that is shorter than the phase
                cache.reset()
            runner.forward(ids[:rows, :1], cache)

        return step

    length = min(PREFILL, room)
    return {
        f"prefill of {length} tokens": (max(2, steps // 4), prefill),
        "decoding, one stream": (steps, lambda: decode(1)),
        f"decoding, {BATCH} streams": (steps, lambda: decode(BATCH)),
    }


def timed(step: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` steps, after some that are not counted."""
    for _ in range(WARM):
        step()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def label(event: dict[str, Any], by: str) -> str:
    """The row that a node's event belongs to."""
    op = str(event["args"]["op_name"])
    if by == "node":  # one row for the same node of all layers
        name = re.sub(r"\d+", "N", event["name"].removesuffix("_kernel_time"))
        return f"{op}  {name}"
    if by == "shape":
        shapes = [list(next(iter(entry.values()))) for entry in event["args"].get("input_type_shape", []) if entry]
        given = " ".join("x".join(map(str, shape)) for shape in shapes[:2] if shape)
        return f"{op}  {given} · {int(event['args'].get('parameter_size', 0)):,} bytes"  # of its weights
    return op


def profile(runner: Any, make: Callable[[], Callable[[], object]], count: int) -> tuple[list[dict[str, Any]], float]:
    """The events of `count` steps, and the median seconds of one as Python sees it."""
    import onnxruntime as ort

    plain, options = runner.session, runner.session.get_session_options()
    options.enable_profiling, options.profile_file_prefix = True, str(Path(os.environ.get("TMPDIR", "/tmp")) / "nodes")
    runner.session = ort.InferenceSession(plain._model_path, options, providers=plain.get_providers())
    options.enable_profiling = False
    try:
        step = make()
        seconds = statistics.median(timed(step, count))
        written = Path(runner.session.end_profiling())
    finally:
        runner.session = plain
    events = json.loads(written.read_text())
    written.unlink()
    runs = sorted((event for event in events if event.get("name") == "model_run"), key=lambda event: event["ts"])
    begun = runs[-count]["ts"]  # a step of these phases is one run of the session
    return [event for event in events if event.get("ts", 0) >= begun], seconds


def show(name: str, events: list[dict[str, Any]], count: int, wall: float, plain: float, asked: Any) -> None:
    """One phase's table: milliseconds of a step, share, calls a step."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    spent, calls = Counter[str](), Counter[str]()
    for event in nodes:
        key = label(event, asked.by)
        spent[key] += event["dur"]
        calls[key] += 1
    run = sum(event["dur"] for event in events if event.get("name") == "model_run") / count / 1e3
    print(f"\n{name}: {1e3 * plain:.2f} ms a step ({1e3 * wall:.2f} while profiled)")
    rows = [(key, total / count / 1e3, f"{calls[key] / count:.0f}") for key, total in spent.most_common()]
    if len(rows) > asked.top:
        rest = rows[asked.top :]
        rows = [*rows[: asked.top], (f"{len(rest)} more", sum(row[1] for row in rest), "")]
    kernels = sum(spent.values()) / count / 1e3
    width = max(len(row[0]) for row in [*rows, ("around the session",)])
    for key, milliseconds, number in rows:
        print(f"  {key:<{width}} {milliseconds:9.3f} ms {milliseconds / kernels:6.1%} {number:>6}")
    for key, milliseconds in (("between kernels", run - kernels), ("around the session", 1e3 * wall - run)):
        print(f"  {key:<{width}} {milliseconds:9.3f} ms", flush=True)


def main() -> None:
    asked = arguments()
    from llmctl import device
    from llmctl.inference import runners

    chosen = device.pick("cpu")
    chosen = replace(chosen, threads=asked.threads or chosen.threads)
    runner: Any = runners.load(asked.folder, chosen, "onnx")
    print(f"{asked.folder} · {chosen.name} · {chosen.threads} threads")
    for name, (count, make) in phases(runner, asked.steps).items():
        plain = statistics.median(timed(make(), count))
        events, wall = profile(runner, make, count)
        show(name, events, count, wall, plain, asked)


if __name__ == "__main__":
    main()
