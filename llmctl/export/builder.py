"""What every graph is built with: nodes in the order they run, and the weights they name, under the model's own names.

In the `ort` profile weights stay as they lie on disk. A matrix (out, in), as torch has it, is multiplied by its
transpose (FusedMatMul); one that its family stores as (in, out) is multiplied as it is; what a family stores packed and
a product wants packed is copied whole. So writing weights is a copy of bytes, and packing is concatenation. The
`portable` profile, whose MatMul multiplies (in, out) alone, transposes while it copies; the head, which may be the
embedding too, stays as it is under a Gemm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import llmctl
from llmctl.errors import DataError
from llmctl.export import lowrank, quantized
from llmctl.export.form import Form
from llmctl.export.weights import ELEMENTS, KINDS, ExternalData, columns, rows, streamed
from llmctl.model import compressed, hf
from llmctl.model.compressed import Packed, Quantized
from llmctl.model.config import Config
from llmctl.model.storage import Stored

IR_VERSION = 11
CONTRIB = "com.microsoft"
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"


class Graph:
    """A graph in the making.

    Attributes:
        form: the profile and the dtype.
        tensors: the model's tensors by their native names; of what a family stores packed, the rows that are theirs.
        transposed: matrices that lie as (in, out), by the native matrices that each holds.
        quantized: where the codes of a matrix lie, by its native name: the name there, and its first row.
    """

    def __init__(self, config: Config, model: Path, data: ExternalData, form: Form) -> None:
        """Raises DataError where the weights do not fit the config."""
        self.config, self.model, self.data, self.form = config, model, data, form
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []  # beside those that every graph of the kind has
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.used: set[str] = set()
        self.tensors: dict[str, Stored] = {}
        self.transposed: dict[tuple[str, ...], Stored] = {}
        self.quantized: dict[str, tuple[str, Packed, int, int]] = {}
        built = hf.build(config)
        sizes = {name: tensor.shape[0] for name, tensor in built.state_dict().items()}
        for name, (entry, tensor) in hf.places(built, model).items():
            ends = [0, *itertools.accumulate(sizes[part] for part in entry.parts)]
            parts = zip(entry.parts, ends, strict=False)
            if isinstance(tensor, Packed):
                self.quantized |= {part: (name, tensor, start, sizes[part]) for part, start in parts}
            elif entry.transposed:
                self.transposed[entry.parts] = tensor
            else:
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

    def scalar(self, name: str, value: float) -> str:
        """A small value in the dtype of what flows between the nodes."""
        if name not in self.initializers:
            self.initializers[name] = helper.make_tensor(name, self.form.type, (), [value])
        return name

    def table(self, name: str, value: np.ndarray, dtype: str = "") -> str:
        """A computed table in the file of weights, in the graph's dtype unless told."""
        dtype = dtype or self.form.dtype
        return self.store(name, value.shape, [value.astype(ELEMENTS[dtype]).tobytes()], dtype)

    def store(self, name: str, shape: tuple[int, ...], chunks: Iterable[bytes], dtype: str = "") -> str:
        """A tensor in the file of weights; `chunks` are its bytes in the graph's dtype unless told."""
        self.initializers[name] = self.data.append(name, shape, chunks, KINDS[dtype or self.form.dtype])
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
        return self.store(name, tensor.shape, streamed(tensor, self.form.dtype, plus))

    def packed(self, name: str, parts: Iterable[str]) -> str:
        """Tensors of the model, one below the other along the first axis."""
        tensors = [self.take(part) for part in parts]
        shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
        chunks = (chunk for tensor in tensors for chunk in streamed(tensor, self.form.dtype))
        return self.store(name, shape, chunks)

    def turned(self, name: str, parts: Iterable[str]) -> str:
        """Matrices (out, in) of the model, packed and transposed: (in, all their outs)."""
        tensors = [self.take(part) for part in parts]
        shape = (tensors[0].shape[1], sum(tensor.shape[0] for tensor in tensors))
        return self.store(name, shape, columns(tensors, self.form.dtype))

    def codes(self, names: Sequence[str]) -> Quantized | None:
        """Quantised matrices, one below the other; None where they are plain.

        Raises:
            DataError: only some are quantised, or they are in different ways.
        """
        places = [self.quantized[name] for name in names if name in self.quantized]
        if not places:
            return None
        if len(places) < len(names) or len({place.scheme for _, place, _, _ in places}) > 1:
            raise DataError(f"{' and '.join(names)} are multiplied together, but quantised apart", file=self.model)
        self.used.update(names)
        whole = (compressed.unpack(name, place, hf.read).rows(at, at + count) for name, place, at, count in places)
        return compressed.stacked(list(whole))

    def seen(self, name: str, value: np.ndarray, shape: tuple[int, ...], dtype: str) -> str:
        """A table in the file of weights, stored once however many shapes it is read in."""
        held = self.data.append(name, value.shape, [value.astype(ELEMENTS[dtype]).tobytes()], KINDS[dtype])
        dims = value.reshape(shape).shape
        alias = f"{name}.{'x'.join(map(str, dims))}"
        if alias not in self.initializers:
            tensor = TensorProto()
            tensor.CopyFrom(held)
            tensor.name, tensor.dims[:] = alias, dims
            self.initializers[alias] = tensor
        return alias

    def lookup(self, name: str, ids: str, *, out: str) -> str:
        """Rows of the model's table `name` by number, (B, T) -> (B, T, C)."""
        if (matrix := self.codes([name])) is not None:
            return quantized.lookup(self, ids, matrix, name, out=out)
        return self.op("Gather", self.weight(name), ids, out=out)

    def linear(self, x: str, layer: str, names: Iterable[str], *, bias: bool, out: str) -> str:
        """x (B, T, in) through the projections `names` of `layer`, packed into one product: (B, T, all their outs)."""
        names = tuple(names)
        weights = tuple(f"{layer}.{name}.weight" for name in names)
        adapted = any(f"{layer}.{name}" in self.form.adapted for name in names)
        plain = "" if bias or adapted else out
        if (matrix := self.codes(weights)) is not None:
            y = quantized.product(self, x, matrix, f"{out}.weight", out=plain or f"{out}.product")
        elif (whole := self.transposed.get(weights)) is not None:
            self.used.update(weights)
            weight = self.store(f"{out}.weight", whole.shape, streamed(whole, self.form.dtype))
            y = self.op("MatMul", x, weight, out=plain or f"{out}.product")
        elif self.form.profile == "portable":
            y = self.op("MatMul", x, self.turned(f"{out}.weight", weights), out=plain or f"{out}.product")
        else:
            weight = self.packed(f"{out}.weight", weights)
            y = self.op("FusedMatMul", x, weight, out=plain or f"{out}.product", domain=CONTRIB, transB=1)
        if adapted:
            y = lowrank.changed(self, x, y, layer, names, out=f"{out}.changed" if bias else out)
        if not bias:
            return y
        added = self.packed(f"{out}.bias", (f"{layer}.{name}.bias" for name in names))
        return self.op("Add", y, added, out=out)

    def head(self, x: str, name: str, *, out: str) -> str:
        """(B, T, C) through the transpose of `name`'s (V, C): (B, T, V). The matrix may be the embedding: one copy."""
        if (matrix := self.codes([f"{name}.weight"])) is not None:
            matrix = quantized.blocked(matrix) if self.form.profile == "ort" else matrix
            return quantized.product(self, x, matrix, f"{name}.weight", out=out)
        weight = self.weight(f"{name}.weight")
        if self.form.profile == "ort":
            return self.op("FusedMatMul", x, weight, out=out, domain=CONTRIB, transB=1)
        shape, C = self.op("Shape", x, out=f"{out}.shape", end=2), self.config.hidden_size
        flat = self.op("Reshape", x, self.constant("flat_states", [-1, C]), out=f"{out}.flat")
        product = self.op("Gemm", flat, weight, out=f"{out}.flat_product", transB=1)
        whole = self.op("Concat", shape, self.constant("any_width", [-1]), out=f"{out}.whole", axis=0)
        return self.op("Reshape", product, whole, out=out)


class Part(NamedTuple):
    """One graph of a folder.

    Attributes:
        nodes: builds it; the weights are written as it names them, a few megabytes at a time.
    """

    file: str
    nodes: Callable[[Graph], None]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]


def save(
    model: Path,
    folder: Path,
    config: Config,
    metadata: Mapping[str, str],
    nodes: Callable[[Graph], None],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    form: Form | None = None,
) -> int:
    """`save_parts` of one graph, model.onnx."""
    return save_parts(model, folder, config, metadata, [Part(GRAPH, nodes, inputs, outputs)], form)


def save_parts(
    model: Path, folder: Path, config: Config, metadata: Mapping[str, str], parts: Sequence[Part], form: Form | None
) -> int:
    """Writes graphs and model.onnx.data, whose weights they share, into `folder` and returns the bytes of all.

    Args:
        metadata: goes into the properties of each.
        form: the `ort` profile in fp32 unless told.

    Raises:
        DataError: the weights and the config do not fit together, or hold something that the graphs would ignore.
    """
    form, graphs = form or Form(), []
    with (folder / WEIGHTS).open("wb") as file:
        g = Graph(config, model, ExternalData(file, WEIGHTS), form)
        for part in parts:
            g.nodes, g.inputs, g.initializers = [], [], {}
            part.nodes(g)
            weights = list(g.initializers.values())
            graphs.append(
                helper.make_graph(g.nodes, part.nodes.__name__, [*part.inputs, *g.inputs], part.outputs, weights)
            )
    known = {*g.tensors, *g.quantized, *itertools.chain.from_iterable(g.transposed)}
    if unread := known - g.used:
        raise DataError(f"the graph has no place for {len(unread)} tensors, {min(unread)} among them", file=model)
    for part, graph in zip(parts, graphs, strict=True):
        contrib = [helper.make_opsetid(CONTRIB, 1)] if any(node.domain == CONTRIB for node in graph.node) else []
        proto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", form.opset), *contrib],
            ir_version=IR_VERSION,
            producer_name="llmctl",
            producer_version=llmctl.__version__,
        )
        helper.set_model_props(proto, {"llmctl.version": llmctl.__version__, **metadata})
        onnx.save(proto, folder / part.file)
        onnx.checker.check_model(str(folder / part.file), full_check=True)
    return sum((folder / name).stat().st_size for name in (WEIGHTS, *(part.file for part in parts)))


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, kind, shape)


IDS = value("input_ids", TensorProto.INT64, "batch_size", "sequence_length")
KEPT = value("logits_to_keep", TensorProto.INT64, 1)


def logits(config: Config) -> onnx.ValueInfoProto:
    return value("logits", TensorProto.FLOAT, "batch_size", "kept_sequence_length", config.vocab_size)


def cache_values(form: Form, c: Config, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
    """The cache of every layer, (B, K, length, D)."""
    shape = ("batch_size", c.num_key_value_heads, length, c.head_dim)
    names = (f"{prefix}.{i}.{kv}" for i in range(c.num_hidden_layers) for kv in ("key", "value"))
    return [value(name, TensorProto.INT8 if form.cache else form.type, *shape) for name in names]
