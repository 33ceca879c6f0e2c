"""Safetensors files: headers that are checked before anything is believed, and files written tensor by tensor.

A file is eight bytes of length, a JSON header of that length, and the tensors' bytes, in which the tensors lie without
a gap (https://github.com/huggingface/safetensors#format). The safetensors library checks the same but lets one name
stand in a header twice, and reads a header of 100 MB. Needs no torch; a tensor's bytes are never held whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.model.origin import INDEX, WEIGHTS

MAX_HEADER = 8 << 20  # bytes: some 60,000 tensors; the largest model that llmctl builds has a tenth of that
SHARD = 4_000_000_000  # bytes of tensors a file
BUFFER = 1 << 22
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, as safetensors spells it, and shape
DAMAGED = "it may be cut off or damaged: copy it again, or rerun the stage that wrote it"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as safetensors spells it, its shape, and where its bytes begin and end."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few megabytes at a time."""
        left = self.end - self.start
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                if not (raw := file.read(min(BUFFER, left))):
                    raise DataError("ends in the middle of a tensor", file=self.path, hint=DAMAGED)
                left -= len(raw)
                yield raw


def header(path: Path, *, whole: bool = True) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, in the order of the header.

    Args:
        whole: False for a file that is still being written: its tensors need not be there yet.

    Raises:
        DataError: a header that is too long, is no JSON, names a tensor twice or lies about sizes; a hole, an overlap,
            bytes that belong to no tensor, a file that is cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise DataError(_short(size, length), file=path, hint=DAMAGED)
            if length > MAX_HEADER:
                raise DataError(f"has a header of {length:,} bytes; at most {MAX_HEADER:,} are read", file=path)
            text = file.read(length)
    except OSError as reason:
        raise DataError(f"cannot be read ({reason.strerror})", file=path) from reason
    try:
        entries = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as reason:  # ValueError: no JSON, no UTF-8, a name that stands twice
        raise DataError(f"is not a readable safetensors file: {reason}", file=path, hint=DAMAGED) from None
    try:
        found = {
            name: _entry(path, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"
        }
        _check_layout(found, 8 + length, size if whole else None)
    except (TypeError, AttributeError, KeyError, ValueError) as reason:
        raise DataError(f"the header is wrong: {reason}", file=path, hint=DAMAGED) from None
    return found


def _short(size: int, length: int) -> str:
    return f"has {size} bytes" if size < 8 else f"has {size:,} bytes, and says that its header alone has {length:,}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands in it twice")
    return made


def _entry(path: Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"{name} has the dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(f"{name} has the shape {shape} at bytes {start} to {end}")
    if (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name} is {dtype} {shape}, which does not take {end - start:,} bytes")
    return Stored(path, dtype, tuple(shape), base + start, base + end)


def _check_layout(found: Mapping[str, Stored], base: int, size: int | None) -> None:
    """Raises ValueError where the tensors leave a gap, overlap, or end elsewhere than the file."""
    at = base
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != at:
            raise ValueError(
                f"{name} begins at byte {stored.start:,}, where {at:,} is next: tensors overlap or leave a gap"
            )
        at = stored.end
    if size is not None and at != size:
        raise ValueError(f"its tensors end at byte {at:,}, the file at {size:,}")


def headers(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of several files.

    Raises:
        DataError: as `header`; or a tensor that is stored in two of them.
    """
    found: dict[str, Stored] = {}
    for path in files:
        tensors = header(path)
        if twice := found.keys() & tensors.keys():
            raise DataError(
                f"tensor {min(twice)} is stored twice, there and in {path.name}", file=found[min(twice)].path
            )
        found |= tensors
    return found


def write(
    folder: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, Iterable[bytes | memoryview]]],
    limit: int = SHARD,
) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes and their index, one tensor at a time.

    Args:
        folder: exists.
        layout: every tensor by name.
        tensors: name and little-endian bytes in parts, of each of them, in any order.
    """
    shards = _shards(layout, limit)
    many = f"-of-{len(shards):05}.safetensors"
    files = {(WEIGHTS if len(shards) == 1 else f"model-{i:05}{many}"): names for i, names in enumerate(shards, 1)}
    places: dict[str, Stored] = {}
    for file_name, names in files.items():
        path = folder / file_name
        path.write_bytes(_header({name: layout[name] for name in names}))
        places |= header(path, whole=False)
    for name, parts in tensors:
        stored = places.pop(name)
        with stored.path.open("r+b") as file:
            file.seek(stored.start)
            for part in parts:
                file.write(part)
            assert file.tell() == stored.end, f"{name}: {file.tell() - stored.end:+} bytes"
    assert not places, f"never given: {', '.join(places)}"
    if len(shards) > 1:
        total = sum(size(*stored) for stored in layout.values())
        weight_map = {name: file_name for file_name, names in files.items() for name in sorted(names)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(layout: Layout) -> bytes:
    """The beginning of a file. Wide dtypes come first: each tensor is then aligned to its own width."""
    entries, at = {}, 0
    for name in sorted(layout, key=lambda name: -BITS[layout[name][0]]):
        dtype, shape = layout[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size(dtype, shape)]}
        at += size(dtype, shape)
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * BITS[dtype] // 8


def _shards(layout: Layout, limit: int) -> list[list[str]]:
    """Which tensors go into one file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in layout.items():
        if shards[-1] and filled + size(*stored) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size(*stored)
    return shards
