"""What every graph is built with: nodes in the order they run, and the weights they name, under the model's own names.

Weights stay as they lie on disk. A matrix (out, in), as torch has it, is multiplied by its transpose (FusedMatMul); one
that its family stores as (in, out) is multiplied as it is; what a family stores packed and a product wants packed is
copied whole. So writing weights is a copy of bytes, and packing is concatenation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import llmctl
from llmctl.errors import DataError
from llmctl.export.weights import ExternalData, fp32, rows
from llmctl.model import hf, storage
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.model.families.layout import native_spelling
from llmctl.model.storage import Stored

OPSET = 23  # the first with RMSNormalization and RotaryEmbedding
IR_VERSION = 11
CONTRIB = "com.microsoft"
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"


class Graph:
    """A graph in the making.

    Attributes:
        tensors: the model's tensors by their native names; of what a family stores packed, the rows that are theirs.
        transposed: matrices that lie as (in, out), by the native matrices that each holds.
    """

    def __init__(self, config: Config, model: Path, data: ExternalData) -> None:
        """Raises DataError where the weights do not fit the config."""
        self.config, self.model, self.data = config, model, data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.used: set[str] = set()
        self.tensors: dict[str, Stored] = {}
        self.transposed: dict[tuple[str, ...], Stored] = {}
        built, found = hf.build(config), storage.headers(hf.tensor_files(model))
        sizes = {name: tensor.shape[0] for name, tensor in built.state_dict().items()}
        layout = hf.check(built, model, {name: tensor.shape for name, tensor in found.items()})
        for name, tensor in found.items():
            entry = layout.get(native_spelling(FAMILIES[config.family], name, layout))
            if entry is not None and entry.transposed:
                self.transposed[entry.parts] = tensor
            elif entry is not None:
                ends = [0, *itertools.accumulate(sizes[part] for part in entry.parts)]
                parts = zip(entry.parts, ends, strict=False)
                self.tensors |= {part: rows(tensor, start, sizes[part]) for part, start in parts}

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
        return self.store(name, value.shape, [value.astype("<f4").tobytes()])

    def store(self, name: str, shape: tuple[int, ...], chunks: Iterable[bytes]) -> str:
        """An fp32 tensor in the file of weights."""
        self.initializers[name] = self.data.append(name, shape, chunks)
        return name

    def take(self, name: str) -> Stored:
        """A tensor of the model, which is then used."""
        self.used.add(name)
        return self.tensors[name]

    def weight(self, name: str, *, plus: float = 0.0) -> str:
        """One tensor of the model under its own name; `plus` is added to it."""
        if name in self.initializers:
            return name
        tensor = self.take(name)
        chunks: Iterator[bytes] = fp32(tensor)
        if plus:
            chunks = ((np.frombuffer(chunk, "<f4") + np.float32(plus)).tobytes() for chunk in chunks)
        return self.store(name, tensor.shape, chunks)

    def packed(self, name: str, parts: Iterable[str]) -> str:
        """Tensors of the model, one below the other along the first axis."""
        tensors = [self.take(part) for part in parts]
        shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
        return self.store(name, shape, itertools.chain.from_iterable(map(fp32, tensors)))

    def linear(self, x: str, layer: str, names: Iterable[str], *, bias: bool, out: str) -> str:
        """x (B, T, in) through the projections `names` of `layer`, packed into one product: (B, T, all their outs)."""
        weights = tuple(f"{layer}.{name}.weight" for name in names)
        plain = "" if bias else out
        if (whole := self.transposed.get(weights)) is not None:
            self.used.update(weights)
            weight = self.store(f"{out}.weight", whole.shape, fp32(whole))
            y = self.op("MatMul", x, weight, out=plain or f"{out}.product")
        else:
            weight = self.packed(f"{out}.weight", weights)
            y = self.op("FusedMatMul", x, weight, out=plain or f"{out}.product", domain=CONTRIB, transB=1)
        if not bias:
            return y
        added = self.packed(f"{out}.bias", (f"{layer}.{name}.bias" for name in names))
        return self.op("Add", y, added, out=out)


def head(g: Graph, x: str, *, out: str) -> str:
    """The last `logits_to_keep` positions of (B, T, C), or all for 0, through the head: (B, kept, V).

    `logits_to_keep` is an input with a default, that a runtime need not know of. A decoder mostly wants the last row;
    leaving the others out saves a sixth of a prefill under a 4,096-piece head.
    """
    g.constant("logits_to_keep", [0])
    start = g.op("Neg", "logits_to_keep", out="first_kept")
    kept = g.op("Slice", x, start, g.constant("to_the_end", [2**62]), g.constant("time_axis", [1]), out="kept")
    name = "model.embed_tokens" if g.config.tie_word_embeddings else "lm_head"
    return g.op("FusedMatMul", kept, g.weight(f"{name}.weight"), out=out, domain=CONTRIB, transB=1)


def save(
    model: Path,
    folder: Path,
    config: Config,
    metadata: Mapping[str, str],
    nodes: Callable[[Graph], None],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> int:
    """Writes a graph as model.onnx and model.onnx.data into `folder` and returns the bytes of both.

    Args:
        nodes: builds it; the weights are written as it names them, a few megabytes at a time.
        metadata: goes into the model's properties.

    Raises:
        DataError: the weights and the config do not fit together, or hold something that the graph would ignore.
    """
    with (folder / WEIGHTS).open("wb") as file:
        g = Graph(config, model, ExternalData(file, WEIGHTS))
        nodes(g)
    known = {*g.tensors, *itertools.chain.from_iterable(g.transposed)}
    if unread := known - g.used:
        raise DataError(f"the graph has no place for {len(unread)} tensors, {min(unread)} among them", file=model)
    proto = helper.make_model(
        helper.make_graph(g.nodes, nodes.__name__, inputs, outputs, list(g.initializers.values())),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=IR_VERSION,
        producer_name="llmctl",
        producer_version=llmctl.__version__,
    )
    helper.set_model_props(proto, {"llmctl.version": llmctl.__version__, **metadata})
    onnx.save(proto, folder / GRAPH)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS))


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, kind, shape)


IDS = value("input_ids", TensorProto.INT64, "batch_size", "sequence_length")
KEPT = value("logits_to_keep", TensorProto.INT64, 1)


def logits(config: Config) -> onnx.ValueInfoProto:
    return value("logits", TensorProto.FLOAT, "batch_size", "kept_sequence_length", config.vocab_size)
