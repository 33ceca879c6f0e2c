"""The sublayers of the `portable` profile: operators of the ONNX standard alone, opset 24, as TensorRT takes them too.

The cache is a buffer of a fixed length M that TensorScatter writes the new tokens into at each row's own place: present
is past with a few rows changed, so a runtime may keep both at one address. Attention gets a bool mask of who sees whom
(never is_causal, whose meaning beside a cache an erratum changed), which the positions alone decide: a token sees every
place up to its own. So rows of a batch may hold and get different numbers of tokens; what pads a row on the right is
written behind its end, where nobody looks and the next token overwrites it.

Operators: https://onnx.ai/onnx/operators/. TensorRT takes 4-D heads and no soft-cap, so a cap is spelled out.

B batch, T new tokens, M places of the cache, C channels, H heads, K key/value heads, G = H / K, D head size
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from llmctl.export.builder import IDS, KEPT, Graph, cache_values, logits, value
from llmctl.export.form import Form
from llmctl.export.sublayers import capped, norm, rotations
from llmctl.model.config import FULL, SLIDING, Config

HIDDEN = -6e4  # a score that does not count; fp16 holds it


def inputs(form: Form, c: Config) -> list[onnx.ValueInfoProto]:
    """input_ids and position_ids (B, T), past (B, K, M, D) a layer. A row's positions follow each other; the first says
    where its new tokens are written.
    """
    places = value("position_ids", TensorProto.INT64, "batch_size", "sequence_length")
    return [IDS, places, *cache_values(form, c, "past_key_values", "max_sequence_length"), KEPT]


def outputs(form: Form, c: Config) -> list[onnx.ValueInfoProto]:
    """logits (B, T, V) and present (B, K, M, D) a layer."""
    return [logits(c), *cache_values(form, c, "present", "max_sequence_length")]


def unbuilt(c: Config) -> dict[str, Any]:
    """See `graph.unbuilt`."""
    return {}


class Cursor(NamedTuple):
    """Where the new tokens stand: the values that every layer's attention reads."""

    positions: str  # (B, T) int64
    first: str  # (B,) int64: where each row's new tokens are written
    masks: Mapping[str, str]  # (B, 1, T, M) bool of each layer type: who sees whom
    tables: Mapping[str, tuple[str, str]]  # cosines and sines (positions, R/2) of each layer type; may be empty


def cursor(g: Graph) -> Cursor:
    """Places of the cache against positions."""
    c, zero, one = g.config, g.constant("zero", 0), g.constant("step", 1)
    length = g.op("Shape", "past_key_values.0.key", out="max_length_1d", start=2, end=3)
    places = g.op("Range", zero, g.op("Squeeze", length, out="max_length"), one, out="places")  # (M,)
    column = g.op("Unsqueeze", "position_ids", g.constant("query_axes", [1, 3]), out="queries")  # (B, 1, T, 1)
    masks = dict.fromkeys((FULL, SLIDING), g.op("LessOrEqual", places, column, out="seen"))
    if SLIDING in c.layer_types and c.sliding_window is not None:
        nearest = g.op("Sub", column, g.constant("sliding_window", c.sliding_window), out="window_ends_at")
        near = g.op("Greater", places, nearest, out="near")
        masks[SLIDING] = g.op("And", "seen", near, out="seen_in_window")
    first = g.op("Gather", "position_ids", zero, out="write_indices", axis=1)
    return Cursor("position_ids", first, masks, rotations(g, "fp32"))


def add_norm(g: Graph, x: str, residual: str, name: str, *, sum_out: str) -> tuple[str, str]:
    """(x + residual, its norm); `sum_out` "" where nothing else reads the sum."""
    total = g.op("Add", x, residual, out=sum_out or f"{name}.sum")
    return total, norm(g, total, name, out=f"{name}.out")


def attention(g: Graph, index: int, x: str, at: Cursor) -> str:
    """(B, T, C) -> (B, T, C), reading past_key_values.N and writing present.N."""
    c, layer, kind = g.config, f"model.layers.{index}.self_attn", g.config.layer_type(index)
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    g.linear(x, layer, ("q_proj", "k_proj", "v_proj"), bias=c.attention_bias, out=f"{layer}.qkv")
    flat = [f"{layer}.{name}_proj" for name in "qkv"]
    g.op("Split", f"{layer}.qkv", g.constant("qkv_sizes", [H * D, K * D, K * D]), out=flat, axis=-1)
    q, k, v = (heads(g, part, count) for part, count in zip(flat, (H, K, K), strict=True))
    if c.qk_norm:  # before rotation, as Qwen3 does
        q, k = (norm(g, part, f"{layer}.{n}_norm", out=f"{layer}.{n}_norm.out") for part, n in ((q, "q"), (k, "k")))
    if at.tables:
        q, k = (rotated(g, part, at.tables[kind], at.positions) for part in (q, k))

    for name, new in (("key", k), ("value", v)):
        g.op("TensorScatter", f"past_key_values.{index}.{name}", new, at.first, out=f"present.{index}.{name}", axis=-2)
    k, v = (f"present.{index}.{name}" for name in ("key", "value"))
    if c.attn_logit_softcapping is None:
        scale = 1 / math.sqrt(D) if c.attention_scale is None else c.attention_scale
        mixed = g.op("Attention", q, k, v, at.masks[kind], out=f"{layer}.mixed", scale=scale)
    else:
        mixed = capped_attention(g, layer, q, k, v, at.masks[kind])
    rows = g.op("Transpose", mixed, out=f"{layer}.mixed.rows", perm=[0, 2, 1, 3])
    attended = g.op("Reshape", rows, g.constant("joined_heads", [0, 0, H * D]), out=f"{layer}.attended")
    return g.linear(attended, layer, ("o_proj",), bias=c.attention_output_bias, out=f"{layer}.o_proj")


def heads(g: Graph, x: str, count: int) -> str:
    """(B, T, heads*D) -> (B, heads, T, D)."""
    split = g.op("Reshape", x, g.constant(f"heads_{count}", [0, 0, count, g.config.head_dim]), out=f"{x}.split")
    return g.op("Transpose", split, out=f"{x}.heads", perm=[0, 2, 1, 3])


def rotated(g: Graph, x: str, table: tuple[str, str], positions: str) -> str:
    """(B, heads, T, D) turned by its positions, in fp32 as the model does: halves are too coarse for the tables."""
    c, half = g.config, g.form.dtype != "fp32"
    part: dict[str, Any] = {"rotary_embedding_dim": c.rotary_dim} if c.rotary_dim < c.head_dim else {}
    wide = g.op("Cast", x, out=f"{x}.fp32", to=TensorProto.FLOAT) if half else x
    turned = g.op("RotaryEmbedding", wide, *table, positions, out=f"{x}.turned", **part)
    return g.op("Cast", turned, out=f"{x}.rotated", to=g.form.type) if half else turned


def capped_attention(g: Graph, layer: str, q: str, k: str, v: str, mask: str) -> str:
    """softmax(cap(scale q k^T)) v, the heads of a group beside each other: (B, H, T, D), twice (B, K, M, D)."""
    c, cap = g.config, g.config.attn_logit_softcapping
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    assert cap is not None
    scale = g.scalar("attention_scale", 1 / math.sqrt(D) if c.attention_scale is None else c.attention_scale)
    if H != K:  # (B, K, G, T, D) against (B, K, 1, M, D)
        groups, axis = g.constant("head_groups", [0, K, H // K, -1, D]), g.constant("group_axis", [2])
        q = g.op("Reshape", q, groups, out=f"{layer}.q.grouped")
        k, v = (g.op("Unsqueeze", part, axis, out=f"{layer}.{n}.grouped") for part, n in ((k, "k"), (v, "v")))
        mask = g.op("Unsqueeze", mask, axis, out=f"{layer}.mask.grouped")
    order = [0, 1, 3, 2] if H == K else [0, 1, 2, 4, 3]
    turned = g.op("Transpose", k, out=f"{layer}.k.turned", perm=order)
    products = g.op("MatMul", g.op("Mul", q, scale, out=f"{layer}.q.scaled"), turned, out=f"{layer}.products")
    scores = capped(g, products, cap, "attn_logit_softcapping", out=f"{layer}.scores")
    visible = g.op("Where", mask, scores, g.scalar("hidden_score", HIDDEN), out=f"{layer}.visible")
    weights = g.op("Softmax", visible, out=f"{layer}.weights", axis=-1)
    mixed = g.op("MatMul", weights, v, out=f"{layer}.grouped" if H != K else f"{layer}.mixed")
    if H == K:
        return mixed
    return g.op("Reshape", mixed, g.constant("all_heads", [0, H, -1, D]), out=f"{layer}.mixed")
