"""The recurrent baseline as an ONNX graph: an LSTM node a layer, with its state in the open.

What the layers remember goes in as `past.h` and `past.c` and comes out as `present.h` and `present.c`, all (L, B, C),
so a client decodes by handing back what it got; zeros begin a text. `sequence_lengths` says how many of each row's
tokens are real: a row that is padded on the right keeps the state behind its last real token.

Operator: https://onnx.ai/onnx/operators/onnx__LSTM.html. torch stacks the gates as input, forget, cell, output; ONNX
wants input, output, forget, cell.

B batch, T new tokens, C channels, L layers, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from llmctl.errors import UsageError
from llmctl.export.builder import IDS, KEPT, Graph, logits, save, value
from llmctl.export.form import Form
from llmctl.export.sublayers import head
from llmctl.export.weights import rows, streamed
from llmctl.model.config import Config

GATES = (0, 3, 1, 2)  # ONNX's order, as places in torch's
LAYER = "model.lstm"


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str], form: Form | None = None) -> int:
    """`graph.write` for a model of kind "recurrent".

    Raises:
        UsageError: a dtype other than fp32.
    """
    if form is not None and form.dtype != "fp32":
        raise UsageError(f"an LSTM is exported in fp32, not in {form.dtype}", hint='[export] dtype = "fp32"')
    lengths = value("sequence_lengths", TensorProto.INT32, "batch_size")
    inputs = [IDS, lengths, *states(config, "past"), KEPT]
    return save(model, folder, config, metadata, recurrent, inputs, [logits(config), *states(config, "present")], form)


def recurrent(g: Graph) -> None:
    """input_ids (B, T), sequence_lengths (B,), past (L, B, C) -> logits (B, T, V), present (L, B, C)."""
    c, layers = g.config, range(g.config.num_hidden_layers)
    ids = g.op("Transpose", "input_ids", out="ids", perm=[1, 0])
    x = g.op("Gather", g.weight("model.embed_tokens.weight"), ids, out="model.embed_tokens")  # (T, B, C)
    for state in "hc":
        parts = [f"past.{state}.{i}" for i in layers]  # (1, B, C) each
        g.op("Split", f"past.{state}", out=parts, axis=0, num_outputs=c.num_hidden_layers)
    for i in layers:
        weights = (gates(g, "weight_ih", i), gates(g, "weight_hh", i), biases(g, i))
        past = ("sequence_lengths", f"past.h.{i}", f"past.c.{i}")
        outs = [f"{LAYER}.{i}.y", f"present.h.{i}", f"present.c.{i}"]
        y = g.op("LSTM", x, *weights, *past, out=outs, hidden_size=c.hidden_size)  # (T, 1, B, C)
        x = g.op("Squeeze", y, g.constant("direction_axis", [1]), out=f"{LAYER}.{i}.out")
    for state in "hc":
        g.op("Concat", *(f"present.{state}.{i}" for i in layers), out=f"present.{state}", axis=0)
    head(g, g.op("Transpose", x, out="hidden", perm=[1, 0, 2]), out="logits")


def gates(g: Graph, kind: str, layer: int) -> str:
    """A matrix of four gates, (4 C, C) -> (1, 4 C, C)."""
    name = f"{LAYER}.{kind}_l{layer}"
    return g.store(name, (1, *g.tensors[name].shape), reordered(g, name))


def biases(g: Graph, layer: int) -> str:
    """Those of the input, then those of the state: twice (4 C,) -> (1, 8 C)."""
    parts = [f"{LAYER}.bias_{kind}_l{layer}" for kind in ("ih", "hh")]
    chunks = (chunk for part in parts for chunk in reordered(g, part))
    return g.store(f"{LAYER}.bias_l{layer}", (1, 8 * g.config.hidden_size), chunks)


def reordered(g: Graph, name: str) -> Iterator[bytes]:
    """The bytes of a tensor, its four gates in ONNX's order."""
    tensor, size = g.take(name), g.config.hidden_size
    for gate in GATES:
        yield from streamed(rows(tensor, gate * size, size))


def states(c: Config, prefix: str) -> list[onnx.ValueInfoProto]:
    shape = (c.num_hidden_layers, "batch_size", c.hidden_size)
    return [value(f"{prefix}.{state}", TensorProto.FLOAT, *shape) for state in "hc"]
