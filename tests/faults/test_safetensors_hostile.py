"""Fault 14: safetensors files that lie. Each ends in an error that names the file and the lie, in little memory."""

from __future__ import annotations

import json
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.errors import DataError
from llmctl.model import hf, storage
from tests import folders
from tests.project import Project
from tests.warm import Warm

Header = dict[str, Any]
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def split(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(header: Header, **changes: Any) -> Header:
    return {**header, NORM: {**header[NORM], **changes}}


def moved(header: Header, start: int, end: int) -> Header:
    first, last = header[NORM]["data_offsets"]
    return entry(header, data_offsets=[first + start, last + end])


def twice(header: Header) -> bytes:
    """One name with two shapes: the library takes the last one, another reader the first."""
    other = json.dumps({NORM: {**header[NORM], "shape": [2, 24]}})[1:-1]
    return json.dumps(header)[:-1].encode() + b"," + other.encode() + b"}"


LIES: dict[str, tuple[Callable[[Header, bytes], bytes], str]] = {
    "nothing at all": (lambda h, d: b"", "has 0 bytes"),
    "seven bytes": (lambda h, d: b"\1\0\0\0\0\0\0", "has 7 bytes"),
    "a header beyond the file": (lambda h, d: join(h, d, 1 << 40), "says that its header alone has 1,099,511,627,776"),
    "a header of 2^64 bytes": (lambda h, d: join(h, d, 2**64 - 1), "says that its header alone has"),
    "a huge header": (lambda h, d: join(json.dumps(h).encode() + b" " * (9 << 20), d), "at most 8,388,608 are read"),
    "a header of no bytes": (lambda h, d: join(b"", d), "is not a readable safetensors file"),
    "no JSON": (lambda h, d: join(b"\x80\x04pickle", d), "is not a readable safetensors file"),
    "cut JSON": (lambda h, d: join(json.dumps(h).encode()[:-20], d), "is not a readable safetensors file"),
    "deep JSON": (lambda h, d: join(b"[" * 100_000 + b"]" * 100_000, d), "safetensors"),
    "a list": (lambda h, d: join(b"[1, 2]", d), "the header is wrong"),
    "a number too long": (lambda h, d: join(b'{"a": ' + b"9" * 10_000 + b"}", d), "is not a readable safetensors file"),
    "an entry that is no object": (lambda h, d: join({**h, NORM: 3}, d), "the header is wrong"),
    "an entry without offsets": (lambda h, d: join({**h, NORM: {"dtype": "F32", "shape": [48]}}, d), "data_offsets"),
    "three offsets": (lambda h, d: join(entry(h, data_offsets=[0, 4, 8]), d), "the header is wrong"),
    "an unknown dtype": (lambda h, d: join(entry(h, dtype="F31"), d), f"{NORM} has the dtype 'F31'"),
    "a dtype that is no word": (lambda h, d: join(entry(h, dtype=["F32"]), d), "the header is wrong"),
    "a negative shape": (lambda h, d: join(entry(h, shape=[-48]), d), f"{NORM} has the shape [-48]"),
    "a shape that overflows": (lambda h, d: join(entry(h, shape=[2**32, 2**32]), d), f"{NORM} is F32"),
    "a shape of fractions": (lambda h, d: join(entry(h, shape=[48.0]), d), f"{NORM} has the shape [48.0]"),
    "a shape that is true": (lambda h, d: join(entry(h, shape=[True]), d), f"{NORM} has the shape [True]"),
    "another dtype's width": (
        lambda h, d: join(entry(h, dtype="F64"), d),
        f"{NORM} is F64 [48], which does not take 192",
    ),
    "negative offsets": (lambda h, d: join(entry(h, data_offsets=[-192, 0]), d), f"{NORM} has the shape"),
    "offsets the wrong way round": (lambda h, d: join(entry(h, data_offsets=[192, 0]), d), f"{NORM} is F32 [48]"),
    "an overlap": (lambda h, d: join(moved(h, -4, -4), d), "overlap or leave a gap"),
    "a hole": (lambda h, d: join(moved(h, 4, 4), d + b"\0\0\0\0"), "overlap or leave a gap"),
    "two tensors in one place": (lambda h, d: join({**h, "again": h[NORM]}, d), "overlap or leave a gap"),
    "beyond the end": (lambda h, d: join(h, d[:-1]), "its tensors end at byte"),
    "bytes of nobody": (lambda h, d: join(h, d + b"\0"), "its tensors end at byte"),
    "one name twice": (lambda h, d: join(twice(h), d), f"{NORM!r} stands in it twice"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders.write(tmp_path_factory.mktemp("good"), dtype="fp32")
    path = folder / "model.safetensors"
    save_file(load_file(path), path)  # without metadata, sorted: the norm is not the last one
    return folder


def spoilt(good: Path, folder: Path, content: bytes) -> Path:
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, good: Path, tmp_path: Path) -> None:
    make, message = LIES[lie]
    header, data = split(good / "model.safetensors")
    folder = spoilt(good, tmp_path / "spoilt", make(header, data))
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        storage.header(folder / "model.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in caught.value.message
    assert str(folder / "model.safetensors") == caught.value.file
    assert peak < 40e6
    with pytest.raises(DataError, match=r"model\.safetensors"):  # what every stage loads by
        hf.load(folder)


def test_the_untouched_file_is_no_lie(good: Path) -> None:
    header, data = split(good / "model.safetensors")
    assert storage.header(good / "model.safetensors").keys() == header.keys()
    assert sum(stored.end - stored.start for stored in storage.header(good / "model.safetensors").values()) == len(data)


@pytest.mark.parametrize("lie", ["one name twice", "an overlap", "beyond the end", "a huge header"])
def test_nothing_of_it_is_imported(lie: str, good: Path, warm: Warm, tmp_path: Path) -> None:
    header, data = split(good / "model.safetensors")
    spoilt(good, tmp_path / "spoilt", LIES[lie][0](header, data))
    done = warm.run("import", "spoilt", "--json", cwd=tmp_path)
    assert done.code == 3, done.err
    assert LIES[lie][1] in done.json["error"]["message"]
    assert done.json["error"]["file"].endswith("spoilt/model.safetensors")
    assert not (tmp_path / "runs/spoilt/import").exists()
    assert not list(tmp_path.rglob(".staging*"))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({NORM: torch.ones(24, 2)}, f"{NORM} is [24, 2], not [48]"),
        ({NORM: None}, f"missing {NORM} [48]"),
        ({"model.extra": torch.ones(3)}, "unexpected model.extra [3]"),
        ({f"model.layers.{i}.other": torch.ones(3) for i in range(20)}, "; and 12 more"),
    ],
)
def test_a_file_that_does_not_fit_its_config(
    lie: dict[str, torch.Tensor | None], message: str, good: Path, warm: Warm, tmp_path: Path
) -> None:
    state = {**load_file(good / "model.safetensors"), **lie}
    folder = spoilt(good, tmp_path / "spoilt", b"")
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")
    done = warm.run("import", "spoilt", cwd=tmp_path)
    assert done.code == 3
    assert message in done.err
    assert not (tmp_path / "runs/spoilt/import").exists()


def test_a_config_that_asks_for_everything_costs_nothing(good: Path, warm: Warm, tmp_path: Path) -> None:
    """Counts of a config become shapes only after they were held against the file."""
    folder = spoilt(good, tmp_path / "spoilt", (good / "model.safetensors").read_bytes())
    folders.edit(folder, hidden_size=1 << 20, num_attention_heads=1 << 10, head_dim=1 << 10, intermediate_size=1 << 30)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({8 << 30}, {8 << 30}))"
    done = warm.run("import", "spoilt", cwd=tmp_path, before=limit)
    assert done.code == 3, done.err
    assert "is [" in done.err
    assert resource.RLIMIT_AS is not None


def test_a_shard_is_a_file_beside_its_index(finished: Project) -> None:
    folder = finished.path / "hub"
    folders.write(folder)
    folders.shard(folder)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in (
        "../hub/model-00001-of-00003.safetensors",
        "/etc/passwd",
        "model\0.safetensors",
        "model-9.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], NORM: name}}))
        done = finished.llmctl("import", "hub")
        assert done.code == 3, done.out
        assert "which is not a file beside it" in done.err
    secret = finished.path / "secret.safetensors"
    (folder / "model-00001-of-00003.safetensors").rename(secret)
    (folder / "model-00001-of-00003.safetensors").symlink_to(secret)
    index.write_text(json.dumps(whole))
    done = finished.llmctl("import", "hub")
    assert done.code == 3
    assert "is a link out of its folder" in done.err
