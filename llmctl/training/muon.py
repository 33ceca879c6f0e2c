"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose update of a matrix is made orthogonal.

It computes what torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does, many matrices at a time: those of one shape
are stacked, so that each product of the iteration is one call, and matrices this small keep a core busy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

# Newton-Schulz: five times X <- aX + (bG + cG^2)X with G = XX^T. Jordan's coefficients have the steepest slope at zero
# that ends with singular values of about 0.7 to 1.2, which trains as well as 1 does.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# Elements stacked at most. On a CPU what a core's cache holds, 1 MB in bf16: four matrices of 384 x 384 at a time take
# 15 % less than all 24 at once. A GPU is busy long before this; there it bounds the memory.
STACKED = {"cpu": 2**19}
STACKED_GPU = 2**25


class Muon(Optimizer):
    """Momentum (Nesterov), made orthogonal; decoupled weight decay. For matrices only.

    An update has a root mean square of about 0.2 learning rates whatever the shape (Moonlight, Liu et al. 2025,
    arXiv:2502.16982), the size of AdamW's, so one learning rate serves both. `products` is what the iteration computes
    in: bf16 is exact enough (Jordan's post), and takes a quarter of fp32's time where hardware multiplies it.

    A step on one thread of an AMD EPYC with AVX512-BF16, and torch.optim.Muon's: 9.4 and 14.3 ms for 28 matrices of 128
    x 128 to 128 x 384, where calls cost more than products; 280 and 275 ms for 42 of 384 x 384 to 384 x 1024, which are
    products alone.

    Sharded gradients (DTensor, FSDP2) are put together for the iteration, in `products`, and each rank keeps its part:
    all ranks must step together. The state of a parameter is its "momentum_buffer", sharded as the parameter is.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._products = products

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # torch's closure has no use here
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for stack in _stacks(trained):
                weights = _local(stack)
                gradients = _local([p.grad for p in stack if p.grad is not None])
                momenta = _local([self.state[p]["momentum_buffer"] for p in stack])
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                wanted = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = _sharded(orthogonal(_whole(wanted, stack, self._products)), stack)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(stack[0].shape))
                torch._foreach_add_(weights, updates, alpha=-rate)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices of one shape, or its transpose, each as near to UV^T of its singular value decomposition as five
    iterations bring it, in the matrices' dtype."""
    wide = [matrix if _is_wide(matrix) else matrix.mT for matrix in matrices]  # the smaller Gram matrix
    # torch.bmm copies the transposed side of a stack of one
    x, plus_product = (torch.stack(wide), torch.baddbmm) if len(wide) > 1 else (wide[0], torch.addmm)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = plus_product(x, plus_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    every = x.unbind() if len(wide) > 1 else (x,)
    return [done if _is_wide(matrix) else done.mT for matrix, done in zip(matrices, every, strict=True)]


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _stacks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters by shape, a shape and its transpose together, so many at a time as one stack holds."""

    def kind(p: Tensor) -> tuple[str, list[int]]:
        return str(p.device), sorted(p.shape)

    for _, alike in itertools.groupby(sorted(parameters, key=kind), kind):
        stack = list(alike)
        size = max(1, STACKED.get(stack[0].device.type, STACKED_GPU) // stack[0].numel())
        yield from (stack[first : first + size] for first in range(0, len(stack), size))


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What of each is on this rank, the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _whole(parts: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The matrices of which this rank has parts, placed as `like` is."""
    return [
        DTensor.from_local(
            part.to(dtype), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        ).full_tensor()
        if isinstance(p, DTensor)
        else part.to(dtype)
        for part, p in zip(parts, like, strict=True)
    ]


def _sharded(matrices: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts of matrices that every rank has. Nothing is sent."""
    return [
        distribute_tensor(matrix, p.device_mesh, p.placements, src_data_rank=None).to_local()
        if isinstance(p, DTensor)
        else matrix
        for matrix, p in zip(matrices, like, strict=True)
    ]
