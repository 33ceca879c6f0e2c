"""The decoder as an ONNX graph, written from the model's config node by node, in the order of model/transformer.py.

The `ort` profile: GroupQueryAttention (com.microsoft) rotates, appends to the cache and attends in one node, over past
and present buffers that may be one and the same; each residual is added by the norm that follows it; q, k, v and gate,
up are one product each. Weights stay in Hugging Face's layout (out, in) and FusedMatMul multiplies by their transpose,
so writing them is a copy of bytes, packing is concatenation, and a tied head is the embedding itself, stored once.

Contrib operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

B batch, T new tokens, P past, S = P + T, C channels, H heads, K key/value heads, D head size, I MLP width, V vocabulary
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import llmctl
from llmctl.errors import DataError
from llmctl.export.weights import ExternalData, Stored, stored_tensors
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import rotary_angles

OPSET = 23  # the first with RMSNormalization and RotaryEmbedding
IR_VERSION = 11
CONTRIB = "com.microsoft"
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
FUSED_ROTARY = 16  # GroupQueryAttention rotates heads whose size is a multiple of this [ran: ORT 1.31]


class Graph:
    """Nodes in the order they run, and the weights they name, which stream to disk as they are named."""

    def __init__(self, config: Config, model: Path, data: ExternalData) -> None:
        self.config, self.model, self.data = config, model, data
        self.stored: dict[str, Stored] = {}
        for file in hf.tensor_files(model):
            self.stored |= stored_tensors(file)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.used: set[str] = set()

    def op(self, kind: str, *inputs: str, out: str | Iterable[str], domain: str = "", **attributes: Any) -> str:
        """Appends a node and returns its first output. An input or output "" is left out."""
        outputs = [out] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """A small value inside the graph's own file."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def table(self, name: str, value: np.ndarray) -> str:
        """A computed fp32 table in the file of weights."""
        self.initializers[name] = self.data.append(name, value.shape, iter([value.astype("<f4").tobytes()]))
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """One stored tensor, under its own name."""
        return self.packed(name, {name: shape})

    def packed(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> str:
        """Stored tensors of the given shapes, one below the other along the first axis.

        Raises:
            DataError: a tensor is missing or has another shape.
        """
        if name in self.initializers:
            return name
        for part, shape in parts.items():
            found = self.stored.get(part)
            if found is None or found.shape != shape:
                says = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise DataError(f"{part} {says}; config.json asks for {list(shape)}", file=self.model)
        self.used.update(parts)
        rows, *rest = (sum(shape[0] for shape in parts.values()), *next(iter(parts.values()))[1:])
        chunks = itertools.chain.from_iterable(self.stored[part].chunks() for part in parts)
        self.initializers[name] = self.data.append(name, (rows, *rest), chunks)
        return name

    def linear(self, x: str, layer: str, outs: Mapping[str, int], width: int, *, bias: bool, out: str) -> str:
        """x (B, T, width) times the transpose of the projections `outs` (name -> rows), packed into one product."""
        weight = self.packed(f"{out}.weight", {f"{layer}.{name}.weight": (rows, width) for name, rows in outs.items()})
        y = self.op("FusedMatMul", x, weight, out=f"{out}.product" if bias else out, domain=CONTRIB, transB=1)
        if not bias:
            return y
        added = self.packed(f"{out}.bias", {f"{layer}.{name}.bias": (rows,) for name, rows in outs.items()})
        return self.op("Add", y, added, out=out)

    def norm(self, x: str, name: str, size: int, *, out: str) -> str:
        """RMSNorm over the last axis."""
        gamma = self.weight(f"{name}.weight", (size,))
        return self.op("RMSNormalization", x, gamma, out=out, axis=-1, epsilon=self.config.rms_norm_eps)

    def add_norm(self, x: str, residual: str, name: str, *, sum_out: str) -> tuple[str, str]:
        """(x + residual, its RMSNorm) in one node; `sum_out` "" where nothing reads the sum."""
        inputs = (x, residual, self.weight(f"{name}.weight", (self.config.hidden_size,)))
        outs = [f"{name}.out", "", "", sum_out] if sum_out else [f"{name}.out"]
        options: dict[str, Any] = {"domain": CONTRIB, "epsilon": self.config.rms_norm_eps}
        return sum_out, self.op("SkipSimplifiedLayerNormalization", *inputs, out=outs, **options)


class Cursor(NamedTuple):
    """Where the new tokens stand: the values that every layer's attention reads."""

    seqlens_k: str  # (B,) int32: the row's tokens so far and new, less one
    total: str  # scalar int32: S
    cos: str  # (max_position_embeddings, D/2)
    sin: str
    positions: str  # (B, T) int64, or "" where GroupQueryAttention rotates


def decoder(g: Graph) -> None:
    """input_ids (B, T), attention_mask (B, S), past (B, K, P, D) a layer -> logits (B, T, V), present (B, K, S, D)."""
    c = g.config
    embedding = g.weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    x = g.op("Gather", embedding, "input_ids", out="model.embed_tokens")
    at = cursor(g)

    normed = g.norm(x, "model.layers.0.input_layernorm", c.hidden_size, out="model.layers.0.input_layernorm.out")
    for i in range(c.num_hidden_layers):
        layer, last = f"model.layers.{i}", i == c.num_hidden_layers - 1
        attended = attention(g, i, normed, at)
        x, normed = g.add_norm(x, attended, f"{layer}.post_attention_layernorm", sum_out=f"{layer}.attended")
        following = "model.norm" if last else f"model.layers.{i + 1}.input_layernorm"
        x, normed = g.add_norm(x, mlp(g, layer, normed), following, sum_out="" if last else f"{layer}.out")

    kept = keep_last(g, normed)
    head = embedding if c.tie_word_embeddings else g.weight("lm_head.weight", (c.vocab_size, c.hidden_size))
    g.op("FusedMatMul", kept, head, out="logits", domain=CONTRIB, transB=1)


def cursor(g: Graph) -> Cursor:
    """Lengths from the mask, whose ones may be followed by padding, and the rotary tables."""
    one = g.constant("one", [1])
    tokens = g.op("ReduceSum", "attention_mask", one, out="tokens", keepdims=0)  # (B,)
    g.op("Cast", g.op("Sub", tokens, one, out="tokens_less_one"), out="seqlens_k", to=TensorProto.INT32)
    longest = g.op("Squeeze", g.op("Shape", "attention_mask", out="longest_1d", start=1, end=2), out="longest")
    g.op("Cast", longest, out="total_sequence_length", to=TensorProto.INT32)

    angles = rotary_angles(g.config)
    cos, sin = g.table("rotary.cos", angles.cos().numpy()), g.table("rotary.sin", angles.sin().numpy())
    where = "" if g.config.head_dim % FUSED_ROTARY == 0 else positions(g, tokens)
    return Cursor("seqlens_k", "total_sequence_length", cos, sin, where)


def positions(g: Graph, tokens: str) -> str:
    """(B, T): past + t, where past = tokens - T, but 0 in a first prompt, whose padded rows are shorter than T."""
    zero, one = g.constant("zero", 0), g.constant("step", 1)
    new = g.op("Squeeze", g.op("Shape", "input_ids", out="new_1d", start=1, end=2), out="new")
    past = g.op("Max", g.op("Sub", tokens, new, out="tokens_less_new"), zero, out="past")
    column = g.op("Unsqueeze", past, g.constant("one", [1]), out="past_column")
    return g.op("Add", column, g.op("Range", zero, new, one, out="steps"), out="positions")


def attention(g: Graph, index: int, x: str, at: Cursor) -> str:
    """(B, T, C) -> (B, T, C), reading past_key_values.N and writing present.N."""
    c, layer = g.config, f"model.layers.{index}.self_attn"
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    rows = {"q_proj": H * D, "k_proj": K * D, "v_proj": K * D}
    q, k, v = g.linear(x, layer, rows, c.hidden_size, bias=c.attention_bias, out=f"{layer}.qkv"), "", ""
    tables = (at.cos, at.sin)

    if c.qk_norm or at.positions:  # otherwise the node takes q, k and v packed as they are
        q, k, v = parts = [f"{layer}.{name}" for name in "qkv"]
        g.op("Split", f"{layer}.qkv", g.constant("qkv_sizes", list(rows.values())), out=parts, axis=-1)
    if c.qk_norm:  # before rotation, as Qwen3 does
        q, k = head_norm(g, q, f"{layer}.q_norm", H), head_norm(g, k, f"{layer}.k_norm", K)
    if at.positions:
        q = g.op("RotaryEmbedding", q, *tables, at.positions, out=f"{layer}.q.rotated", num_heads=H)
        k = g.op("RotaryEmbedding", k, *tables, at.positions, out=f"{layer}.k.rotated", num_heads=K)
        tables = ("", "")

    past = [f"past_key_values.{index}.{name}" for name in ("key", "value")]
    outs = [f"{layer}.attended", *(f"present.{index}.{name}" for name in ("key", "value"))]
    options = {"num_heads": H, "kv_num_heads": K, "do_rotary": int(not at.positions), "scale": 1 / math.sqrt(D)}
    attended = g.op(
        "GroupQueryAttention", q, k, v, *past, at.seqlens_k, at.total, *tables, out=outs, domain=CONTRIB, **options
    )
    return g.linear(attended, layer, {"o_proj": c.hidden_size}, H * D, bias=c.attention_bias, out=f"{layer}.o_proj")


def head_norm(g: Graph, x: str, name: str, heads: int) -> str:
    """RMSNorm of each head by itself: (B, T, heads*D) -> the same."""
    D = g.config.head_dim
    split = g.op("Reshape", x, g.constant(f"heads_{heads}", [0, 0, heads, D]), out=f"{name}.heads")
    normed = g.norm(split, name, D, out=f"{name}.normed")
    return g.op("Reshape", normed, g.constant(f"flat_{heads}", [0, 0, heads * D]), out=f"{name}.out")


def mlp(g: Graph, layer: str, x: str) -> str:
    """SwiGLU: down(silu(gate(x)) * up(x)); (B, T, C) -> (B, T, C)."""
    c, mlp = g.config, f"{layer}.mlp"
    rows = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
    both = g.linear(x, mlp, rows, c.hidden_size, bias=False, out=f"{mlp}.gate_up")
    g.op("Split", both, out=[f"{mlp}.gate", f"{mlp}.up"], axis=-1, num_outputs=2)
    sigmoid = g.op("Sigmoid", f"{mlp}.gate", out=f"{mlp}.sigmoid")
    silu = g.op("Mul", f"{mlp}.gate", sigmoid, out=f"{mlp}.silu")
    inner = g.op("Mul", silu, f"{mlp}.up", out=f"{mlp}.inner")
    return g.linear(inner, mlp, {"down_proj": c.hidden_size}, c.intermediate_size, bias=False, out=f"{mlp}.down_proj")


def keep_last(g: Graph, x: str) -> str:
    """The last `logits_to_keep` positions, or all for 0: an input with a default, that a runtime need not know of.

    A decoder mostly wants the last row; leaving the others out saves a sixth of a prefill under a 4,096-piece head.
    """
    g.constant("logits_to_keep", [0])
    start = g.op("Neg", "logits_to_keep", out="first_kept")
    return g.op("Slice", x, start, g.constant("to_the_end", [2**62]), g.constant("time_axis", [1]), out="kept")


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str]) -> int:
    """Writes `model`'s decoder as model.onnx and model.onnx.data into `folder` and returns the bytes of both.

    `metadata` goes into the model's properties. Memory: a few megabytes, whatever the model's size.

    Raises:
        DataError: the weights and the config do not fit together, or hold something that the graph would ignore.
    """
    with (folder / WEIGHTS).open("wb") as file:
        g = Graph(config, model, ExternalData(file, WEIGHTS))
        decoder(g)
    # Neither a tied head nor the rotary frequencies that old checkpoints store are weights of their own.
    unread = {name for name in g.stored.keys() - g.used if not name.endswith(".rotary_emb.inv_freq")}
    unread -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unread:
        raise DataError(f"the graph has no place for {len(unread)} tensors, {min(unread)} among them", file=model)

    proto = helper.make_model(
        helper.make_graph(g.nodes, "decoder", inputs(config), outputs(config), list(g.initializers.values())),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=IR_VERSION,
        producer_name="llmctl",
        producer_version=llmctl.__version__,
    )
    helper.set_model_props(proto, {"llmctl.version": llmctl.__version__, **metadata})
    onnx.save(proto, folder / GRAPH)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS))


def inputs(c: Config) -> list[onnx.ValueInfoProto]:
    """The names that optimum and onnxruntime-genai load, and `logits_to_keep` with its default."""
    named = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    kept = helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, [1])
    return [*named, *cache_values(c, "past_key_values", "past_sequence_length"), kept]


def outputs(c: Config) -> list[onnx.ValueInfoProto]:
    shape = ["batch_size", "kept_sequence_length", c.vocab_size]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    return [logits, *cache_values(c, "present", "present_sequence_length")]


def cache_values(c: Config, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
    shape = ["batch_size", c.num_key_value_heads, length, c.head_dim]
    names = (f"{prefix}.{i}.{kv}" for i in range(c.num_hidden_layers) for kv in ("key", "value"))
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
