"""Loading and decoding one Hugging Face folder: llmctl beside transformers, on the same CPU in the same run.

Usage: python docs/bench/decode.py FOLDER [bf16|fp32] [THREADS]

Each side loads in a fresh process of its own, imports included: seconds to the first token and the process's peak
memory. Then one process holds both and times them in turn, so that what else the machine does falls on both: prefill
of 256 tokens, and greedy decoding of 64 behind a prompt of 16. Medians and, for a machine that does other things too,
the best of each side; a ratio above 1 is in llmctl's favour.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as llmctl sets it; for both sides
LOADS, ROUNDS, PROMPT, NEW, PREFILL = 3, 7, 16, 64, 256
TEXT = "Once upon a time there was a little girl who lived in a village near the forest. " * 16


def with_llmctl(folder: Path, dtype: str, threads: int) -> tuple[list[int], Callable[[list[int], int], list[int]]]:
    """The ids of `TEXT`, and a function that continues ids greedily by so many."""
    from dataclasses import replace

    from llmctl import device
    from llmctl.inference.generate import generate
    from llmctl.inference.runners import TorchRunner
    from llmctl.inference.sampling import Sampling
    from llmctl.text.tokenizer import Tokenizer

    ids = Tokenizer.load(folder).encode(TEXT)
    runner = TorchRunner(folder, replace(device.pick("cpu"), threads=threads), dtype)

    def run(prompt: list[int], new: int) -> list[int]:
        return [token.id for token in generate(runner, prompt, Sampling(0.0, max_tokens=new, ignore_eos=True))]

    return ids, run


def with_transformers(
    folder: Path, dtype: str, threads: int
) -> tuple[list[int], Callable[[list[int], int], list[int]]]:
    """The same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()

    def run(prompt: list[int], new: int) -> list[int]:
        given = torch.tensor([prompt])
        mask = torch.ones_like(given)
        with torch.inference_mode():
            made: Any = model.generate(
                given, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        found: list[int] = made[0, len(prompt) :].tolist()
        return found

    return ids, run


SIDES = {"llmctl": with_llmctl, "transformers": with_transformers}


def load(side: str, folder: Path, dtype: str, threads: int) -> dict[str, float]:
    """In a process of its own: seconds from its first line to the first token, and its peak memory in MB."""
    start = time.perf_counter()
    ids, run = SIDES[side](folder, dtype, threads)
    run(ids[:PROMPT], 1)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    folder, dtype = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "bf16"
    threads = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    if len(sys.argv) > 4:
        print(json.dumps(load(sys.argv[4], folder, dtype, threads)))
        return
    command = [sys.executable, __file__, str(folder), dtype, str(threads)]
    loads: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(LOADS):
        for side, found in loads.items():
            said = subprocess.run([*command, side], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            found.append(json.loads(said.stdout.splitlines()[-1]))
    for figure in ("seconds", "peak_mb"):
        ours, theirs = (statistics.median(load[figure] for load in loads[side]) for side in SIDES)
        print(f"to the first token, {figure}: llmctl {ours:.2f}, transformers {theirs:.2f}, ratio {theirs / ours:.2f}")
    ids, _ = SIDES["llmctl"](folder, dtype, threads)
    runs = {side: make(folder, dtype, threads)[1] for side, make in SIDES.items()}
    for name, prompt, new in (("prefill", ids[:PREFILL], 1), ("decode", ids[:PROMPT], NEW)):
        said = {side: run(prompt, new) for side, run in runs.items()}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(ROUNDS):
            for side, run in runs.items():
                times[side].append(clock(partial(run, prompt, new)))
        count = len(prompt) if name == "prefill" else new
        for of, pick in (("median", statistics.median), ("best", min)):
            ours, theirs = (count / pick(times[side]) for side in SIDES)
            print(f"{name}, {of}, tokens/s: llmctl {ours:.1f}, transformers {theirs:.1f}, ratio {ours / theirs:.2f}")
        same = next((at for at, pair in enumerate(zip(*said.values(), strict=True)) if len(set(pair)) > 1), new)
        print(f"{name}: the first {same} of {new} tokens are the same")


if __name__ == "__main__":
    main()
