"""From a matrix to its codes: the grid of a block searched by least squares, and GPTQ's order of rounding on it.

W (out, in) is the matrix, X (in, tokens) what it is multiplied with, H = X X^T / tokens (in, in); what rounding to Q
costs is the mean of |(Q - W) x|^2, the sum of (Q - W) H (Q - W)^T's diagonal: `cost`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.model.quant import Quantized, Scheme, blocks_of, codes_of, nearest

SHRINKS = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8), 8: (1.0,)}  # of a block's range, both ends by themselves
VALUES = 1 << 21  # searched at once
FLOOR = 0.02  # of the mean importance, for what the calibration never saw
DAMPING = 0.01  # of the mean of H's diagonal, added to it (Frantar et al. 2022, section 3.3)
PANEL = 128  # columns whose errors are carried to the rest at once


def cost(matrix: Tensor, values: Tensor, hessian: Tensor) -> float:
    """The mean squared error that `values` (out, in) in place of `matrix` make in the product."""
    error = values - matrix
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def searched(matrix: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """The scale and zero point of each block that leave the smallest squared error.

    As llama.cpp's k-quants do: ranges a little narrower than a block's own are tried, and under each the scale is set
    by weighted least squares given the codes (ggml-quants.c, make_qkx3_quants), here with whole zero points.

    Args:
        importance: (in,) weights of the squares: the diagonal of H; None for all alike.
    """
    if scheme.dynamic:
        return nearest(matrix, scheme)
    rows = max(1, VALUES // matrix.shape[1])
    grids = [grid(part, scheme, importance) for part in torch.split(matrix, rows)]
    scales = torch.cat([scales for scales, _ in grids])
    zeros = None if scheme.symmetric else torch.cat([zeros for _, zeros in grids]).to(torch.uint8)
    return Quantized(scheme, codes_of(matrix, scheme, scales, zeros), scales, zeros)


def grid(matrix: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points by `searched`, both (out, blocks) fp32."""
    x, top = blocks_of(matrix, scheme), (1 << scheme.bits) - 1  # (out, blocks, width)
    weights = torch.ones(x.shape[-1]) if importance is None else blocks_of(importance[None], scheme)
    weights = weights + FLOOR * weights.mean() + 1e-12
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    widest = torch.maximum(-low, high)
    plain = nearest(matrix, scheme)
    scales = plain.scales
    middle = torch.tensor(float(1 << (scheme.bits - 1)))
    zeros = middle.expand_as(scales) if plain.zeros is None else plain.zeros.float()
    q = plain.codes.float() if x.numel() == plain.codes.numel() else blocks_of(plain.codes, scheme)
    best = (weights * (x - (q.view_as(x) - zeros[:, :, None]) * scales[:, :, None]).square()).sum(-1)
    shrinks = SHRINKS[scheme.bits]
    ranges = (
        [(-widest * a, widest * a) for a in (1.07, *shrinks)]
        if scheme.symmetric
        else [(low * a, high * b) for a in shrinks for b in shrinks]
    )
    for bottom, ceiling in ranges:
        step = ((ceiling - bottom) / top).clamp(min=1e-30)
        zero = middle.expand_as(step) if scheme.symmetric else (-bottom / step).round().clamp(0, top)
        q = (x / step[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, top).sub_(zero[:, :, None])
        weighted = weights * q
        step = (weighted * x).sum(-1) / (weighted * q).sum(-1).clamp(min=1e-30)
        error = (weights * (x - q * step[:, :, None]).square()).sum(-1)
        better = (error < best) & (step > torch.finfo(torch.float32).tiny)
        best, scales, zeros = (torch.where(better, a, b) for a, b in ((error, best), (step, scales), (zero, zeros)))
    return scales, zeros


def gptq(matrix: Tensor, scheme: Scheme, hessian: Tensor, ordered: bool = False, damping: float = DAMPING) -> Quantized:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after another, and what rounding one did
    to the product is made good by those that are left.

    The grid of a block is searched when its first column comes, on the weights as they are by then.

    Args:
        hessian: H, (in, in).
        ordered: columns of a large diagonal first ("act-order"); the grids are then those of the original weights.
    """
    columns, width = matrix.shape[1], scheme.width(matrix.shape[1])
    order = torch.argsort(hessian.diag(), descending=True, stable=True) if ordered else torch.arange(columns)
    left = matrix.float()[:, order].clone()
    carried = inverse_factor(hessian[order][:, order], damping)
    plain = searched(matrix, scheme, hessian.diag())
    scales, zeros = plain.scales.clone(), None if plain.zeros is None else plain.zeros.clone()
    codes, top = torch.empty_like(plain.codes), (1 << scheme.bits) - 1
    middle = torch.full((len(matrix),), float(1 << (scheme.bits - 1)))
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        errors = torch.empty(len(matrix), stop - start)
        for i in range(start, stop):
            column = int(order[i])
            block = column // width
            if not ordered and column % width == 0:
                end = min(column + width, columns)
                found = searched(left[:, column:end], scheme._replace(block=0), hessian.diag()[column:end])
                scales[:, block] = found.scales[:, 0]
                if zeros is not None and found.zeros is not None:
                    zeros[:, block] = found.zeros[:, 0]
            scale, zero = scales[:, block], middle if zeros is None else zeros[:, block].float()
            code = ((left[:, i] / scale).round() + zero).clamp(0, top)
            codes[:, column] = code.to(torch.uint8)
            error = (left[:, i] - (code - zero) * scale) / carried[i, i]
            left[:, i:stop] -= error[:, None] * carried[i, i:stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ carried[start:stop, stop:]
    made = Quantized(scheme, codes, scales, zeros)
    return rescaled(matrix.float(), made, damped(hessian, damping).float())


def rescaled(matrix: Tensor, made: Quantized, hessian: Tensor) -> Quantized:
    """The same codes under the scales that cost least: a row's are the solution of its normal equations.

    A row keeps its scales where one of the others would not be positive.
    """
    width = made.scheme.width(matrix.shape[1])
    ones = Quantized(made.scheme, made.codes, torch.ones_like(made.scales), made.zeros).values()  # (out, in)
    steps = blocks_of(ones, made.scheme)  # (out, blocks, width)
    spread = torch.zeros(*made.scales.shape, made.scales.shape[1], dtype=torch.float64)
    wanted = torch.zeros_like(made.scales, dtype=torch.float64)
    for block in range(made.scales.shape[1]):
        columns = slice(block * width, (block + 1) * width)
        moved = ones[:, columns] @ hessian[columns]  # (out, in)
        spread[:, block] = (blocks_of(moved, made.scheme) * steps).sum(-1)
        wanted[:, block] = (moved * matrix).sum(-1)
    spread.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-30)
    scales = torch.linalg.solve(spread, wanted).float()
    sound = torch.isfinite(scales).all(1) & (scales > 0.5 * made.scales).all(1) & (scales < 2 * made.scales).all(1)
    scales = torch.where(sound[:, None], scales, made.scales)
    return Quantized(made.scheme, made.codes, scales, made.zeros)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H in fp64 with a share of its diagonal's mean added to the diagonal."""
    wide = hessian.double()
    return wide + torch.diag_embed(torch.full((len(wide),), damping * float(wide.diagonal().mean()) + 1e-12))


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H's inverse, with enough on the diagonal to be one."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
