"""Tensors of a safetensors file, streamed as fp32 into the file where the graph keeps its weights.

Neither side is ever held whole: a tensor passes through a buffer of a few megabytes, so exporting costs the same memory
whatever the model's size. Formats: https://github.com/huggingface/safetensors#format and "External Data" in
https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx

from llmctl.errors import DataError
from llmctl.model import hf

BUFFER = 1 << 22  # bytes read at a time
ALIGNMENT = 4096  # ONNX asks for pages, so that a runtime can map a tensor
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    def chunks(self) -> Iterator[bytes]:
        """The tensor as little-endian fp32, a buffer at a time."""
        left = math.prod(self.shape) * WIDTH[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                raw = file.read(min(BUFFER, left))
                if not raw:
                    raise DataError(
                        "the weights end in the middle of a tensor",
                        file=self.path,
                        hint="llmctl verify names what is damaged",
                    )
                left -= len(raw)
                yield as_fp32(raw, self.dtype)


def as_fp32(raw: bytes, dtype: str) -> bytes:
    """Little-endian fp32 of the same values; exact, since bf16 is the upper half of fp32 and fp16 a subset."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
    return np.frombuffer(raw, "<f2").astype("<f4").tobytes() if dtype == "F16" else raw


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name. The library checks the header first, so lying offsets end there.

    Raises:
        DataError: no safetensors file, or a dtype that is no plain float.
    """
    hf.open_tensors(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in WIDTH:
            raise DataError(f"{name} is stored as {entry['dtype']}; export takes F32, F16 and BF16", file=path)
        found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return found


class ExternalData:
    """The file of weights beside a graph: tensors appended one after the other, each at an aligned offset."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file, self.location = file, location

    def append(self, name: str, shape: tuple[int, ...], chunks: Iterator[bytes]) -> onnx.TensorProto:
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
