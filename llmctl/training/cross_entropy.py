"""The last matrix product and its cross-entropy in one, over chunks of positions: no full logits tensor ever exists.

The gradients are computed in the forward pass, where a chunk's logits are at hand, as in Liger's kernel (Hsu et al.
2024, arXiv:2410.10989) and Wijmans et al. 2024 (arXiv:2411.09009). What is kept is the gradient of the states and of
the head.
"""

# N positions, C channels, V vocabulary, R rows of a chunk

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmctl.training.batch import IGNORED

LOGITS = 1 << 23  # of a chunk: 32 MB in fp32. A smaller chunk adds to the head's gradient more often.

Chunk = Callable[..., tuple[Tensor, Tensor]]  # the arguments of `chunk`, then the rows of `beside`


def chunk(x: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss of (R, C) states, and its gradient at the logits, (R, V) in their dtype.

    The softmax is computed in fp32 whatever the product's dtype, as torch's cross_entropy does under autocast.
    """
    logits = (x @ weight.T).float()
    if cap is not None:  # Gemma 2's soft cap
        logits = cap * torch.tanh(logits / cap)
    counted = labels != IGNORED
    right = labels.clamp(min=0)[:, None]
    highest = logits.amax(-1, keepdim=True)
    exponents = (logits - highest).exp()
    total = exponents.sum(-1, keepdim=True)
    loss = torch.where(counted[:, None], total.log() + highest - logits.gather(1, right), 0.0).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = exponents / total - (columns == right).float()
    if cap is not None:
        gradient = gradient * (1 - (logits / cap).square())
    return loss, torch.where(counted[:, None], gradient, 0.0).to(x.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        cap: float | None,
        each: Chunk,
        dtype: torch.dtype,
        *beside: Tensor,
    ) -> Tensor:
        states, head = x.to(dtype), weight.to(dtype)
        chunks = max(1, -(-len(x) * weight.shape[0] // LOGITS))
        rows = max(1, -(-len(x) // chunks))  # chunks of one size
        total = torch.zeros((), device=x.device)
        of_states = torch.empty_like(states)
        of_head = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), rows):
            at = slice(start, start + rows)
            part = states[at]
            loss, gradient = each(part, head, labels[at], cap, *(tensor[at] for tensor in beside))
            total += loss
            of_states[at] = gradient @ head
            of_head += gradient.T @ part
        ctx.save_for_backward(of_states, of_head)
        ctx.dtypes, ctx.beside = (x.dtype, weight.dtype), len(beside)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_head = ctx.saved_tensors
        states, head = ctx.dtypes
        rest = (None,) * (4 + ctx.beside)
        return of_states.to(states) * outer[0].to(states), (of_head * outer[0]).to(head), *rest


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *beside: Tensor,
    cap: float | None = None,
    each: Chunk = chunk,
) -> Tensor:
    """The summed cross-entropy of `x @ weight.T`: (N, C), (V, C), (N,) -> () in fp32; IGNORED labels count nothing.

    The products run in autocast's dtype where it is on. `cap` bounds the logits (Gemma 2). `each` computes a chunk:
    `chunk`, what torch.compile made of it, or another loss, which may read the same rows of `beside`, (N, ...) each,
    that no gradient goes to.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    found: Tensor = _Fused.apply(x, weight, labels, cap, each, dtype, *beside)  # type: ignore[no-untyped-call]
    return found
