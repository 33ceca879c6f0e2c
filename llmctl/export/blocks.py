"""A stack of blocks with its last norm, as model/trunk.py has it: encoders, and both halves of an encoder-decoder.

Attention is the standard operator with a mask of its own: ONNX Runtime's CPU kernel for it takes two thirds of the time
of com.microsoft's MultiHeadAttention [ran: ORT 1.31, short texts]. `portable` gives it heads apart, (B, H, T, D), since
TensorRT takes nothing else; ONNX Runtime splits (B, T, H*D) faster itself, where nothing is done to the heads before.

B batch, T query tokens, S key tokens, C channels, H heads, K key/value heads, D head size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from llmctl.export import ort, portable
from llmctl.export.builder import Graph
from llmctl.export.portable import capped_attention, heads, rotated
from llmctl.export.sublayers import head_norm, mlp, norm
from llmctl.model import trunk

Attend = Callable[[str, int, str], str]  # the layer's name and number, and what it reads: (B, T, C) -> (B, T, C)


class Sight(NamedTuple):
    """Who sees whom and where everyone stands: what the attention of every layer reads."""

    masks: Mapping[str, str]  # of each layer type: (B, 1, T, S) bool, or (B, H, T, S) added to the scores
    tables: Mapping[str, tuple[str, str]] = {}  # cosines and sines of each layer type, where positions are turned
    positions: str = ""  # (B, T) int64, with them


def blocks(g: Graph, name: str, x: str, depth: int, attend: Attend, cross: Attend | None = None) -> str:
    """Embedded tokens through the stack called `name` and its last norm, (B, T, C) -> (B, T, C)."""
    c = g.config
    # SkipLayerNormalization takes nine times as long as Add and LayerNormalization on a CPU [ran: ORT 1.31]
    add_norm = ort.add_norm if g.form.profile == "ort" and c.norm == "rms" else portable.add_norm
    if c.norm_place == "post":
        for i in range(depth):
            layer = f"{name}.layers.{i}"
            _, x = add_norm(g, attend(layer, i, x), x, f"{layer}.post_attention_layernorm", sum_out="")
            _, x = add_norm(g, mlp(g, layer, x), x, f"{layer}.post_feedforward_layernorm", sum_out="")
        return x
    first, both = f"{name}.layers.0.input_layernorm", c.norm_place == "both"
    normed = x if c.skip_first_norm else norm(g, x, first, out=f"{first}.out")
    for i in range(depth):
        layer, last = f"{name}.layers.{i}", i == depth - 1
        given, before = attend(layer, i, normed), f"{layer}.post_attention_layernorm"
        if both:
            given, before = norm(g, given, before, out=f"{before}.out"), f"{layer}.pre_feedforward_layernorm"
        if cross is not None:
            x, normed = add_norm(g, given, x, f"{layer}.cross_attn_layernorm", sum_out=f"{layer}.self_attended")
            given = cross(layer, i, normed)
        x, normed = add_norm(g, given, x, before, sum_out=f"{layer}.attended")
        given, following = mlp(g, layer, normed), f"{name}.layers.{i + 1}.input_layernorm"
        if both:
            given = norm(g, given, f"{layer}.post_feedforward_layernorm", out=f"{layer}.post_feedforward_layernorm.out")
        x, normed = add_norm(g, given, x, f"{name}.norm" if last else following, sum_out="" if last else f"{layer}.out")
    return normed


def self_attention(g: Graph, layer: str, index: int, x: str, at: Sight) -> str:
    """(B, T, C) -> (B, T, C), a whole text at once."""
    c, name, kind = g.config, f"{layer}.self_attn", g.config.layer_type(index)
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    packed = g.linear(x, name, ("q_proj", "k_proj", "v_proj"), bias=c.attention_bias, out=f"{name}.qkv")
    q, k, v = parts = [f"{name}.{part}" for part in "qkv"]
    g.op("Split", packed, g.constant("qkv_sizes", [H * D, K * D, K * D]), out=parts, axis=-1)
    if c.qk_norm:  # before rotation, as Qwen3 does
        q, k = head_norm(g, q, f"{name}.q_norm", H), head_norm(g, k, f"{name}.k_norm", K)
    apart = g.form.profile == "portable" or bool(at.tables) or c.attn_logit_softcapping is not None
    if apart:
        q, k, v = (heads(g, part, count) for part, count in ((q, H), (k, K), (v, K)))
    if at.tables:
        q, k = (rotated(g, part, at.tables[kind], at.positions) for part in (q, k))
    return attended(g, name, q, k, v, at.masks[kind], apart=apart)


def attended(g: Graph, name: str, q: str, k: str, v: str, mask: str, *, apart: bool) -> str:
    """Attention and its output projection; `apart`: q, k, v are (B, heads, tokens, D), else (B, tokens, heads*D)."""
    c = g.config
    H, D = c.num_attention_heads, c.head_dim
    options: dict[str, Any] = {} if apart else {"q_num_heads": H, "kv_num_heads": c.num_key_value_heads}
    if c.attn_logit_softcapping is None:
        options["scale"] = 1 / math.sqrt(D) if c.attention_scale is None else c.attention_scale
        mixed = g.op("Attention", q, k, v, mask, out=f"{name}.mixed", **options)
    else:
        mixed = capped_attention(g, name, q, k, v, mask)
    if apart:
        mixed = g.op("Transpose", mixed, out=f"{name}.mixed.together", perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.constant(f"flat_{H}", [0, 0, H * D]), out=f"{name}.mixed.flat")
    return g.linear(mixed, name, ("o_proj",), bias=c.attention_output_bias, out=f"{name}.o_proj")


def steps(g: Graph, size: str, name: str) -> str:
    """0, 1, ... up to a scalar: (size,) int64."""
    return g.op("Range", g.constant("zero", 0), size, g.constant("step", 1), out=name)


def size(g: Graph, x: str, axis: int, name: str) -> str:
    """The length of an axis, as a scalar."""
    return g.op("Squeeze", g.op("Shape", x, out=f"{name}_1d", start=axis, end=axis + 1), out=name)


def relative_bias(g: Graph, stack: str, queries: str, keys: str, *, causal: bool) -> str:
    """T5's bias by distance of the positions (T,) and (S,): (1, H, T, S).

    Which row of its table a distance has is worked out here, up to where all have the last one: a logarithm that a
    runtime rounds in its own way would put a distance on the edge into another.
    """
    c, far = g.config, g.config.relative_attention_max_distance
    rows = trunk.buckets(c, torch.arange(-far, far + 1), causal=causal).numpy()
    column = g.op("Unsqueeze", queries, g.constant("one", [1]), out=f"{stack}.queries")
    distance = g.op("Sub", keys, column, out=f"{stack}.distance")
    ends = (g.constant("least_distance", -far), g.constant("most_distance", far))
    near = g.op("Min", g.op("Max", distance, ends[0], out=f"{stack}.not_before"), ends[1], out=f"{stack}.near")
    place = g.op("Add", near, ends[1], out=f"{stack}.place")
    bucket = g.op("Gather", g.constant(f"{stack}.buckets", rows.astype(np.int64)), place, out=f"{stack}.bucket")
    bias = g.op("Gather", g.weight(f"{stack}.relative_bias.weight"), bucket, out=f"{stack}.bias_by_row")  # (T, S, H)
    first = g.op("Transpose", bias, out=f"{stack}.bias_by_head", perm=[2, 0, 1])
    return g.op("Unsqueeze", first, g.constant("batch_axis", [0]), out=f"{stack}.bias")
