"""Ways to break an exported folder: one weight, one attribute, one input of one node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

Damage = Callable[[Path], None]


def weight(name: str, change: Callable[[np.ndarray], None]) -> Damage:
    """Changes a tensor of the external data in place; a quantised matrix has parts, and their names go on."""

    def damage(folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        tensor = next(tensor for tensor in graph.initializer if f"{tensor.name}.".startswith(f"{name}."))
        entry = {item.key: item.value for item in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        change(np.memmap(folder / "model.onnx.data", dtype, "r+", int(entry["offset"]), tuple(tensor.dims)))

    return damage


def scaled(name: str, factor: float) -> Damage:
    """What a transposed or misplaced tensor would do, only smaller."""

    def change(values: np.ndarray) -> None:
        values *= np.asarray(factor, values.dtype)

    return weight(name, change)


def put(name: str, at: Any, value: float) -> Damage:
    return weight(name, lambda values: values.__setitem__(at, value))


def upside_down(name: str) -> Damage:
    return weight(name, lambda values: values.__setitem__(slice(None), values[::-1].copy()))


def edited(edit: Callable[[onnx.ModelProto], None]) -> Damage:
    """Changes the graph itself."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        edit(model)
        onnx.save(model, folder / "model.onnx")

    return damage


def node_of(model: onnx.ModelProto, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def attribute(node: str, name: str, value: Any) -> Damage:
    def edit(model: onnx.ModelProto) -> None:
        found = next(each for each in node_of(model, node).attribute if each.name == name)
        found.CopyFrom(helper.make_attribute(name, value))

    return edited(edit)


def passed_on(node: str) -> Damage:
    """A node that gives what it reads first: a bias that is not added."""

    def edit(model: onnx.ModelProto) -> None:
        found = node_of(model, node)
        found.op_type, found.domain = "Identity", ""
        del found.input[1:], found.attribute[:]

    return edited(edit)


def renamed(old: str, new: str) -> Damage:
    """Every reader of a value reads another one."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]

    return edited(edit)
