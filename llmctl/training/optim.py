"""Optimisers and learning-rate schedules.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the update of each matrix; AdamW takes
embeddings
and norms. With Moonlight's scaling (Liu et al. 2025, arXiv:2502.16982: 0.2 sqrt(max(rows, columns))) Muon's updates
have the
size of AdamW's, so one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

BETAS = (0.9, 0.95)  # the second as in GPT-3 (Brown et al. 2020, appendix B): 0.999 is slow to notice a spike
MUON_MOMENTUM = 0.95


def build(
    model: nn.Module, kind: Literal["muon", "adamw"], learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """The optimisers of a model: matrices decay, norms, biases and embeddings do not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.dim() == 2 and not _is_embedding(name)]
    embeddings = [p for name, p in trained if p.dim() == 2 and _is_embedding(name)]
    vectors = [p for _, p in trained if p.dim() != 2]
    adamw_groups = [{"params": embeddings, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    made: list[Optimizer] = []
    if kind == "muon" and matrices:
        made.append(
            torch.optim.Muon(matrices, learning_rate, weight_decay, MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
        )
    else:
        adamw_groups.append({"params": matrices, "weight_decay": weight_decay})
    groups = [group for group in adamw_groups if group["params"]]
    if groups:
        made.append(torch.optim.AdamW(groups, learning_rate, BETAS, fused=True))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def _is_embedding(name: str) -> bool:
    """Whether rows are looked up or stand for pieces: of tokens, positions, token types and distances, and heads."""
    return any(part in name for part in ("embed_", "relative_bias", "lm_head", "head.decoder"))


def set_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Sets every group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def schedule(step: int, *, kind: str, steps: int, warmup: int, decay_ratio: float, floor: float) -> float:
    """The learning rate of step `step` (0-based) as a share of its peak.

    cosine: Loshchilov and Hutter 2016 (arXiv:1608.03983). wsd: warm-up, stable, linear decay (Hu et al. 2024,
    arXiv:2404.06395; the linear decay to zero: Bergsma et al. 2025, arXiv:2502.15938).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    left = steps - warmup
    if kind == "wsd":
        decay = max(1, round(steps * decay_ratio))
        share = min(1.0, (steps - step) / decay)
    else:
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, left)))
    return floor + (1 - floor) * share
