"""An encoder with the head of its task as an ONNX graph, in the order of model/transformer.py and trunk.py.

A text comes whole, padded on either side: `attention_mask` says which tokens are real. What is padding is seen by no
other token, and sees itself, so that no softmax is over nothing. Inputs and outputs have optimum's names; an embedding
model also gives `sentence_embedding`, pooled and of length 1.

B batch, T time, C channels, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from llmctl.errors import DataError
from llmctl.export.blocks import Sight, blocks, self_attention, size, steps
from llmctl.export.builder import IDS, Graph, save, value
from llmctl.export.form import Form
from llmctl.export.sublayers import activation, embedding, norm, rotations
from llmctl.model.config import FULL, SLIDING, Config


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str], form: Form | None = None) -> int:
    """`graph.write` for a model that is read as a whole, whatever its task.

    Raises:
        DataError: a switch that has no node here; or the weights and the config do not fit together.
    """
    if switch := unbuilt(config):
        raise DataError(f"{switch}: the graph of an encoder has no nodes for that", file=model / "config.json")
    inputs = [IDS, value("attention_mask", TensorProto.INT64, "batch_size", "sequence_length")]
    if config.type_vocab_size > 1:
        inputs.append(value("token_type_ids", TensorProto.INT64, "batch_size", "sequence_length"))
    return save(model, folder, config, metadata, encoder, inputs, outputs(config), form or Form())


def unbuilt(c: Config) -> str:
    """The switch of a config that the graph has no nodes for; empty where it has all."""
    scaling = c.rope_scaling
    stretched = (  # the table would depend on the length of the text
        scaling is not None
        and scaling.kind == "dynamic"
        and c.max_position_embeddings > scaling.original_max_position_embeddings
    )
    return "rope_scaling = dynamic" if stretched else ""


def outputs(c: Config) -> list[onnx.ValueInfoProto]:
    """What each task gives, under the names that optimum reads."""
    B, T = "batch_size", "sequence_length"
    shapes: dict[str, dict[str, tuple[int | str, ...]]] = {
        "embedding": {"last_hidden_state": (B, T, c.hidden_size), "sentence_embedding": (B, c.hidden_size)},
        "masked-lm": {"logits": (B, T, c.vocab_size)},
        "sequence-classification": {"logits": (B, c.num_labels)},
        "token-classification": {"logits": (B, T, c.num_labels)},
        "question-answering": {"start_logits": (B, T), "end_logits": (B, T)},
    }
    return [value(name, TensorProto.FLOAT, *shape) for name, shape in shapes[c.task].items()]


def encoder(g: Graph) -> None:
    """input_ids, attention_mask (B, T), where the model tells texts of a pair apart token_type_ids -> `outputs`."""
    c = g.config
    at = sight(g)
    x = embedded(g, at)
    x = blocks(g, "model", x, c.num_hidden_layers, lambda layer, index, x: self_attention(g, layer, index, x, at))
    if c.task == "embedding":
        fp32(g, x, out="last_hidden_state")
        g.op("LpNormalization", pooled(g, "last_hidden_state"), out="sentence_embedding", axis=-1, p=2)
        if c.head_transform:  # a pooler that was stored with the states it is not for
            g.used.update(name for name in g.tensors if name.startswith("head."))
    elif c.task == "masked-lm":
        masked_lm(g, x)
    else:
        classifier(g, pooled(g, x) if c.task == "sequence-classification" else x)


def sight(g: Graph) -> Sight:
    """From the mask: who is seen by whom in layers of each type, and where everyone stands."""
    c, causal = g.config, g.config.kind == "decoder"
    real = g.op("Cast", "attention_mask", out="real", to=TensorProto.BOOL)
    keys = g.op("Unsqueeze", real, g.constant("key_axes", [1, 2]), out="real_keys")  # (B, 1, 1, T)
    each = steps(g, size(g, "input_ids", 1, "length"), "steps")  # (T,)
    column = g.op("Unsqueeze", each, g.constant("one", [1]), out="queries")
    itself = g.op("Equal", column, each, out="itself")  # (T, T)
    if causal:
        keys = g.op("And", keys, g.op("LessOrEqual", each, column, out="behind"), out="real_behind")
    masks = {FULL: g.op("Or", keys, itself, out="visible")}
    if SLIDING in c.layer_types and c.sliding_window is not None:
        away = g.op("Abs", g.op("Sub", column, each, out="distance"), out="away")
        reach = g.constant("reach", c.sliding_window - causal)
        near = g.op("And", keys, g.op("LessOrEqual", away, reach, out="within_reach"), out="real_near")
        masks[SLIDING] = g.op("Or", near, itself, out="visible_near")
    positions = ""
    if c.positions != "none" and (causal or c.position_offset):
        positions = counted(g, real)
    elif c.positions != "none":
        positions = g.op("Expand", each, g.op("Shape", "input_ids", out="shape"), out="positions")
    return Sight(masks, rotations(g, "fp32"), positions)


def counted(g: Graph, real: str) -> str:
    """(B, T): how many real tokens stand before each; padding at 0, and in RoBERTa's table at the row before that."""
    ones = g.op("Cast", "attention_mask", out="ones", to=TensorProto.FLOAT)  # TensorRT adds up no integers
    sums = g.op("CumSum", ones, g.constant("step", 1), out="running_sums")
    ordinal = g.op("Cast", sums, out="ordinal", to=TensorProto.INT64)
    before = g.op("Sub", ordinal, g.constant("step", 1), out="tokens_before")
    offset = g.config.position_offset
    if not offset:
        return g.op("Max", before, g.constant("zero", 0), out="positions")
    placed = g.op("Where", real, before, g.constant("nowhere", -1), out="places")
    return g.op("Add", placed, g.constant("position_offset", offset), out="positions")


def embedded(g: Graph, at: Sight) -> str:
    """Tokens, places where those are learned, which text of a pair, and the norm of the sum: (B, T) -> (B, T, C)."""
    c = g.config
    x = embedding(g, at.positions)
    if c.type_vocab_size:
        table = g.weight("model.embed_token_types.weight")
        which = "token_type_ids" if c.type_vocab_size > 1 else g.constant("zero", 0)
        x = g.op("Add", x, g.op("Gather", table, which, out="model.embed_token_types"), out="model.typed")
    return norm(g, x, "model.embed_norm", out="model.embed_norm.out") if c.embedding_norm else x


def pooled(g: Graph, x: str) -> str:
    """One vector a sequence, (B, T, C) -> (B, C): the first token's, the last real one's, or the mean of the real."""
    if g.config.pooling == "cls":
        return g.op("Gather", x, g.constant("zero", 0), out="pooled", axis=1)
    dtype = TensorProto.FLOAT if x == "last_hidden_state" else g.form.type
    weights = g.op("Cast", "attention_mask", out="weights", to=dtype)
    if g.config.pooling == "last":
        last = g.op("ArgMax", weights, out="last", axis=1, keepdims=1, select_last_index=1)  # (B, 1)
        return g.op("GatherND", x, last, out="pooled", batch_dims=1)
    row = g.op("Unsqueeze", weights, g.constant("one", [1]), out="weight_rows")  # (B, 1, T)
    total = g.op("Squeeze", g.op("MatMul", row, x, out="sums"), g.constant("one", [1]), out="sum")
    count = g.op("ReduceSum", weights, g.constant("one", [1]), out="count", keepdims=1)  # (B, 1)
    return g.op("Div", total, count, out="pooled")


def transformed(g: Graph, x: str) -> str:
    """What a task's head does first, `Head.transform`: (..., C) -> (..., C)."""
    c = g.config
    if not c.head_transform:
        return x
    x = g.linear(x, "head", ("dense",), bias=c.head_bias, out="head.dense")
    if c.head_transform == "pooler":
        return g.op("Tanh", x, out="head.pooled")
    return norm(g, activation(g, c.head_act, x, "head"), "head.norm", out="head.norm.out")


def masked_lm(g: Graph, x: str) -> None:
    """Logits of every token, (B, T, C) -> (B, T, V)."""
    tied = g.config.tie_word_embeddings
    scores = g.head(transformed(g, x), "model.embed_tokens" if tied else "head.decoder", out="head.scores")
    fp32(g, g.op("Add", scores, g.weight("head.bias"), out="head.biased"), out="logits")


def classifier(g: Graph, x: str) -> None:
    """Scores of labels, or of being the first and the last token of the answer; (..., C) -> (..., labels)."""
    c = g.config
    biased = not (c.kind == "decoder" and c.task == "sequence-classification")
    scores = g.linear(transformed(g, x), "head", ("classifier",), bias=biased, out="head.classifier")
    if c.task != "question-answering":
        fp32(g, scores, out="logits")
        return
    ends = [f"head.{end}" for end in ("start", "end")]
    g.op("Split", fp32(g, scores, out="head.spans"), out=ends, axis=-1, num_outputs=2)
    for end in ends:
        g.op("Squeeze", end, g.constant("last_axis", [-1]), out=f"{end.removeprefix('head.')}_logits")


def fp32(g: Graph, x: str, *, out: str) -> str:
    """An output of the graph, which is fp32 whatever the graph computes in."""
    return g.op("Identity", x, out=out) if g.form.dtype == "fp32" else g.op("Cast", x, out=out, to=TensorProto.FLOAT)
