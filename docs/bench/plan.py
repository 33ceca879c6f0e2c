"""The memory that `llmctl plan` states against what a training takes: `python docs/bench/plan.py [NAME ...] [--heap]`.

Each shape trains three eager steps through `training.loop` in a process of its own, whose peak is counted from its size
before the model is built. glibc gives freed memory back (`footprint.give_back`); with `--heap` it keeps it, as it does
unless the plan says that memory is short.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# [model], vocabulary, sequences at a time, dtype, optimiser
SHAPES = {
    "200 MB": ({"depth": 4, "max_seq_length": 128}, 4096, 8, "fp32", "adamw"),
    "500 MB": ({"depth": 6, "max_seq_length": 256}, 4096, 8, "bf16", "muon"),
    "1.5 GB": ({"depth": 8, "max_seq_length": 1024}, 32000, 2, "bf16", "adamw"),
    "4 GB": ({"depth": 14, "max_seq_length": 512}, 16384, 6, "fp32", "adamw"),
}


def measure(name: str, heap: bool) -> None:
    """In the process of one shape: prints both figures as JSON."""
    import itertools

    import numpy as np
    import torch

    from llmctl.model import hf
    from llmctl.model.config import derive
    from llmctl.recipe import ModelSection
    from llmctl.training import footprint, loop, optim
    from llmctl.training.batch import Batch
    from llmctl.training.objectives import Learner
    from llmctl.training.precision import Precision

    section, vocabulary, size, dtype, optimizer = SHAPES[name]
    config, _ = derive(ModelSection.model_validate(section), vocabulary)
    planned = footprint.memory(footprint.Training(config, config.longest, size, dtype, optimizer, saves=False))
    if not heap:
        footprint.give_back()

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    model = hf.random(config, 1)
    ids = np.random.default_rng(0).integers(0, vocabulary, (size, config.longest + 1))
    steps = loop.train(
        Learner(model),
        optim.build(model, optimizer, 1e-4, dtype=dtype),
        itertools.repeat(Batch((ids[:, :-1],), ids[:, 1:])),
        steps=range(3),
        rate=lambda step: 1.0,
        micro_batch=size,
        max_grad_norm=1.0,
        precision=Precision(torch.device("cpu"), dtype),
        stop=lambda: False,
        measure_every=1,
    )
    seconds = [step.seconds for step in steps]
    found = {"planned": planned.total, "measured": status("VmHWM") - before, "seconds": seconds[-1]}
    print(json.dumps(found | {"parts": planned.parts}))


def main() -> None:
    """Every shape, or those named."""
    if "--measure" in sys.argv:
        return measure(sys.argv[2], "--heap" in sys.argv)
    names = [name for name in sys.argv[1:] if not name.startswith("--")] or list(SHAPES)
    print(f"{'shape':<8} {'planned':>9} {'measured':>9} {'ratio':>6} {'step':>8}")
    for name in names:
        command = [sys.executable, __file__, "--measure", name, *[flag for flag in sys.argv if flag == "--heap"]]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        planned, measured = found["planned"] / 1e6, found["measured"] / 1e6
        print(f"{name:<8} {planned:6.0f} MB {measured:6.0f} MB {planned / measured:6.3f} {found['seconds']:6.2f} s")
    return None


if __name__ == "__main__":
    main()
