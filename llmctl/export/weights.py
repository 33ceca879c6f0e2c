"""Tensors of a safetensors file, streamed in the graph's dtype into the file where it keeps its weights.

Neither side is ever held whole: a tensor passes through a buffer of a few megabytes, so exporting costs the same memory
whatever the model's size. "External Data" in https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import ml_dtypes
import numpy as np
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from llmctl.errors import DataError
from llmctl.export.form import TYPES
from llmctl.model.storage import Stored

PAGE, SMALL = 4096, 1 << 16  # ONNX asks for pages, so that a runtime can map a tensor; nobody maps small ones
ALIGNMENT = 64  # of those
NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {"fp32": NUMPY["F32"], "fp16": NUMPY["F16"], "bf16": NUMPY["BF16"]}
# The dtypes of the file of weights, as ONNX numbers them; four bits lie two to a byte.
KINDS = {**TYPES, **{name: getattr(TensorProto, name.upper()) for name in ("int16", "int8", "uint8", "int4", "uint4")}}
ELEMENTS = {**DTYPES, "int16": np.dtype("<i2"), "int8": np.dtype("i1"), "uint8": np.dtype("u1")}
PANEL = 1 << 22  # bytes that are transposed at once


def streamed(tensor: Stored, dtype: str = "fp32", plus: float = 0.0) -> Iterator[bytes]:
    """A stored tensor, `plus` added to it in fp32, as little-endian `dtype`, a buffer at a time.

    Raises:
        DataError: it is stored as no plain float, or holds a value that `dtype` has no number for.
    """
    stored = checked(tensor)
    return (cast(np.frombuffer(raw, stored), dtype, tensor, plus).tobytes() for raw in tensor.chunks())


def columns(tensors: list[Stored], dtype: str) -> Iterator[bytes]:
    """The transpose of matrices (out, in) laid one below the other: (in, all outs) as `dtype`, a few columns at a time.

    Raises:
        DataError: see `streamed`.
    """
    held = [np.memmap(t.path, checked(t), "r", t.start, t.shape) for t in tensors]
    width, step = held[0].shape[1], max(1, PANEL // (4 * sum(len(matrix) for matrix in held)))
    for start in range(0, width, step):
        panel = [cast(matrix[:, start : start + step].T, dtype, t) for matrix, t in zip(held, tensors, strict=True)]
        yield np.concatenate(panel, axis=1).tobytes()


def checked(tensor: Stored) -> np.dtype:
    """The dtype of a stored tensor; raises DataError where it is no plain float."""
    if tensor.dtype not in NUMPY:
        raise DataError(f"a tensor is stored as {tensor.dtype}; export takes F32, F16 and BF16", file=tensor.path)
    found: np.dtype = NUMPY[tensor.dtype]
    return found


def cast(values: np.ndarray, dtype: str, tensor: Stored, plus: float = 0.0) -> np.ndarray:
    """Values in another dtype, rounded to nearest; raises DataError where one overflows."""
    if plus:
        values = values.astype(np.float32) + np.float32(plus)
    with np.errstate(over="ignore"):
        made = values.astype(DTYPES[dtype])
    if dtype == "fp16" and tensor.dtype != "F16" and not np.isfinite(made).all():
        raise DataError("a weight is beyond fp16's 65504", file=tensor.path, hint='[export] dtype = "bf16" or "fp32"')
    return made


def rows(tensor: Stored, start: int, count: int) -> Stored:
    """Some rows of a stored tensor, as a tensor of their own."""
    size = (tensor.end - tensor.start) // tensor.shape[0] if tensor.shape[0] else 0
    first = tensor.start + start * size
    return dataclasses.replace(tensor, shape=(count, *tensor.shape[1:]), start=first, end=first + count * size)


class ExternalData:
    """The file of weights beside a graph: tensors appended one after the other, each at an aligned offset."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file, self.location = file, location
        self.held: dict[str, TensorProto] = {}

    def append(
        self, name: str, shape: tuple[int, ...], chunks: Iterable[bytes], kind: int = TensorProto.FLOAT
    ) -> TensorProto:
        """Writes a tensor of an ONNX dtype and returns the initialiser that points at it.

        What is held under that name already, since another graph has it, is not written again.
        """
        if name in self.held:
            return self.held[name]
        bits = 4 if kind in (TensorProto.INT4, TensorProto.UINT4) else 8 * tensor_dtype_to_np_dtype(kind).itemsize
        size = -(-bits * math.prod(shape) // 8)
        unit = PAGE if size >= SMALL else ALIGNMENT
        offset = -(-self.file.tell() // unit) * unit
        self.file.seek(offset)
        for chunk in chunks:
            self.file.write(chunk)
        assert self.file.tell() - offset == size, name
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", offset), ("length", self.file.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        self.held[name] = tensor
        return tensor
