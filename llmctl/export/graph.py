"""The decoder as an ONNX graph, written from the model's config node by node, in the order of model/transformer.py.

The `ort` profile: GroupQueryAttention (com.microsoft) rotates, appends to the cache and attends in one node, over past
and present buffers that may be one and the same; each residual is added by the norm that follows it; q, k, v and gate,
up are one product each. Config's switches choose the nodes, as they choose the sublayers there; `unbuilt` names those
that have none.

Contrib operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

B batch, T new tokens, P past, S = P + T, C channels, H heads, K key/value heads, D head size, I MLP width, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from llmctl.errors import DataError
from llmctl.export.builder import CONTRIB, IDS, KEPT, Graph, head, logits, save, value
from llmctl.model import rotary
from llmctl.model.config import FULL, SLIDING, Config

HEAD_STEP = 8  # GroupQueryAttention takes heads whose size is a multiple of this [ran: ORT 1.31]
FUSED_ROTARY = 16  # and rotates those whose size is a multiple of this [ran: ORT 1.31]


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str]) -> int:
    """Writes `model`'s decoder as model.onnx and model.onnx.data into `folder` and returns the bytes of both.

    `metadata` goes into the model's properties. Memory: a few megabytes, whatever the model's size.

    Raises:
        DataError: a switch that has no node here; or the weights and the config do not fit together.
    """
    if switch := unbuilt(config):
        raise DataError(f"{switch}: the ONNX graph has no nodes for that yet", file=model / "config.json")
    mask = value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length")
    # the names that optimum and onnxruntime-genai load
    inputs = [IDS, mask, *cache_values(config, "past_key_values", "past_sequence_length"), KEPT]
    outputs = [logits(config), *cache_values(config, "present", "present_sequence_length")]
    return save(model, folder, config, metadata, decoder, inputs, outputs)


def unbuilt(c: Config) -> str:
    """The switch of a config that the graph has no nodes for; empty where it has all."""
    switches = {
        "kind": c.kind if c.kind != "decoder" else "",
        "task": c.task if c.task != "causal-lm" else "",
        "norm_place": c.norm_place if c.norm_place == "post" else "",
        "positions": c.positions if c.positions == "relative" else "",
        "rope_scaling": c.rope_scaling.kind if c.rope_scaling and c.rope_scaling.kind == "dynamic" else "",
        "embedding_norm": c.embedding_norm,
        "skip_first_norm": c.skip_first_norm,
        "position_offset": c.position_offset,
        "type_vocab_size": c.type_vocab_size,
        "head_dim": c.head_dim if c.head_dim % HEAD_STEP else 0,
        "logit_scale": c.logit_scale if c.logit_scale != 1.0 else "",
    }
    return next((f"{name} = {value}" for name, value in switches.items() if value), "")


class Cursor(NamedTuple):
    """Where the new tokens stand: the values that every layer's attention reads."""

    seqlens_k: str  # (B,) int32: the row's tokens so far and new, less one
    total: str  # scalar int32: S
    tables: Mapping[str, tuple[str, str]]  # cos and sin (max_position_embeddings, R/2) of each layer type; may be empty
    positions: str  # (B, T) int64, or "" where nothing but GroupQueryAttention needs them


def decoder(g: Graph) -> None:
    """input_ids (B, T), attention_mask (B, S), past (B, K, P, D) a layer -> logits (B, T, V), present (B, K, S, D)."""
    c, both = g.config, g.config.norm_place == "both"
    at = cursor(g)
    x = embedding(g, at)
    normed = norm(g, x, "model.layers.0.input_layernorm", out="model.layers.0.input_layernorm.out")
    for i in range(c.num_hidden_layers):
        layer, last = f"model.layers.{i}", i == c.num_hidden_layers - 1
        given, before = attention(g, i, normed, at), f"{layer}.post_attention_layernorm"
        if both:
            given, before = norm(g, given, before, out=f"{before}.out"), f"{layer}.pre_feedforward_layernorm"
        x, normed = add_norm(g, given, x, before, sum_out=f"{layer}.attended")
        given, following = mlp(g, layer, normed), f"model.layers.{i + 1}.input_layernorm"
        if both:
            given = norm(g, given, f"{layer}.post_feedforward_layernorm", out=f"{layer}.post_feedforward_layernorm.out")
        x, normed = add_norm(g, given, x, "model.norm" if last else following, sum_out="" if last else f"{layer}.out")
    capped = c.final_logit_softcapping
    scores = head(g, normed, out="logits" if capped is None else "logits.uncapped")
    if capped is not None:
        cap = g.constant("final_logit_softcapping", capped, np.float32)
        bent = g.op("Tanh", g.op("Div", scores, cap, out="logits.divided"), out="logits.bent")
        g.op("Mul", bent, cap, out="logits")


def cursor(g: Graph) -> Cursor:
    """Lengths from the mask, whose ones may be followed by padding, and the rotary tables."""
    c, one = g.config, g.constant("one", [1])
    tokens = g.op("ReduceSum", "attention_mask", one, out="tokens", keepdims=0)  # (B,)
    g.op("Cast", g.op("Sub", tokens, one, out="tokens_less_one"), out="seqlens_k", to=TensorProto.INT32)
    longest = g.op("Squeeze", g.op("Shape", "attention_mask", out="longest_1d", start=1, end=2), out="longest")
    g.op("Cast", longest, out="total_sequence_length", to=TensorProto.INT32)

    tables: dict[str, tuple[str, str]] = {}
    if c.positions == "rotary":
        tables[FULL] = tables[SLIDING] = rotation(g, "rotary", local=False)
    if tables and c.rope_local_theta is not None and SLIDING in c.layer_types:
        tables[SLIDING] = rotation(g, "rotary_local", local=True)
    needed = c.positions == "learned" or (bool(tables) and not rotates_itself(c))
    return Cursor("seqlens_k", "total_sequence_length", tables, positions(g, tokens) if needed else "")


def rotation(g: Graph, name: str, *, local: bool) -> tuple[str, str]:
    """The tables of cosines and sines."""
    cos, sin = rotary.table(g.config, g.config.max_position_embeddings, local=local)
    return g.table(f"{name}.cos", cos.numpy()), g.table(f"{name}.sin", sin.numpy())


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


def embedding(g: Graph, at: Cursor) -> str:
    """Tokens, scaled, and their places where those are learned: (B, T) -> (B, T, C)."""
    c = g.config
    x = g.op("Gather", g.weight("model.embed_tokens.weight"), "input_ids", out="model.embed_tokens")
    if c.embedding_scale != 1.0:
        scale = g.constant("embedding_scale", c.embedding_scale, np.float32)
        x = g.op("Mul", x, scale, out="model.embed_tokens.scaled")
    if c.positions == "learned":
        places = g.op("Gather", g.weight("model.embed_positions.weight"), at.positions, out="model.embed_positions")
        x = g.op("Add", x, places, out="model.embedded")
    return x


def norm(g: Graph, x: str, name: str, *, out: str) -> str:
    """RMSNorm or LayerNorm over the last axis."""
    kind = "RMSNormalization" if g.config.norm == "rms" else "LayerNormalization"
    return g.op(kind, x, *gains(g, name), out=out, axis=-1, epsilon=g.config.norm_eps)


def gains(g: Graph, name: str) -> list[str]:
    """A norm's weight, which may be stored less one, and its bias where it has one."""
    weight = g.weight(f"{name}.weight", plus=1.0 if g.config.norm_offset else 0.0)
    return [weight, *([g.weight(f"{name}.bias")] if g.config.norm == "layer" and g.config.norm_bias else [])]


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
    attended = g.op(
        "GroupQueryAttention", q, k, v, *past, at.seqlens_k, at.total, *tables, out=outs, domain=CONTRIB, **options
    )
    return g.linear(attended, layer, ("o_proj",), bias=c.attention_output_bias, out=f"{layer}.o_proj")


def head_norm(g: Graph, x: str, name: str, heads: int) -> str:
    """The norm of each head by itself: (B, T, heads*D) -> the same."""
    D = g.config.head_dim
    split = g.op("Reshape", x, g.constant(f"heads_{heads}", [0, 0, heads, D]), out=f"{name}.heads")
    normed = norm(g, split, name, out=f"{name}.normed")
    return g.op("Reshape", normed, g.constant(f"flat_{heads}", [0, 0, heads * D]), out=f"{name}.out")


def mlp(g: Graph, layer: str, x: str) -> str:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where nothing gates; (B, T, C) -> (B, T, C)."""
    c, name = g.config, f"{layer}.mlp"
    if c.gated:
        both = g.linear(x, name, ("gate_proj", "up_proj"), bias=c.mlp_bias, out=f"{name}.gate_up")
        g.op("Split", both, out=[f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
        inner = g.op("Mul", activation(g, f"{name}.gate", name), f"{name}.up", out=f"{name}.inner")
    else:
        inner = activation(g, g.linear(x, name, ("up_proj",), bias=c.mlp_bias, out=f"{name}.up_proj"), name)
    return g.linear(inner, name, ("down_proj",), bias=c.mlp_bias, out=f"{name}.down_proj")


def activation(g: Graph, x: str, name: str) -> str:
    """`hidden_act`, as sublayers.ACTIVATIONS has it."""
    act, out = g.config.hidden_act, f"{name}.activated"
    if act == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x, out=f"{name}.sigmoid"), out=out)
    if act.startswith("gelu"):
        return g.op("Gelu", x, out=out, approximate="tanh" if act == "gelu_pytorch_tanh" else "none")
    positive = g.op("Relu", x, out=f"{name}.positive" if act == "relu2" else out)
    return g.op("Mul", positive, positive, out=out) if act == "relu2" else positive


def cache_values(c: Config, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
    shape = ("batch_size", c.num_key_value_heads, length, c.head_dim)
    names = (f"{prefix}.{i}.{kv}" for i in range(c.num_hidden_layers) for kv in ("key", "value"))
    return [value(name, TensorProto.FLOAT, *shape) for name in names]
