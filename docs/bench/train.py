"""The training step beside transformers' (and litgpt's, where it is installed), compiled, bf16, in turns.

    python docs/bench/train.py [--rounds 3]

One fixed job, that of recipes/bench.toml: a Llama of 13.8 M parameters, 8 sequences of 256 tokens a step, AdamW. Each
round runs every program once, in a process of its own; the medians and their ratios are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bench.toml"
V, C, L, H, T, B = 8192, 384, 6, 6, 256, 8


def peer(name: str) -> None:
    """Steps of a peer in this process: prints tokens a second, the median of twelve."""
    import time

    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LlamaConfig(
            vocab_size=V,
            hidden_size=C,
            intermediate_size=1024,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=H,
            max_position_embeddings=T,
            tie_word_embeddings=True,
        )
        model: torch.nn.Module = LlamaForCausalLM(shape)
    else:
        from litgpt import GPT, Config

        model = GPT(
            Config(
                name="bench",
                block_size=T,
                vocab_size=V,
                padded_vocab_size=V,
                n_layer=L,
                n_head=H,
                n_embd=C,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                intermediate_size=1024,
            )
        )
        model.lm_head.weight = model.transformer.wte.weight
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    x, y = torch.randint(0, V, (B, T)), torch.randint(0, V, (B, T))
    times = []
    for _ in range(14):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            if name == "transformers":
                loss = model(input_ids=x, labels=y, shift_labels=y).loss
            else:
                loss = F.cross_entropy(model(x).view(-1, V), y.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps({"tokens_per_second": B * T / statistics.median(times[2:]), "first_step_seconds": times[0]}))


def measured(name: str) -> dict[str, float]:
    """One run of a program in a process of its own."""
    if name == "llmctl":
        command = [sys.executable, "-m", "llmctl", "bench", "train", str(RECIPE), "--json"]
    else:
        command = [sys.executable, __file__, "--peer", name]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1] if name != "llmctl" else done.stdout)
    return dict(found)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peer", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.peer:
        peer(given.peer)
        return
    names = ["llmctl", "transformers", *(["litgpt"] if importlib.util.find_spec("litgpt") else [])]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            runs[name].append(measured(name))
            print(name, runs[name][-1], flush=True)
    medians = {name: statistics.median(run["tokens_per_second"] for run in found) for name, found in runs.items()}
    for name, found in medians.items():
        print(f"{name:14} {found:7,.0f} tokens/s   llmctl is {medians['llmctl'] / found:.2f} times as fast")


if __name__ == "__main__":
    main()
