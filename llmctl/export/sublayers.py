"""The sublayers that every graph shares, in the order of model/sublayers.py; Config's switches choose the nodes.

B batch, T new tokens, C channels, H heads, K key/value heads, D head size, R the part of a head that is turned,
V vocabulary
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from llmctl.export.builder import Graph
from llmctl.model import rotary
from llmctl.model.config import FULL, SLIDING


def embedding(g: Graph, positions: str) -> str:
    """Tokens, scaled, and their places where those are learned: (B, T) -> (B, T, C)."""
    c = g.config
    x = g.lookup("model.embed_tokens.weight", "input_ids", out="model.embed_tokens")
    if c.embedding_scale != 1.0:
        x = g.op("Mul", x, g.scalar("embedding_scale", c.embedding_scale), out="model.embed_tokens.scaled")
    if c.positions == "learned":
        places = g.op("Gather", g.weight("model.embed_positions.weight"), positions, out="model.embed_positions")
        x = g.op("Add", x, places, out="model.embedded")
    return x


def rotations(g: Graph, dtype: str = "") -> dict[str, tuple[str, str]]:
    """The tables of cosines and sines of each layer type; empty where positions are told in another way.

    They are computed in fp32 and stored in `dtype`, the graph's unless told.
    """
    c = g.config
    if c.positions != "rotary":
        return {}
    tables = dict.fromkeys((FULL, SLIDING), rotation(g, "rotary", dtype, local=False))
    if c.rope_local_theta is not None and SLIDING in c.layer_types:
        tables[SLIDING] = rotation(g, "rotary_local", dtype, local=True)
    return tables


def rotation(g: Graph, name: str, dtype: str = "", *, local: bool) -> tuple[str, str]:
    """Cosines and sines, each (max_position_embeddings, R/2)."""
    cos, sin = rotary.table(g.config, g.config.max_position_embeddings, local=local)
    return g.table(f"{name}.cos", cos.numpy(), dtype), g.table(f"{name}.sin", sin.numpy(), dtype)


def norm(g: Graph, x: str, name: str, *, out: str) -> str:
    """RMSNorm or LayerNorm over the last axis; the mean is taken in fp32 whatever the graph's dtype."""
    kind = "RMSNormalization" if g.config.norm == "rms" else "LayerNormalization"
    return g.op(kind, x, *gains(g, name), out=out, axis=-1, epsilon=g.config.norm_eps)


def gains(g: Graph, name: str) -> list[str]:
    """A norm's weight, which may be stored less one, and its bias where it has one."""
    weight = g.weight(f"{name}.weight", plus=1.0 if g.config.norm_offset else 0.0)
    return [weight, *([g.weight(f"{name}.bias")] if g.config.norm == "layer" and g.config.norm_bias else [])]


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
        gate, up = (  # apart: splitting a joint product costs as much as the second one's call
            g.linear(x, name, (part,), bias=c.mlp_bias, out=f"{name}.{part}") for part in ("gate_proj", "up_proj")
        )
        inner = g.op("Mul", activation(g, c.hidden_act, gate, name), up, out=f"{name}.inner")
    else:
        up = g.linear(x, name, ("up_proj",), bias=c.mlp_bias, out=f"{name}.up_proj")
        inner = activation(g, c.hidden_act, up, name)
    return g.linear(inner, name, ("down_proj",), bias=c.mlp_bias, out=f"{name}.down_proj")


def activation(g: Graph, act: str, x: str, name: str) -> str:
    """One of sublayers.ACTIVATIONS, by its name there."""
    out = f"{name}.activated"
    if act == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x, out=f"{name}.sigmoid"), out=out)
    if act.startswith("gelu"):
        return g.op("Gelu", x, out=out, approximate="tanh" if act == "gelu_pytorch_tanh" else "none")
    positive = g.op("Relu", x, out=f"{name}.positive" if act == "relu2" else out)
    return g.op("Mul", positive, positive, out=out) if act == "relu2" else positive


def capped(g: Graph, x: str, cap: float, name: str, *, out: str) -> str:
    """cap * tanh(x / cap), a soft bound (Gemma 2)."""
    bound = g.scalar(name, cap)
    return g.op("Mul", g.op("Tanh", g.op("Div", x, bound, out=f"{out}.divided"), out=f"{out}.bent"), bound, out=out)


def head(g: Graph, x: str, *, out: str) -> str:
    """The last `logits_to_keep` positions of (B, T, C), or all for 0, through the head: (B, kept, V) in fp32.

    `logits_to_keep` is an input with a default, that a runtime need not know of. A decoder mostly wants the last row;
    leaving the others out saves a sixth of a prefill under a 4,096-piece head.
    """
    c = g.config
    g.constant("logits_to_keep", [0])
    start = g.op("Neg", "logits_to_keep", out="first_kept")
    kept = g.op("Slice", x, start, g.constant("to_the_end", [2**62]), g.constant("time_axis", [1]), out="kept")
    if c.logit_scale != 1.0:
        kept = g.op("Mul", kept, g.scalar("logit_scale", c.logit_scale), out="kept.scaled")
    cap, plain = c.final_logit_softcapping, g.form.dtype == "fp32"
    product = out if cap is None and plain else f"{out}.product"
    embedding = "embed_tokens" if c.kind == "encoder-decoder" else "model.embed_tokens"
    scores = g.head(kept, embedding if c.tie_word_embeddings else "lm_head", out=product)
    if not plain:
        scores = g.op("Cast", scores, out=out if cap is None else f"{out}.fp32", to=TensorProto.FLOAT)
    if cap is not None:
        bound = g.constant("final_logit_softcapping", cap, np.float32)
        bent = g.op("Tanh", g.op("Div", scores, bound, out=f"{out}.divided"), out=f"{out}.bent")
        return g.op("Mul", bent, bound, out=out)
    return scores
