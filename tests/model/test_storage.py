"""Safetensors written tensor by tensor, and read by the library that everybody uses."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmctl.errors import DataError
from llmctl.model import storage

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    "b": torch.tensor([1.5, -2.0, 3.25]),
    "c": torch.arange(5, dtype=torch.bfloat16),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 4),
}
NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def given(tensors: dict[str, torch.Tensor]) -> list[tuple[str, list[bytes]]]:
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return [(name, [content[:3], content[3:]]) for name, content in reversed(raw.items())]  # in any order, in parts


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    storage.write(tmp_path, layout(TENSORS), given(TENSORS))
    path = tmp_path / "model.safetensors"
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, stored in storage.header(path).items():
        width = storage.BITS[stored.dtype] // 8
        assert stored.start % width == 0, name  # aligned, so that a reader may map it
        assert (stored.dtype, stored.shape) == layout(TENSORS)[name]
        assert b"".join(stored.chunks()) == TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt", "note": "ünï"})
    found = storage.header(tmp_path / "x.safetensors")
    assert {name: (stored.dtype, stored.shape) for name, stored in found.items()} == layout(TENSORS)


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((10,), float(index)) for index in range(7)}
    storage.write(tmp_path, layout(tensors), given(tensors), limit=100)  # two of 40 bytes a file
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert index["weight_map"].keys() == tensors.keys() == storage.headers(tmp_path / file for file in files).keys()


def test_a_tensor_that_is_larger_than_a_shard_has_one_for_itself(tmp_path: Path) -> None:
    tensors = {"small": torch.zeros(1), "large": torch.zeros(100), "after": torch.zeros(1)}
    storage.write(tmp_path, layout(tensors), given(tensors), limit=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_too_few_bytes_are_a_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: -4 bytes"):
        storage.write(tmp_path, {"a": ("F32", (2,))}, [("a", [b"\0" * 4])])
    with pytest.raises(AssertionError, match="never given: a"):
        storage.write(tmp_path, {"a": ("F32", (2,))}, [])


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DataError, match=r"one\.safetensors: tensor x is stored twice, there and in two"):
        storage.headers([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_a_tensor_is_never_held_whole(tmp_path: Path) -> None:
    size = 24 << 20
    save_file({"x": torch.zeros(size // 4)}, tmp_path / "x.safetensors")
    stored = storage.header(tmp_path / "x.safetensors")["x"]
    tracemalloc.start()
    storage.write(tmp_path, {"x": ("F32", stored.shape)}, [("x", stored.chunks())])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size > size
    assert peak < size / 2
