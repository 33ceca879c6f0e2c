"""The GGUF container: its header, checked before anything is believed, and its tensors, read one at a time.

A header is a list of lengths, counts and offsets that a file states about itself. Each is held against what the file
really has before memory is taken for it, so a file that lies costs no more than its own size and ends in a DataError
that names the field. Dequantisation is the `gguf` package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from llmctl.errors import DataError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# What one file may ask for, far above any real one: the largest vocabularies make headers of 20 MB.
MOST_HEADER = 1 << 28  # bytes before the tensors
MOST_STRINGS = 1 << 22
MOST_KEY = 1 << 16  # bytes; the specification's own limit
MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
ROWS = 1 << 22  # values dequantised at a time

SCALARS = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "?",
    10: "u8",
    11: "i8",
    12: "f8",
}
STRING, ARRAY = 8, 9
# The types that are read: ggml's number, values a block, bytes a block (ggml-common.h).
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
DAMAGED = "it may be cut off or damaged: copy it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies, and how: `shape` in torch's order (GGUF's own is the reverse)."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    bytes: int

    def load(self) -> Tensor:
        """The values: F32, F16 and BF16 as they are, everything else dequantised to fp32.

        A copy, so that replacing or truncating the file can't reach into a running model; made in pieces, so that the
        peak is the tensor itself.
        """
        out = torch.empty(self.shape, dtype=PLAIN.get(self.type, torch.float32))
        flat = out.view(-1, self.shape[-1])
        rows, width = flat.shape
        row_bytes = self.bytes // rows
        step = max(1, ROWS // width)
        with self.path.open("rb") as file:
            file.seek(self.start)
            for row in range(0, rows, step):
                raw = file.read(row_bytes * min(step, rows - row))
                if len(raw) != row_bytes * min(step, rows - row):
                    raise DataError(f"ends in the middle of {self.name}", file=self.path, hint=DAMAGED)
                flat[row : row + step] = _values(raw, self.type, row_bytes).view(-1, width)
        return out


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file, or all parts of a split one: metadata by key (arrays of numbers are numpy's), tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: Path) -> GGUFFile:
    """The header of a file; of all of them, where the name is one part's (`-00001-of-00003.gguf`).

    Raises:
        DataError: not GGUF, or a header that contradicts itself or the file.
    """
    split = SPLIT.fullmatch(path.name)
    if split is None or int(split[3]) == 1:
        return _read_one(path)
    paths = [path.with_name(f"{split[1]}-{part:05d}-of-{split[3]}.gguf") for part in range(1, int(split[3]) + 1)]
    if absent := [part.name for part in paths if not part.is_file()]:
        raise DataError(f"is one of {len(paths)} parts, but {', '.join(absent[:4])} is missing", file=path)
    first, *others = (_read_one(part) for part in paths)
    tensors = dict(first.tensors)
    for other in others:
        if twice := tensors.keys() & other.tensors.keys():
            raise DataError(f"tensor {min(twice)} is also in another part", file=other.path)
        tensors |= other.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise DataError(f"split.tensors.count is {stated}, but the parts hold {len(tensors)} tensors", file=paths[0])
    return GGUFFile(paths[0], first.metadata, tensors)


def _read_one(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as reason:
        raise DataError(f"cannot be read ({reason})", file=path) from reason


class _Header:
    """A walk through the bytes before the tensors; `field` is what is being read, for errors."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.field = path, file, "the header"
        self.size = path.stat().st_size
        self.at = 0
        self.strings = 0

    def read(self) -> GGUFFile:
        if (magic := self.take(4)) != MAGIC:
            raise DataError(f"begins with {magic!r}, but a GGUF file begins with {MAGIC!r}", file=self.path)
        version = self.number("u4")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"big-endian GGUF {swapped}" if swapped in VERSIONS else f"GGUF version {version}"
            raise DataError(f"is {found}; llmctl reads versions 2 and 3, little-endian", file=self.path)
        tensors, keys = self.number("u8"), self.number("u8")
        self.counted("the tensor count", tensors, 24)
        self.counted("the key count", keys, 13)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            self.field = "a key"
            key = self.string(MOST_KEY)
            if key in metadata:
                raise self.wrong(f"key {key} is there twice")
            self.field = key
            metadata[key] = self.value(self.number("u4"))
        entries = [self.entry() for _ in range(tensors)]
        return GGUFFile(self.path, metadata, self.placed(entries, metadata))

    def placed(
        self, entries: list[tuple[str, int, tuple[int, ...], int]], metadata: dict[str, Any]
    ) -> dict[str, Stored]:
        """Where each tensor lies, after checking that they fill the rest of the file without overlap or hole."""
        self.field = "general.alignment"
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MOST_KEY or alignment & (alignment - 1):
            raise self.wrong(f"is {alignment}, but it must be a power of two up to {MOST_KEY}")
        begin = end = _up(self.at, alignment)
        found: dict[str, Stored] = {}
        for name, type, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            self.field = name
            if name in found:
                raise self.wrong("is there twice")
            title, block, block_bytes = TYPES[type]
            if shape[-1] % block:
                raise self.wrong(f"is {title}, in blocks of {block}, but its rows have {shape[-1]} values")
            size = math.prod(shape) // block * block_bytes
            if begin + offset != end:
                what = "inside the tensor before it" if begin + offset < end else "beyond where the last one ends"
                raise self.wrong(f"begins at {offset} in the data, {what} ({end - begin})")
            if end + size > self.size:
                raise self.wrong(f"takes {size} bytes from {end}, but the file ends at {self.size}")
            found[name] = Stored(self.path, name, title, shape, end, size)
            end = _up(end + size, alignment)
        return found

    def entry(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape and offset of one tensor."""
        self.field = "a tensor's name"
        name = self.string(MOST_KEY)
        self.field = name
        dimensions = self.number("u4")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.wrong(f"has {dimensions} dimensions, but a tensor has 1 to {MOST_DIMENSIONS}")
        shape = tuple(self.number("u8") for _ in range(dimensions))[::-1]
        if 0 in shape or math.prod(shape) > self.size * 8:  # no type takes less than a bit a value
            raise self.wrong(f"is {list(shape)}, which a file of {self.size} bytes does not hold")
        type = self.number("u4")
        if type not in TYPES:
            known = ", ".join(title for title, _, _ in TYPES.values())
            raise self.wrong(f"is stored as ggml type {_type_name(type)}; llmctl reads {known}")
        return name, type, shape, self.number("u8")

    def value(self, type: int) -> Any:
        if type == STRING:
            return self.string(self.size)
        if type in SCALARS:
            return self.number(SCALARS[type])
        if type != ARRAY:
            raise self.wrong(f"has value type {type}, but the types are 0 to 12")
        type, count = self.number("u4"), self.number("u8")
        if type == STRING:
            self.counted(f"{self.field}'s length", count, 8)
            return [self.string(self.size) for _ in range(count)]
        if type not in SCALARS:
            raise self.wrong(f"is an array of type {type}; llmctl reads arrays of numbers and strings")
        kind = np.dtype(SCALARS[type]).newbyteorder("<")
        self.counted(f"{self.field}'s length", count, kind.itemsize)
        return np.frombuffer(self.take(count * kind.itemsize), kind)

    def number(self, kind: str) -> Any:
        """One number; an fp32 as the shortest decimal that is the same fp32, so that 1e-5 reads 1e-05."""
        dtype = np.dtype(kind).newbyteorder("<")
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        return float(str(value)) if kind == "f4" else value.item()

    def string(self, most: int) -> str:
        length = int.from_bytes(self.take(8), "little")
        self.strings += 1
        if length > most or self.strings > MOST_STRINGS:
            raise self.wrong(f"is a string of {length} bytes, but at most {most} (and {MOST_STRINGS} strings) fit here")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as reason:
            raise self.wrong(f"is not UTF-8 ({reason.reason} at byte {self.at - length + reason.start})") from None

    def counted(self, what: str, count: int, least: int) -> None:
        """Refuses a count of things that would not fit in the rest of the file, `least` bytes each."""
        if count * least > self.size - self.at:
            left = f"{least * count:,} bytes or more, but {self.size - self.at:,} are left"
            raise DataError(f"{what} is {count:,}, which takes {left}", file=self.path, hint=DAMAGED)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.wrong(f"takes {count:,} bytes at byte {self.at:,}, but the file ends at {self.size:,}")
        self.at += count
        if self.at > MOST_HEADER:
            raise self.wrong(f"lies {self.at:,} bytes into the header; llmctl reads headers up to {MOST_HEADER:,}")
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.wrong("could not be read whole: the file is being changed")
        return raw

    def wrong(self, problem: str) -> DataError:
        return DataError(f"{_shown(self.field)} {problem}", file=self.path, hint=DAMAGED)


def _values(raw: bytes, type: str, row_bytes: int) -> Tensor:
    """The values of whole rows."""
    if type in PLAIN:
        return torch.frombuffer(bytearray(raw), dtype=PLAIN[type])
    from gguf import GGMLQuantizationType, quants

    rows = np.frombuffer(raw, np.uint8).reshape(-1, row_bytes)
    # Nothing sane overflows, but a damaged scale may be infinite, and that is the loader's to notice.
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[type]))


def _type_name(type: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(type).name if type in set(GGMLQuantizationType) else str(type)


def _shown(field: str) -> str:
    return field if len(field) <= 80 else field[:77] + "..."


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
