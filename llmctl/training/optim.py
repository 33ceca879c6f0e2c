"""Optimisers and learning-rate schedules.

Muon (`training.muon`) orthogonalises the update of each matrix; AdamW takes the rest: embeddings, heads, norms, biases.
With Moonlight's scaling (Liu et al. 2025, arXiv:2502.16982: 0.2 sqrt(max(rows, columns))) Muon's updates have the size
of AdamW's, so one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from llmctl.training.muon import Muon

Kind = Literal["muon", "adamw", "sgd"]
BETA1, BETA2 = 0.9, 0.95  # the second as in GPT-3 (Brown et al. 2020, appendix B): 0.999 is slow to notice a spike
MOMENTUM = {"muon": 0.95, "sgd": 0.9}
# What a step takes off the matrices, in learning rates; SGD's is independent of the learning rate, see `SGDW`: it is
# what AdamW's takes off at its peak of 2e-3.
WEIGHT_DECAY = {"muon": 0.1, "adamw": 0.1, "sgd": 2e-4}
GAIN = {"sgd": 25.0}  # its learning rate in AdamW's: 0.05 to 0.1 at 2e-3 (150 steps of a model 128 wide, clipped to 1)
# T5's biases of distances are added to attention's logits, whose differences are of the order of one, and AdamW moves a
# weight by at most a learning rate a step (T5 itself used Adafactor: steps relative to the weight). After 400 steps of
# recipes/seq2seq.toml the validation loss is 3.69 instead of 3.74, with 7.1 instead of 6.1 % of hidden tokens right.
DISTANCES = 40.0


class SGDW(torch.optim.SGD):
    """SGD with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 1): each step takes
    "decay" times the schedule's share off the weights, whatever the learning rate."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # torch's closure has no use here
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(trained, 1 - group["decay"] * group["lr"] / group["peak_lr"])
        super().step()


def build(
    model: nn.Module,
    kind: Kind,
    learning_rate: float,
    weight_decay: float | None = None,
    *,
    beta2: float = BETA2,
    dtype: str = "bf16",
) -> list[Optimizer]:
    """The optimisers of a model: matrices decay; norms, biases, embeddings and heads do not.

    Args:
        weight_decay: decoupled; default: WEIGHT_DECAY.
        beta2: of AdamW.
        dtype: what the training multiplies in; Muon computes in bf16 where that is bf16, else in fp32.
    """
    decay = WEIGHT_DECAY[kind] if weight_decay is None else weight_decay
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.dim() == 2 and not _is_table(name)]
    distances = [p for name, p in trained if "relative_bias" in name]
    taken = {id(p) for p in (*matrices, *distances)}
    rest = [p for _, p in trained if id(p) not in taken]
    made: list[Optimizer] = []
    if kind == "sgd":
        groups = _filled({"params": [*rest, *distances], "decay": 0.0}, {"params": matrices, "decay": decay})
        made.append(SGDW(groups, learning_rate, MOMENTUM["sgd"], nesterov=True, foreach=True))
    else:
        slow = {"params": distances, "weight_decay": 0.0, "lr": DISTANCES * learning_rate}
        groups = _filled({"params": rest, "weight_decay": 0.0}, slow)
        if kind == "muon" and matrices:
            products = torch.bfloat16 if dtype == "bf16" else torch.float32
            made.append(Muon(matrices, learning_rate, decay, MOMENTUM["muon"], products))
        else:
            groups += _filled({"params": matrices, "weight_decay": decay})
        if groups:
            made.append(torch.optim.AdamW(groups, learning_rate, (BETA1, beta2), fused=True))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def hold_zeros(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Has every weight of the blocks' matrices that is zero now be zero after each step: a pruned model stays pruned.

    Momentum, weight decay and Muon's orthogonalisation may do what they like. Weights may be sharded.
    """
    pruned = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in pruned]
        masks = [p.detach() != 0 for p in held]

        def mask(*_: object, held: list[nn.Parameter] = held, masks: list[torch.Tensor] = masks) -> None:
            with torch.no_grad():
                for weight, kept in zip(held, masks, strict=True):
                    weight.mul_(kept)

        optimizer.register_step_post_hook(mask)


def _filled(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _is_table(name: str) -> bool:
    """Whether rows are looked up or stand for pieces: of tokens, positions, token types and distances, and heads."""
    return any(part in name for part in ("embed_", "relative_bias", "lm_head", "head.decoder", "head.classifier"))


def set_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Sets every group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def schedule(step: int, *, kind: str, steps: int, warmup: int, decay_ratio: float, floor: float) -> float:
    """The learning rate of step `step` (0-based) as a share of its peak: a linear warm-up, then by `kind`.

    cosine: Loshchilov and Hutter 2016 (arXiv:1608.03983). linear: in a straight line to the end (Bergsma et al. 2025,
    arXiv:2502.15938, find the decay to zero best). wsd: warm-up, stable, linear decay (Hu et al. 2024,
    arXiv:2404.06395). inverse_sqrt: sqrt(warmup / step) (Vaswani et al. 2017, arXiv:1706.03762, section 5.3, as a share
    of its peak, both counted from one); it knows no end: the last rate is sqrt(warmup / steps), or `floor` where that
    is more. The others end at `floor`, one step after the last.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "inverse_sqrt":
        return max(floor, math.sqrt((warmup + 1) / (step + 1)))
    left = max(1, steps - warmup)
    if kind == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / left))
    else:
        decay = min(left, max(1, round(steps * decay_ratio))) if kind == "wsd" else left
        share = min(1.0, (steps - step) / decay)
    return floor + (1 - floor) * share
