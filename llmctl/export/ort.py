"""The sublayers of the `ort` profile: ONNX Runtime's own fused operators, which its CPU and CUDA kernels run fastest.

GroupQueryAttention (com.microsoft) rotates, appends to the cache and attends in one node, over past and present buffers
that may be one and the same; each residual is added by the norm that follows it.

Contrib operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

B batch, T new tokens, P past, S = P + T, C channels, H heads, K key/value heads, D head size
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from llmctl.export.builder import CONTRIB, IDS, KEPT, Graph, cache_values, logits, value
from llmctl.export.form import Form
from llmctl.export.sublayers import gains, head_norm, rotations
from llmctl.model.config import SLIDING, Config

HEAD_STEP = 8  # GroupQueryAttention takes heads whose size is a multiple of this [ran: ORT 1.31]
FUSED_ROTARY = 16  # and rotates those whose size is a multiple of this [ran: ORT 1.31]


def inputs(form: Form, c: Config) -> list[onnx.ValueInfoProto]:
    """input_ids (B, T), attention_mask (B, S), past (B, K, P, D) a layer, under the names that optimum and
    onnxruntime-genai load.
    """
    mask = value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length")
    return [IDS, mask, *cache_values(form, c, "past_key_values", "past_sequence_length"), KEPT]


def outputs(form: Form, c: Config) -> list[onnx.ValueInfoProto]:
    """logits (B, T, V) and present (B, K, S, D) a layer."""
    return [logits(c), *cache_values(form, c, "present", "present_sequence_length")]


def unbuilt(c: Config) -> dict[str, Any]:
    """See `graph.unbuilt`."""
    return {"head_dim": c.head_dim if c.head_dim % HEAD_STEP else 0}


class Cursor(NamedTuple):
    """Where the new tokens stand: the values that every layer's attention reads."""

    seqlens_k: str  # (B,) int32: the row's tokens so far and new, less one
    total: str  # scalar int32: S
    tables: Mapping[str, tuple[str, str]]  # cos and sin (max_position_embeddings, R/2) of each layer type; may be empty
    positions: str  # (B, T) int64, or "" where nothing but GroupQueryAttention needs them


def cursor(g: Graph) -> Cursor:
    """Lengths from the mask, whose ones may be followed by padding, and the rotary tables."""
    c, one = g.config, g.constant("one", [1])
    tokens = g.op("ReduceSum", "attention_mask", one, out="tokens", keepdims=0)  # (B,)
    g.op("Cast", g.op("Sub", tokens, one, out="tokens_less_one"), out="seqlens_k", to=TensorProto.INT32)
    longest = g.op("Squeeze", g.op("Shape", "attention_mask", out="longest_1d", start=1, end=2), out="longest")
    g.op("Cast", longest, out="total_sequence_length", to=TensorProto.INT32)

    tables = rotations(g)
    needed = c.positions == "learned" or (bool(tables) and not rotates_itself(c))
    return Cursor("seqlens_k", "total_sequence_length", tables, positions(g, tokens) if needed else "")


def rotates_itself(c: Config) -> bool:
    """Whether GroupQueryAttention can turn heads of this size."""
    return c.rotary_dim == c.head_dim and c.head_dim % FUSED_ROTARY == 0


def positions(g: Graph, tokens: str) -> str:
    """(B, T): past + t, where past = tokens - T, but 0 in a first prompt, whose padded rows are shorter than T."""
    zero, one = g.constant("zero", 0), g.constant("step", 1)
    new = g.op("Squeeze", g.op("Shape", "input_ids", out="new_1d", start=1, end=2), out="new")
    past = g.op("Max", g.op("Sub", tokens, new, out="tokens_less_new"), zero, out="past")
    column = g.op("Unsqueeze", past, g.constant("one", [1]), out="past_column")
    return g.op("Add", column, g.op("Range", zero, new, one, out="steps"), out="positions")


def add_norm(g: Graph, x: str, residual: str, name: str, *, sum_out: str) -> tuple[str, str]:
    """(x + residual, its norm) in one node; `sum_out` "" where nothing reads the sum."""
    kind = "SkipSimplifiedLayerNormalization" if g.config.norm == "rms" else "SkipLayerNormalization"
    outs = [f"{name}.out", "", "", sum_out] if sum_out else [f"{name}.out"]
    options: dict[str, Any] = {"domain": CONTRIB, "epsilon": g.config.norm_eps}
    return sum_out, g.op(kind, x, residual, *gains(g, name), out=outs, **options)


def attention(g: Graph, index: int, x: str, at: Cursor) -> str:
    """(B, T, C) -> (B, T, C), reading past_key_values.N and writing present.N."""
    c, layer, kind = g.config, f"model.layers.{index}.self_attn", g.config.layer_type(index)
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    names, tables = ("q_proj", "k_proj", "v_proj"), at.tables.get(kind, ("", ""))
    q, k, v = g.linear(x, layer, names, bias=c.attention_bias, out=f"{layer}.qkv"), "", ""
    apart = bool(at.tables) and not rotates_itself(c)

    if c.qk_norm or apart:  # otherwise the node takes q, k and v packed as they are
        q, k, v = parts = [f"{layer}.{name}" for name in "qkv"]
        g.op("Split", f"{layer}.qkv", g.constant("qkv_sizes", [H * D, K * D, K * D]), out=parts, axis=-1)
    if c.qk_norm:  # before rotation, as Qwen3 does
        q, k = head_norm(g, q, f"{layer}.q_norm", H), head_norm(g, k, f"{layer}.k_norm", K)
    if apart:
        turned: dict[str, Any] = {"rotary_embedding_dim": c.rotary_dim if c.rotary_dim < D else 0}
        q = g.op("RotaryEmbedding", q, *tables, at.positions, out=f"{layer}.q.rotated", num_heads=H, **turned)
        k = g.op("RotaryEmbedding", k, *tables, at.positions, out=f"{layer}.k.rotated", num_heads=K, **turned)
        tables = ("", "")

    past = [f"past_key_values.{index}.{name}" for name in ("key", "value")]
    outs = [f"{layer}.attended", *(f"present.{index}.{name}" for name in ("key", "value"))]
    options: dict[str, Any] = {"num_heads": H, "kv_num_heads": K, "do_rotary": int(bool(tables[0]))}
    options["scale"] = 1 / math.sqrt(D) if c.attention_scale is None else c.attention_scale
    if c.attn_logit_softcapping is not None:
        options["softcap"] = c.attn_logit_softcapping
    if kind == SLIDING and c.sliding_window is not None:
        options["local_window_size"] = c.sliding_window
    scales: list[str] = []
    if g.form.cache:  # behind position_ids, attention_bias and head_sink
        named = {name: g.form.cache[f"{index}.{name}"].reshape(1, K, 1, D) for name in ("key", "value")}
        scales = ["", "", "", *(g.table(f"{layer}.{name}.scale", table, "fp32") for name, table in named.items())]
        options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    given = [q, k, v, *past, at.seqlens_k, at.total, *tables, *scales]
    attended = g.op("GroupQueryAttention", *given, out=outs, domain=CONTRIB, **options)
    return g.linear(attended, layer, ("o_proj",), bias=c.attention_output_bias, out=f"{layer}.o_proj")
