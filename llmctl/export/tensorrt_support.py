"""Whether TensorRT takes a graph, told without TensorRT: every node against the table of its ONNX parser.

The table is data (tensorrt_operators.json, with its source): the types an operator takes, and the restrictions on
ranks, inputs, outputs and attributes. What can't be told counts against the graph. Where the packages are there,
NVIDIA's own parser is asked as well; that of TensorRT for RTX (`pip install tensorrt-rtx`) needs no GPU.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, defs, numpy_helper

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text(encoding="utf-8"))
TYPES = {name: group["types"] for group in TABLE["types"] for name in group["operators"]}
PARSERS = (
    "tensorrt",
    "tensorrt_rtx_bindings",
)  # modules with one interface; the second is of `pip install tensorrt-rtx`


class Problem(NamedTuple):
    """A node that TensorRT has no form of."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} {self.node}: {self.reason}"


class Values(NamedTuple):
    """What is known of a graph's values before it runs."""

    types: Mapping[str, str]  # FLOAT, INT64 ...
    shapes: Mapping[str, tuple[int | None, ...]]  # None: not fixed
    constants: Mapping[str, TensorProto]
    inputs: frozenset[str]
    outputs: frozenset[str]


def unsupported(graph: Path) -> list[Problem]:
    """Every node of a graph that the table does not cover, in the graph's order; empty: TensorRT should take it.

    Nodes whose types can't be told are listed only where no other is at fault: mostly they follow one that is.
    """
    model = onnx.load(str(graph), load_external_data=False)
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    first, last = TABLE["opsets"]
    if not first <= opset <= last:
        return [Problem("the graph", f"opset {opset}", f"{TABLE['runtime']} takes opsets {first} to {last}")]
    values = known(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    found = [Problem(node.name or node.output[0], node.op_type, reason)
             for node in model.graph.node if (reason := reason_against(node, opset, values))]  # fmt: skip
    return [problem for problem in found if UNTOLD not in problem.reason] or found


UNTOLD = "can't be told"


def reason_against(node: onnx.NodeProto, opset: int, values: Values) -> str:
    """Why the table does not cover a node; empty where it does."""
    if node.domain:
        return f"the parser has no operators of {node.domain}"
    if node.op_type not in TYPES:
        return f"is not in the table of {TABLE['runtime']}"
    if node.op_type in TABLE["unread"]["operators"]:
        return str(TABLE["unread"]["because"])
    rule = TABLE["rules"].get(node.op_type, {})
    broken = next(broken_types(node, opset, rule, values), "") or next(broken_rules(node, rule, values), "")
    return f"{broken} ({rule['because']})" if broken and rule and UNTOLD not in broken else broken


def broken_types(node: onnx.NodeProto, opset: int, rule: Mapping[str, Any], values: Values) -> Iterator[str]:
    """What of a node's inputs and outputs has a type that its rule does not name."""
    schema = defs.get_schema(node.op_type, opset, "")
    subject = schema.inputs[rule.get("subject", 0)].type_str if schema.inputs else ""
    for i, name in enumerate(node.input):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)]  # the last one may stand for many
        allowed = rule.get("types", {}).get(str(i)) or (TYPES[node.op_type] if formal.type_str == subject else None)
        if name and allowed is not None and (found := values.types.get(name, UNTOLD)) not in allowed:
            yield f"the type of input {formal.name}, {found}" if found != UNTOLD else f"the type of {name} {UNTOLD}"
    for name in filter(None, node.output):
        if (found := values.types.get(name, UNTOLD)) not in TABLE["values"]:
            yield f"gives {found}" if found != UNTOLD else f"the type of {name} {UNTOLD}"


def broken_rules(node: onnx.NodeProto, rule: Mapping[str, Any], values: Values) -> Iterator[str]:
    """What breaks each of a rule's keys; tensorrt_operators.json is made of nothing else."""
    given = {i: name for i, name in enumerate(node.input) if name}
    attributes = {attribute.name: plain(attribute) for attribute in node.attribute}
    for i, rank in rule.get("rank", {}).items():
        shape = values.shapes.get(given[int(i)]) if int(i) in given else (None,) * rank
        if shape is None:
            yield f"the rank of {given[int(i)]} {UNTOLD}"
        elif len(shape) != rank:
            yield f"input {i} has {len(shape)} dimensions"
    yield from (f"input {i} is given" for i in rule.get("absent", ()) if i in given)
    if len([name for name in node.output if name]) > rule.get("outputs", len(node.output)):
        yield f"has {len(node.output)} outputs"
    for name, allowed in rule.get("attributes", {}).items():
        if attributes.get(name, allowed[0]) not in allowed:
            yield f"{name} = {attributes[name]}"
    yield from (f"input {i} is no constant" for i in rule.get("constant", ()) if given.get(i, "") not in
                (values.constants.keys() | {""}))  # fmt: skip
    for i in rule.get("zero", ()):
        if i in given and (given[i] not in values.constants or not is_zero(values.constants[given[i]])):
            yield f"input {i} is not zero"
    block = attributes.get("block_size", 0)
    if rule.get("blocks") and block:
        shape = values.shapes.get(node.input[0], ())
        size = shape[attributes.get("axis", 1)] if shape else None
        if size is None or size % block:
            yield f"blocks of {block} do not divide {size}"
    if rule.get("cache"):
        cache = node.input[0]
        if cache not in values.inputs or node.output[0] not in values.outputs:
            yield f"{cache} is no input of the graph, or {node.output[0]} no output"
        elif values.shapes[cache][-2] is None:
            yield f"dimension -2 of {cache} is not fixed"


def known(graph: onnx.GraphProto) -> Values:
    """The types and shapes that shape inference left in a graph."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: TensorProto.DataType.Name(tensor.data_type) for name, tensor in constants.items()}
    shapes: dict[str, tuple[int | None, ...]] = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        types[value.name] = TensorProto.DataType.Name(tensor.elem_type)
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    inputs, outputs = (frozenset(value.name for value in values) for values in (graph.input, graph.output))
    return Values(
        {name: kind for name, kind in types.items() if kind != "UNDEFINED"}, shapes, constants, inputs, outputs
    )


def plain(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def is_zero(tensor: TensorProto) -> bool:
    """Whether a small constant is all zeros; one that lies in a file of weights is taken for not zero."""
    return tensor.data_location != TensorProto.EXTERNAL and not numpy_helper.to_array(tensor).astype("f4").any()


def parsers() -> list[Any]:
    """The modules here that hold NVIDIA's ONNX parser."""
    found = []
    for name in PARSERS:
        try:
            found.append(importlib.import_module(name))
        except Exception:  # noqa: S112 - not installed, or installed without the libraries and the driver it wants
            continue
    return found


def logger(trt: Any) -> Any:
    """A logger that keeps the errors, in `errors`, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())

    return Log()


def parse(trt: Any, graph: Path, log: Any) -> tuple[Any, Any, list[str]]:
    """Reads a graph with NVIDIA's own parser: (builder, network, what the parser has against it).

    Args:
        trt: one of `parsers`.
    """
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return builder, network, []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return builder, network, [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]


def verdict(trt: Any, graph: Path) -> list[str]:
    """What one of `parsers` has against a graph; nothing where it takes it."""
    return parse(trt, graph, logger(trt))[2]
