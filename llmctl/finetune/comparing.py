"""A model before and after it was made smaller: its size, its speed here, and how good it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import console
from llmctl.device import Device
from llmctl.finetune.lesson import Lesson
from llmctl.inference.runners import TorchRunner
from llmctl.model.hf import Causal

Row = dict[str, Any]  # under metrics' names; `name` is "before", "pruned" or "after"
PREFILL, DECODE, ROUNDS = 256, 32, 5  # tokens, and how often each speed is taken


def row(name: str, model: Causal, lesson: Lesson) -> Row:
    """Parameters and how many of them are not zero, bytes in fp32, and the lesson's score."""
    tensors = model.state_dict().values()
    total = sum(tensor.numel() for tensor in tensors)
    nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
    size = {"parameters": total, "nonzero_parameters": nonzero, "bytes": 4 * total}
    return {"name": name, **size, **lesson.score(model)}


def add_speeds(rows: Sequence[Row], folders: Sequence[Path], device: Device) -> None:
    """Tokens a second of one sequence in torch: the best of a few rounds, in turns, which all meet the same machine."""
    runners = [TorchRunner(folder, device) for folder in folders]
    taken = [[_speeds(runner) for runner in runners] for _ in range(ROUNDS)]
    for index, found in enumerate(rows):
        prefill, decode = zip(*(each[index] for each in taken), strict=True)
        found["prefill_tokens_per_second"] = max(prefill)
        found["decode_tokens_per_second"] = max(decode)


def _speeds(runner: TorchRunner) -> tuple[float, float]:
    prompt = min(PREFILL, runner.max_length // 2)
    decode = min(DECODE, runner.max_length - prompt)
    cache, ids = runner.new_cache(1, prompt + decode), np.ones((1, prompt), np.int64)
    start = time.perf_counter()
    runner.forward(ids, cache)
    middle = time.perf_counter()
    for _ in range(decode):
        runner.forward(ids[:, :1], cache)
    return prompt / (middle - start), decode / (time.perf_counter() - middle)


def tell(rows: Sequence[Row]) -> None:
    """Prints the table."""
    columns = {
        "parameters": ("parameters", console.count),
        "nonzero_parameters": ("not zero", console.count),
        "bytes": ("fp32", console.size),
        "prefill_tokens_per_second": ("prefill", "{:,.0f}".format),
        "decode_tokens_per_second": ("decode", "{:,.0f}".format),
        "val_bits_per_byte": ("text", "{:.3f}".format),
        "val_perplexity": ("perplexity", "{:.2f}".format),
        "answer_bits_per_byte": ("answers", "{:.3f}".format),
    }
    shown = {key: column for key, column in columns.items() if any(key in found for found in rows)}
    cells = [
        [found["name"], *(told(found[key]) if key in found else "" for key, (_, told) in shown.items())]
        for found in rows
    ]
    title = "speeds in tokens a second, text and answers in bits a byte"
    console.table(title, ["", *(title for title, _ in shown.values())], cells)
