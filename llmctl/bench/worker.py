"""One variant of a model in a process of its own, told by `bench/decode.py` what to time: its peak memory and its load
time are its own, and a variant that dies takes nothing with it.

`python -m llmctl.bench.worker FOLDER RUNTIME DTYPE DEVICE THREADS` reads a request a line, answers a line; both JSON.
"""

# B batch, T time, V vocabulary

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl import device
from llmctl.device import Device
from llmctl.inference import runners
from llmctl.inference.onnx_encoder import EncoderRunner
from llmctl.inference.runners import Runner
from llmctl.model import hf, packed
from llmctl.model.transformer import Encoder
from llmctl.training import loop

Read = Callable[[np.ndarray], object]  # (B, T) ids


class Subject:
    """A loaded model, and what can be timed of it."""

    def __init__(self, folder: Path, runtime: str, dtype: str, chosen: Device) -> None:
        self.config = hf.read_config(folder)
        self.random = np.random.default_rng(0)
        self.runner: Runner | None = None
        start = time.perf_counter()
        if self.config.kind == "encoder":
            self.encode = _encoder(folder, runtime, dtype, chosen)
        else:
            self.runner = runners.load(folder, chosen, runtime, dtype)
        self.load_seconds = time.perf_counter() - start

    def ids(self, batch: int, length: int) -> np.ndarray:
        return self.random.integers(0, self.config.vocab_size, (batch, length))

    def read(self, tokens: int, batch: int = 1) -> dict[str, float]:
        """A prompt of so many tokens, or a batch of texts for an encoder.

        Returns:
            seconds: of reading it; `first`: from the prompt to the first id of the answer, the cache's making included.
        """
        ids = self.ids(batch, tokens)
        start = time.perf_counter()
        if self.runner is None:
            self.encode(ids)
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "first": seconds}
        cache, first = self.runner.begin(ids[0].tolist(), 1)  # an encoder-decoder reads the prompt here
        begun = start if self.runner.start_ids else time.perf_counter()
        logits = self.runner.forward(np.array([first], np.int64), cache)
        read = time.perf_counter()
        int(logits[0, -1].argmax())
        return {"seconds": read - begun, "first": time.perf_counter() - start}

    def write(self, prompt: int, tokens: int, batch: int, seconds: float) -> dict[str, float]:
        """Greedy decoding behind a prompt: so many tokens in each row, or fewer where they would take over `seconds`.

        Returns:
            tokens: of all rows; `seconds`: that they took; `choosing`: of those, outside the model, to choose tokens.
        """
        runner = self.runner
        assert runner is not None, "an encoder writes no text"
        ids = self.ids(batch, prompt)
        if runner.start_ids:
            cache, first = runner.begin(ids[0].tolist(), tokens + 1)
            logits = runner.forward(np.array([first], np.int64), cache)
            if batch > 1:
                cache, logits = runner.select(cache, [0] * batch), np.repeat(logits, batch, 0)
        else:
            cache = runner.new_cache(batch, prompt + tokens)
            logits = runner.forward(ids, cache)
        inside, made, start = 0.0, 0, time.perf_counter()
        while made < tokens:
            chosen = logits[:, -1].argmax(-1)[:, None]  # (B, 1)
            begun = time.perf_counter()
            logits = runner.forward(chosen, cache)
            ended = time.perf_counter()
            inside, made = inside + ended - begun, made + 1
            if ended - start > seconds:
                break
        took = time.perf_counter() - start
        return {"tokens": made * batch, "seconds": took, "choosing": took - inside}


def _encoder(folder: Path, runtime: str, dtype: str, chosen: Device) -> Read:
    """A function that reads (B, T) ids with the encoder of a folder."""
    if runtime == "onnx":
        return EncoderRunner(folder, chosen).fill
    torch.set_num_threads(chosen.threads)
    model = hf.load(folder, dtype, chosen.torch, mapped=dtype == "fp32")
    assert isinstance(model, Encoder)
    packed.pack(model)

    def read(ids: np.ndarray) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(ids).to(model.device)).cpu()

    return read


def answer(subject: Subject | None, request: dict[str, Any], make: Callable[[], Subject]) -> tuple[Subject, Any]:
    """What a request asks for."""
    asked = request.pop("do")
    if subject is None or asked == "load":
        subject = make()
        return subject, {"load_seconds": subject.load_seconds}
    found = subject.read(**request) if asked == "read" else subject.write(**request)
    return subject, found


def peak_memory() -> int:
    """The most memory that this process has held, in bytes. Not `ru_maxrss`, which begins with what the process that
    started this one held."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return loop.peak_memory()


def main() -> None:
    """Loads what the arguments name, and answers requests, a JSON line each, until there are no more."""
    folder, runtime, dtype, kind, threads = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    chosen = replace(device.pick(kind), threads=int(threads))
    subject: Subject | None = None
    told.write(json.dumps({"imports_bytes": peak_memory()}) + "\n")
    told.flush()
    for line in sys.stdin:
        try:
            subject, found = answer(subject, json.loads(line), lambda: Subject(Path(folder), runtime, dtype, chosen))
            found["peak_memory_bytes"] = peak_memory()
        except Exception as reason:  # whatever it is, it is this variant's, and the others go on
            found = {"error": f"{type(reason).__name__}: {reason}"}
        told.write(json.dumps(found) + "\n")
        told.flush()


if __name__ == "__main__":
    main()
