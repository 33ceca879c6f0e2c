"""How fast two processes of one thread train, against one of two threads, on the job of recipes/bench.toml.

    python docs/bench/ranks.py [ddp|fsdp] [--eager] [--sequences 8] [--steps 20]

Prints the median step of each, three times in turn, and the ratio of the tokens a second. Nothing else may be running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
WARM_UP = 4


def measure(options: argparse.Namespace) -> None:
    """One line of JSON on stdout, from rank 0: the seconds of each step."""
    from llmctl import launch

    with launch.processes(options.nproc, lambda problem: problem.exit_code):
        train(options)


def train(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from llmctl import device, launch
    from llmctl.model import hf
    from llmctl.model.config import derive
    from llmctl.model.sublayers import Block
    from llmctl.recipe.schema import ModelSection
    from llmctl.training import cross_entropy, distributed, loop, optim
    from llmctl.training.batch import Batch, ahead
    from llmctl.training.objectives import Learner
    from llmctl.training.precision import Precision

    here = launch.share(device.pick("cpu"))
    torch.set_num_threads(here.threads)
    shape: dict[str, Any] = {"family": "llama", "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1024}
    section = ModelSection.model_validate(shape | {"num_attention_heads": 6, "max_seq_length": 256})
    model = hf.random(derive(section, 8192, bos=1, eos=2, pad=0)[0], 0)
    random = np.random.default_rng(0)

    def batches() -> Iterator[Batch]:
        while True:
            ids = random.integers(8192, size=(options.sequences, 257))
            yield Batch((ids[:, :-1],), ids[:, 1:])

    with launch.leading() if launch.rank() == 0 else _following(), launch.together("bench", {}, 300, here):
        ranks, learner = distributed.here(here.torch), Learner(model)
        if not options.eager:
            for module in learner.modules():
                if isinstance(module, Block):
                    module.compile()
            learner.each = torch.compile(cross_entropy.chunk)
        wrapped = distributed.wrap(learner, ranks, options.strategy, bf16=True)
        steps = loop.train(
            wrapped,
            optim.build(model, "adamw", 3e-4, 0.1),
            ahead(batches()),
            steps=range(options.steps + WARM_UP),
            rate=lambda _: 1.0,
            micro_batch=options.sequences // ranks.size,
            max_grad_norm=1.0,
            precision=Precision(here.torch, "bf16"),
            stop=lambda: False,
            ranks=ranks,
        )
        seconds = [step.seconds for step in steps][WARM_UP:]
    if launch.rank() == 0:
        print(json.dumps({"seconds": seconds}))


def _following() -> Any:
    from contextlib import nullcontext

    from llmctl import launch

    next(launch.trainings())
    return nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", nargs="?", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=0)
    options = parser.parse_args()
    if options.nproc:
        measure(options)
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for count, found in rates.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--nproc", str(count)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            step = statistics.median(json.loads(out.splitlines()[-1])["seconds"])
            found.append(options.sequences * 256 / step)
            print(f"{count} of {2 // count} threads: {found[-1]:,.0f} tokens/s", flush=True)
    ratio = statistics.median(rates[2]) / statistics.median(rates[1])
    print(f"{options.strategy}: two processes reach {ratio:.2f} of one")


if __name__ == "__main__":
    main()
