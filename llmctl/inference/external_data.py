"""What is checked of an ONNX file before ONNX Runtime sees it: where its weights lie, and how much they say they are.

A graph may name any file for its weights, and a runtime that trusts it reads that file into the model: a secret next
door, or memory behind the end of a mapping (CVE-2026-27489, -34445 to -34447). Here weights are bytes of plain files in
the graph's own folder that no other name leads to, as many as the tensor's shape takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from llmctl.errors import DataError

LARGEST = 128 << 20  # bytes of a graph without its weights; one of 1,000 layers takes a tenth
WIDEST = 1 << 40  # values of a tensor
BITS = {
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
}
SUSPECT = "do not use this folder"


def check_external_data(graph: Path) -> None:
    """Refuses an ONNX file that is none, that lies about its tensors, or whose weights lie elsewhere.

    Tensors are looked for in every field of the file: initialisers, attributes, subgraphs, functions.

    Raises:
        DataError: no ONNX file, or a very large one; two initialisers of one name; a shape with a negative dimension;
            functions; an external tensor with an absolute path, "..", a link, a hard link, or bytes past the end of its
            file.
    """
    model = read(graph)
    names: set[str] = set()
    for initializer in model.graph.initializer:
        if initializer.name in names:
            raise DataError(f"has two initialisers named {initializer.name[:80]!r}", file=graph, hint=SUSPECT)
        names.add(initializer.name)
    for tensor in tensors(model):
        if problem := lie(tensor, graph.parent):
            raise DataError(f"the weights of {tensor.name[:80]} {problem}", file=graph, hint=SUSPECT)
    if model.functions:  # forty that call each other twice are a billion nodes to ONNX Runtime, which expands them
        name = model.functions[0].name[:80]
        raise DataError(f"has functions of its own ({name!r}), as no graph of llmctl's has", file=graph, hint=SUSPECT)


def read(graph: Path) -> onnx.ModelProto:
    """The graph without the weights that lie beside it.

    Raises:
        DataError: it is missing, no ONNX file, or larger than a graph without weights can be.
    """
    try:
        size = graph.stat().st_size
        if size > LARGEST:
            raise DataError(
                f"has {size:,} bytes; at most {LARGEST:,} are read",
                file=graph,
                hint="weights belong into a file beside the graph: onnx.save(..., save_as_external_data=True)",
            )
        return onnx.load(str(graph), load_external_data=False)
    except DataError:
        raise
    except Exception as reason:  # protobuf's and onnx's errors share no base
        raise DataError(f"is no ONNX model ({reason})", file=graph) from reason


def tensors(message: Any) -> Iterator[Any]:
    """Every tensor anywhere in a message. protobuf itself refuses files nested deeper than 100."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if hasattr(value, "ListFields") else value:
            if isinstance(inner, TensorProto):
                yield inner
            else:
                yield from tensors(inner)


def lie(tensor: Any, folder: Path) -> str:
    """What is wrong with a tensor; empty for one whose shape and place are in order."""
    if len(tensor.dims) > 64 or any(size < 0 for size in tensor.dims) or (count := math.prod(tensor.dims)) > WIDEST:
        return f"have the shape {list(tensor.dims)[:8]}"
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    entries = [(item.key, item.value) for item in tensor.external_data]
    if not all(isinstance(text, str) for item in entries for text in item):  # protobuf gives what is no UTF-8 as bytes
        return "lie in a place whose name is no text"
    if len(dict(entries)) != len(entries):
        return "lie in two places: a key of external_data is there twice"
    kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() else ""
    if kind not in BITS:
        return f"are of type {kind or tensor.data_type}, which is not kept outside of a graph"
    return outside(folder, dict(entries), -(-count * BITS[kind] // 8))


def outside(folder: Path, entry: dict[str, str], needed: int) -> str:
    """What is wrong with a place where `needed` bytes of weights are said to lie; empty for a plain file's own."""
    location, offset = entry.get("location", ""), entry.get("offset", "0")
    length = entry.get("length", str(needed))
    file = folder / location[:256]
    if not 0 < len(location) < 256 or Path(location).name != location or file.is_symlink() or not file.is_file():
        return f"lie in {location[:200]!r}, which is no file beside the graph"
    found = file.stat()
    if found.st_nlink > 1:
        return f"lie in {location}, which has other names (hard links): it may be a file from elsewhere"
    whole = all(number.isascii() and number.isdigit() and len(number) < 20 for number in (offset, length))
    if not whole or int(offset) + max(int(length), needed) > found.st_size:
        return f"lie past the end of {location} (offset {offset[:24]}, length {length[:24]})"
    if int(length) != needed:
        return f"take {needed:,} bytes, but {length} of {location} are theirs"
    return ""
