"""How far a step moves the weights, of which a learning rate that is too high or too low tells first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLED = 1 << 16  # values of a tensor that are looked at: a copy of all would cost a quarter more memory


def snapshot(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Values of each parameter, of a sharded one of this rank's part: what `movement` compares with."""
    return [_some(parameter).clone() for parameter in parameters]


def movement(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """(2,): the squared norms of the change since `snapshot` and of the weights now, of this rank's part.

    Exact up to SAMPLED values of a tensor; beyond that estimated from so many, evenly spread.
    """
    found = torch.zeros(2, dtype=torch.float64)
    for parameter, old in zip(parameters, before, strict=True):
        now = _some(parameter)
        pair = torch.stack([(now - old).square().sum(dtype=torch.float64), now.square().sum(dtype=torch.float64)])
        found += pair.cpu() * (_local(parameter).numel() / max(1, now.numel()))
    return found


def _some(parameter: Tensor) -> Tensor:
    flat = _local(parameter).reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLED) | 1)]  # odd, or one column of a matrix would stand for all


def _local(parameter: Tensor) -> Tensor:
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part.detach()
