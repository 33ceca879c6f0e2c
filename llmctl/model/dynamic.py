"""Products of int8 with int8: layers that round what they read, a token at a time, before they multiply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(x: Tensor) -> Tensor:
    """(..., in) -> the same, each token's values rounded to 255 steps between its largest and its negative."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round() * scale


class DynamicLinear(nn.Linear):
    """A linear layer that rounds what it reads to int8, as its int8 product will."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(rounded(x), self.weight, self.bias)


def round_inputs(model: nn.Module, weights: Sequence[str]) -> None:
    """Has the products of these matrices, by native name, round what they read; a tied embedding's is the head."""
    for weight in weights:
        name = weight.removesuffix(".weight")
        parent, _, child = name.rpartition(".")
        plain = model.get_submodule(name)
        if hasattr(model, "head_proj") and plain.weight is model.head_weight():  # type: ignore[operator]
            model.head_proj = DynamicHead(plain.weight)
        elif isinstance(plain, nn.Linear):
            with torch.device("meta"):
                made = DynamicLinear(plain.in_features, plain.out_features, bias=plain.bias is not None)
            made.weight, made.bias = plain.weight, plain.bias
            setattr(model.get_submodule(parent), child, made)


class DynamicHead(nn.Module):
    """The same for a head whose matrix is the model's embedding, or is used apart from its module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor = weight.detach()  # no parameter: the model has it already

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return F.linear(rounded(x), self.weight)
