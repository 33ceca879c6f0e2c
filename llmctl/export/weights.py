"""Tensors of a safetensors file, streamed as fp32 into the file where the graph keeps its weights.

Neither side is ever held whole: a tensor passes through a buffer of a few megabytes, so exporting costs the same memory
whatever the model's size. "External Data" in https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import onnx

from llmctl.errors import DataError
from llmctl.model.storage import Stored

ALIGNMENT = 4096  # ONNX asks for pages, so that a runtime can map a tensor
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


def fp32(tensor: Stored) -> Iterator[bytes]:
    """A stored tensor as little-endian fp32, a buffer at a time.

    Raises:
        DataError: a dtype that is no plain float.
    """
    if tensor.dtype not in WIDTH:
        raise DataError(f"a tensor is stored as {tensor.dtype}; export takes F32, F16 and BF16", file=tensor.path)
    return (as_fp32(raw, tensor.dtype) for raw in tensor.chunks())


def as_fp32(raw: bytes, dtype: str) -> bytes:
    """Little-endian fp32 of the same values; exact, since bf16 is the upper half of fp32 and fp16 a subset."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
    return np.frombuffer(raw, "<f2").astype("<f4").tobytes() if dtype == "F16" else raw


def rows(tensor: Stored, start: int, count: int) -> Stored:
    """Some rows of a stored tensor, as a tensor of their own."""
    size = (tensor.end - tensor.start) // tensor.shape[0] if tensor.shape[0] else 0
    first = tensor.start + start * size
    return dataclasses.replace(tensor, shape=(count, *tensor.shape[1:]), start=first, end=first + count * size)


class ExternalData:
    """The file of weights beside a graph: tensors appended one after the other, each at an aligned offset."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file, self.location = file, location

    def append(self, name: str, shape: tuple[int, ...], chunks: Iterable[bytes]) -> onnx.TensorProto:
        """Writes an fp32 tensor and returns the initialiser that points at it."""
        offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
        self.file.seek(offset)
        for chunk in chunks:
            self.file.write(chunk)
        tensor = onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=shape, data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", self.location), ("offset", offset), ("length", self.file.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        assert self.file.tell() - offset == 4 * math.prod(shape), name
        return tensor
