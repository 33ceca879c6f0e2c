"""Activation-aware scaling (AWQ, Lin et al. 2023, arXiv:2306.00978): channels that carry much are made larger before
rounding, and what comes before them smaller, so that the product stays and its rounding errors shrink where they count.

The scale of a channel is its activations' root mean square to a power between 0 and 1 that is tried out. It is folded
into the norm or the matrix whose output the channels are, and costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from llmctl.export.quantizing.calibration import Hessians
from llmctl.export.quantizing.rounding import cost
from llmctl.model.quant import Scheme, nearest
from llmctl.model.sublayers import Block, RMSNorm

POWERS = tuple(i / 10 for i in range(11))


def scale_block(block: Block, hessians: Hessians, scheme_of: Callable[[str, int], Scheme]) -> None:
    """Scales the channels within a block in place, and `hessians` with them.

    Args:
        scheme_of: how a matrix will be rounded, by its name in the block and its columns.
    """
    for source, readers in pairs(block):
        columns = hessians[readers[0]].shape[0]
        hessian = hessians[readers[0]]
        matrices = {name: block.get_parameter(f"{name}.weight").detach() for name in readers}
        base = hessian.diag().clamp(min=1e-12).sqrt()
        best, chosen = float("inf"), None
        for power in POWERS:
            scale = base**power
            scale = scale / (scale.max() * scale.min()).sqrt()
            found = 0.0
            for name, matrix in matrices.items():
                values = nearest(matrix * scale, scheme_of(name, columns)).values() / scale
                found += cost(matrix, values, hessian)
            if found < best:
                best, chosen = found, scale
        if chosen is None:
            continue
        divide(source, chosen)
        for name in readers:
            block.get_parameter(f"{name}.weight").data = matrices[name] * chosen
            hessians[name] = hessian / (chosen[:, None] * chosen)


def pairs(block: Block) -> list[tuple[nn.Module, Sequence[str]]]:
    """What gives channels, and the matrices that read nothing but them."""
    found: list[tuple[nn.Module, Sequence[str]]] = []
    attention, mlp = block.self_attn, block.mlp
    feeding = ["mlp.gate_proj", "mlp.up_proj"] if mlp.gated else ["mlp.up_proj"]
    if block.place != "post":
        if not isinstance(block.input_layernorm, nn.Identity):
            found.append((block.input_layernorm, [f"self_attn.{name}_proj" for name in "qkv"]))
        found.append(
            (block.pre_feedforward_layernorm if block.place == "both" else block.post_attention_layernorm, feeding)
        )
    if attention.heads[0] == attention.heads[2]:
        found.append((attention.v_proj, ["self_attn.o_proj"]))
    if mlp.gated:
        found.append((mlp.up_proj, ["mlp.down_proj"]))
    return found


def divide(source: nn.Module, scale: Tensor) -> None:
    """Makes the outputs of a norm or a linear layer smaller by `scale`, (C,)."""
    for given in source.parameters(recurse=False):  # the weight, and the bias where there is one
        if isinstance(source, RMSNorm) and source.offset:
            given.data = (1.0 + given.data) / scale - 1.0
        else:
            given.data = given.data / (scale if given.ndim == 1 else scale[:, None])
