"""Matrices as the CPU's own products want them, in a model that is loaded to run and not to be trained.

Decoding reads every weight for every token, so it is as fast as its products read memory. With one row and SmolLM2's
shapes torch's own products read 17 to 23 GB/s in bf16 and 18 in fp32 where the machine reads 38 (two cores of an EPYC
with AVX512-BF16); oneDNN's operator reads 26 to 31, in fp32 over the weights as they lie, in bf16 over weights in its
own blocked layout. In bf16 its results are equal bit by bit; in fp32 sums are taken in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.dynamic import DynamicHead, DynamicLinear
from llmctl.model.sublayers import MLP, Attention, Block, RMSNorm
from llmctl.model.transformer import Decoder, EncoderDecoder


class PackedLinear(nn.Module):
    """`nn.Linear` through oneDNN: the operators that torch.compile uses for frozen weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        laid = weight.detach()
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(laid, 1) if laid.dtype == torch.bfloat16 else laid
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return out


class PackedNorm(nn.Module):
    """`RMSNorm` of one token in the one kernel of layer norm: half the time, which 61 norms a token feel (4 %).

    Beside its negative a vector has a mean of zero, and then its variance is the mean of its squares.
    """

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.plain, self.size = plain, len(plain.weight)
        gain = 1.0 + plain.weight.detach().float() if plain.offset else plain.weight.detach()
        self.gain = torch.cat((gain, gain))

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        if x.numel() != self.size:
            return self.plain(x)  # type: ignore[no-any-return]
        pair = torch.cat((x, -x), -1)
        return F.layer_norm(pair, self.gain.shape, self.gain, None, self.plain.eps)[..., : self.size]


def pack(model: nn.Module) -> None:
    """Packs the matrices of every block of `model` and a writer's head in place, where this machine can.

    What is copied into another layout anyway is joined to one matrix where the input is the same: a product of few rows
    costs little more than its call. Other weights stay where they are, views of a mapped file too.
    """
    first = next(model.parameters())
    if not packable(first) or any(isinstance(module, DynamicLinear | DynamicHead) for module in model.modules()):
        return
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for module in list(block.modules()):
            if first.dtype == torch.bfloat16 and isinstance(module, Attention):
                module.qkv_proj = join(module.q_proj, module.k_proj, module.v_proj)
                del module.q_proj, module.k_proj, module.v_proj
            if first.dtype == torch.bfloat16 and isinstance(module, MLP) and module.gated:
                module.gate_up_proj = join(module.gate_proj, module.up_proj)
                del module.gate_proj, module.up_proj
            for name, part in list(module.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(module, name, PackedLinear(part.weight, part.bias))
                elif isinstance(part, RMSNorm):
                    setattr(module, name, PackedNorm(part))
    if isinstance(model, Decoder | EncoderDecoder):
        model.head_proj = PackedLinear(model.head_weight())


def join(*parts: nn.Linear) -> PackedLinear:
    """One matrix out of several: its outputs are theirs, side by side."""
    biases = tuple(part.bias for part in parts if part.bias is not None)
    return PackedLinear(torch.cat(tuple(part.weight for part in parts)), torch.cat(biases) if biases else None)


def packable(weight: Tensor) -> bool:
    """Whether oneDNN takes such a matrix on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
