"""An encoder-decoder as two ONNX graphs over one file of weights, in the order of model/transformer.py.

The names are optimum's, whose ORTModelForSeq2SeqLM loads the folder: encoder_model.onnx, and decoder_model_merged.onnx
for the first step and all that follow. The first step gets caches of no tokens. A later one gives back what it got:
what cross-attention reads is computed of those source tokens that its cache does not hold, which are all of them or
none, so that nothing needs to branch.

B batch, S source tokens, P past, T new tokens, C channels, H heads, K key/value heads, D head size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from llmctl.export.blocks import Sight, attended, blocks, relative_bias, self_attention, size, steps
from llmctl.export.builder import IDS, KEPT, Graph, Part, logits, save_parts, value
from llmctl.export.encoder_graph import fp32
from llmctl.export.form import Form
from llmctl.export.portable import heads
from llmctl.export.sublayers import head
from llmctl.model.config import FULL, Config

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
HIDDEN = {"fp32": -1e30, "bf16": -1e30, "fp16": -6e4}  # added to scores that do not count


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str], form: Form | None = None) -> int:
    """`graph.write` for an encoder-decoder: both graphs, and model.onnx.data beside them.

    Raises:
        DataError: the weights and the config do not fit together.
    """
    B, S, form = "batch_size", "encoder_sequence_length", form or Form()
    mask = value("attention_mask", TensorProto.INT64, B, "sequence_length")
    states = value("last_hidden_state", TensorProto.FLOAT, B, "sequence_length", config.hidden_size)
    source_mask = value("encoder_attention_mask", TensorProto.INT64, B, S)
    memory = value("encoder_hidden_states", TensorProto.FLOAT, B, S, config.hidden_size)
    past = caches(config, "past_key_values", "past_decoder_sequence_length", "past_encoder_sequence_length", form)
    present = caches(config, "present", "decoder_sequence_length", "encoder_sequence_length_out", form)
    parts = [
        Part(ENCODER, encoder, [IDS, mask], [states]),
        Part(DECODER, decoder, [source_mask, IDS, memory, *past, KEPT], [logits(config), *present]),
    ]
    return save_parts(model, folder, config, metadata, parts, form)


def caches(c: Config, prefix: str, own: str, source: str, form: Form) -> list[onnx.ValueInfoProto]:
    """Keys and values of each layer: of what was written so far, and of what is read."""
    kept = (("decoder", own), ("encoder", source))
    return [
        value(f"{prefix}.{i}.{whose}.{kv}", form.type, "batch_size", c.num_key_value_heads, length, c.head_dim)
        for i in range(c.num_decoder_layers)
        for whose, length in kept
        for kv in ("key", "value")
    ]


def encoder(g: Graph) -> None:
    """input_ids, attention_mask (B, S) -> last_hidden_state (B, S, C)."""
    c = g.config
    x = g.op("Gather", g.weight("embed_tokens.weight"), "input_ids", out="embed_tokens")
    each = steps(g, size(g, "input_ids", 1, "length"), "steps")
    added = masked(g, "attention_mask", relative_bias(g, "encoder", each, each, causal=False), out="encoder.mask")
    at = Sight({FULL: added})
    x = blocks(g, "encoder", x, c.num_hidden_layers, lambda layer, index, x: self_attention(g, layer, index, x, at))
    fp32(g, x, out="last_hidden_state")


def decoder(g: Graph) -> None:
    """input_ids (B, T), of the source its mask (B, S) and states (B, S, C), caches -> logits (B, kept, V), caches."""
    c = g.config
    x = g.op("Gather", g.weight("embed_tokens.weight"), "input_ids", out="embed_tokens")
    past = size(g, "past_key_values.0.decoder.key", 2, "past")
    total = g.op("Add", past, size(g, "input_ids", 1, "new"), out="total")
    keys = steps(g, total, "steps")  # (P + T,)
    row = [g.op("Unsqueeze", end, g.constant("batch_axis", [0]), out=f"{end}_row") for end in (past, total)]
    queries = g.op("Slice", keys, *row, g.constant("batch_axis", [0]), out="new_steps")
    bias = relative_bias(g, "decoder", queries, keys, causal=True)
    behind = g.op("LessOrEqual", keys, "decoder.queries", out="behind")  # (T, P + T)
    own = g.op("Where", behind, bias, hidden(g), out="decoder.mask")  # (1, H, T, P + T)
    memory = unread(g)
    none = g.op("Expand", g.scalar("nothing", 0.0), tall(g), out="no_bias")  # (1, 1, T, 1)
    source = masked(g, "encoder_attention_mask", none, out="cross.mask")
    x = blocks(
        g,
        "decoder",
        x,
        c.num_decoder_layers,
        lambda layer, index, x: cached_attention(g, layer, index, x, own),
        lambda layer, index, x: cross_attention(g, layer, index, x, memory, source),
    )
    head(g, x, out="logits")


def hidden(g: Graph) -> str:
    """What is added to scores that do not count: finite, so that a row of padding alone gives numbers."""
    return g.scalar("hidden", HIDDEN[g.form.dtype])


def masked(g: Graph, mask: str, bias: str, *, out: str) -> str:
    """A mask (B, S) of real keys and what is added to their scores: (1, H, T, S) -> (B, H, T, S)."""
    real = g.op("Cast", mask, out="real", to=TensorProto.BOOL)
    keys = g.op("Unsqueeze", real, g.constant("key_axes", [1, 2]), out="real_keys")
    return g.op("Where", keys, bias, hidden(g), out=out)


def tall(g: Graph) -> str:
    """The shape (1, 1, T, 1)."""
    one = g.constant("one", [1])
    return g.op("Concat", one, one, "new_1d", one, out="tall", axis=0)


def unread(g: Graph) -> str:
    """The states of the source behind those that the caches hold: all of them at first, then none."""
    read = g.op("Shape", "past_key_values.0.encoder.key", out="read", start=2, end=3)
    end, axis = g.constant("to_the_end", [2**62]), g.constant("time_axis", [1])
    memory = g.op("Slice", "encoder_hidden_states", read, end, axis, out="unread")
    return memory if g.form.dtype == "fp32" else g.op("Cast", memory, out="unread.cast", to=g.form.type)


def cached_attention(g: Graph, layer: str, index: int, x: str, mask: str) -> str:
    """Self-attention of the new tokens to the cached ones and themselves, (B, T, C) -> (B, T, C)."""
    c, name = g.config, f"{layer}.self_attn"
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    packed = g.linear(x, name, ("q_proj", "k_proj", "v_proj"), bias=c.attention_bias, out=f"{name}.qkv")
    q, k, v = parts = [f"{name}.{part}" for part in "qkv"]
    g.op("Split", packed, g.constant("qkv_sizes", [H * D, K * D, K * D]), out=parts, axis=-1)
    k, v = (grown(g, index, "decoder", kv, heads(g, part, K)) for kv, part in (("key", k), ("value", v)))
    return attended(g, name, heads(g, q, H), k, v, mask, apart=True)


def cross_attention(g: Graph, layer: str, index: int, x: str, memory: str, mask: str) -> str:
    """Attention to the source, (B, T, C) -> (B, T, C); of its tokens in `memory` keys and values are computed."""
    c, name = g.config, f"{layer}.cross_attn"
    H, K = c.num_attention_heads, c.num_key_value_heads
    q = g.linear(x, name, ("q_proj",), bias=c.attention_bias, out=f"{name}.q")
    packed = g.linear(memory, name, ("k_proj", "v_proj"), bias=c.attention_bias, out=f"{name}.kv")
    k, v = parts = [f"{name}.{part}" for part in "kv"]
    g.op("Split", packed, out=parts, axis=-1, num_outputs=2)
    k, v = (grown(g, index, "encoder", kv, heads(g, part, K)) for kv, part in (("key", k), ("value", v)))
    return attended(g, name, heads(g, q, H), k, v, mask, apart=True)


def grown(g: Graph, index: int, whose: str, kv: str, new: str) -> str:
    """A cache with new keys or values behind it, which is an output too: (B, K, P, D) -> (B, K, P + T, D)."""
    past, present = (f"{prefix}.{index}.{whose}.{kv}" for prefix in ("past_key_values", "present"))
    return g.op("Concat", past, new, out=present, axis=2)
