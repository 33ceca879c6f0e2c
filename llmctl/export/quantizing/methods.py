"""A model in memory, every matrix of it replaced by its rounded values: the methods of `[export] quantize_method`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmctl.export.quantizing import awq
from llmctl.export.quantizing.calibration import Hessians, blockwise
from llmctl.export.quantizing.rounding import gptq, searched
from llmctl.model.hf import Model
from llmctl.model.quant import Quantized, Scheme, nearest
from llmctl.model.sublayers import Block
from llmctl.model.transformer import Decoder

CALIBRATED = ("gptq", "awq")
# How much the embedding is rounded for the tokens that look rows of it up, where every channel counts alike, beside the
# head that reads it: GPTQ's damping, as a share of the mean of H's diagonal. Measured in docs/benchmarks.md.
LOOKED_UP = 1.0


def rounded(
    model: Model, schemes: Mapping[str, Scheme], method: str, ids: Tensor | None = None
) -> dict[str, Quantized]:
    """Rounds the matrices of `model` in place, and returns them by their native names.

    Args:
        schemes: by native name.
        method: "rtn", "k-quant", "gptq" or "awq"; awq also moves scales between norms and matrices.
        ids: (B, T) windows of text to calibrate on; of a decoder, for gptq and awq.
    """
    found: dict[str, Quantized] = {}

    def put(name: str, matrix: Quantized) -> None:
        found[name] = matrix
        model.get_parameter(name).data = matrix.values()

    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    if method not in CALIBRATED:
        for name, scheme in schemes.items():
            put(name, (nearest if method == "rtn" else searched)(weight(name), scheme))
        return found
    assert isinstance(model, Decoder)
    assert ids is not None
    head = blockwise(model, ids, None)
    for name in schemes.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        if name == "lm_head.weight":
            put(name, gptq(weight(name), schemes[name], head))
        elif model.config.tie_word_embeddings:
            put(name, gptq(weight(name), schemes[name], head, damping=LOOKED_UP))
        else:
            put(name, searched(weight(name), schemes[name]))

    def change(index: int, block: Block, hessians: Hessians) -> None:
        native = f"model.layers.{index}.{{}}.weight".format
        if method == "awq":
            awq.scale_block(block, hessians, lambda name, columns: schemes[native(name)])
        for name, hessian in hessians.items():
            matrix, scheme = weight(native(name)), schemes[native(name)]
            put(
                native(name),
                gptq(matrix, scheme, hessian) if method == "gptq" else searched(matrix, scheme, hessian.diag()),
            )

    blockwise(model, ids, change)
    return found
