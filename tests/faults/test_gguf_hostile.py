"""GGUF files that lie about themselves: a named error, and no more memory than the file has."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf as _imported  # before memory is measured  # noqa: F401
import numpy as np
import pytest
import torch

from llmctl.errors import DataError
from llmctl.model import gguf, gguf_file

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
Tensor = tuple[str, Sequence[int], int, bytes]  # name, dimensions (the fastest first), ggml type, data


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(found: Any) -> bytes:
    if isinstance(found, bytes):  # as it is: a lie
        return found
    if isinstance(found, str):
        return struct.pack("<I", STRING) + text(found)
    if isinstance(found, float):
        return struct.pack("<If", F32, found)
    if isinstance(found, list):
        kind = STRING if isinstance(found[0], str) else F32 if isinstance(found[0], float) else U32
        items = b"".join(text(item) if kind == STRING else value(item)[4:] for item in found)
        return struct.pack("<IIQ", ARRAY, kind, len(found)) + items
    return struct.pack("<II", U32, found)


def build(
    keys: Mapping[str, Any] | Sequence[tuple[str, Any]],
    tensors: Sequence[Tensor],
    *,
    head: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file, or one that says something else than it holds."""
    listed = list(keys.items() if isinstance(keys, Mapping) else keys)
    tensor_count, key_count = counts or (len(tensors), len(listed))
    made = head + struct.pack("<QQ", tensor_count, key_count)
    made += b"".join(text(key) + value(found) for key, found in listed)
    data = b""
    for name, shape, kind, raw in tensors:
        offset = (offsets or {}).get(name, len(data))
        made += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        data += raw + bytes(-len(raw) % alignment)
    return made + bytes(-len(made) % alignment) + data


def f32(*shape: int) -> bytes:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype="<f4").tobytes()


def llama(**changes: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """The keys and tensors of a whole tiny Llama; `changes` replace keys, dots written as two underscores."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    keys |= {key.replace("__", "."): found for key, found in changes.items()}
    shapes = {
        "token_embd": (8, len(pieces)),
        "output_norm": (8,),
        **{f"blk.0.attn_{name}": (8, 8) for name in ("q", "k", "v", "output")},
        **{f"blk.0.{name}_norm": (8,) for name in ("attn", "ffn")},
        "blk.0.ffn_gate": (8, 16),
        "blk.0.ffn_up": (8, 16),
        "blk.0.ffn_down": (16, 8),
    }
    kept = {key: found for key, found in keys.items() if found is not None}
    return kept, [(f"{name}.weight", shape, 0, f32(*shape)) for name, shape in shapes.items()]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """Reads a file, which must raise a DataError that names it; returns the rest of the message."""

    def read(content: bytes) -> str:
        path = tmp_path / "lies.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(DataError) as caught:
                gguf.read(path).tokenizer_files()
            assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + (1 << 20)
        finally:
            tracemalloc.stop()
        assert caught.value.file == str(path)
        return caught.value.message

    return read


def test_the_truth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "true.gguf"
    path.write_bytes(build(*llama()))
    found = gguf.read(path)
    assert found.config["head_dim"] == 4
    assert found.config["rms_norm_eps"] == 1e-5
    tensors = dict(found.tensors())
    assert len(tensors) == 11
    assert torch.equal(
        tensors["model.layers.0.mlp.up_proj.weight"].flatten(), torch.from_numpy(np.linspace(-1, 1, 128, dtype="f4"))
    )
    assert set(found.tokenizer_files()) == {"tokenizer.json", "tokenizer_config.json"}


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = build(*llama())
    path = tmp_path / "cut.gguf"
    for length in [*range(400), *range(400, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            gguf.read(path)


def test_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    whole, path, drawn = build(*llama()), tmp_path / "flipped.gguf", random.Random(0)
    refused = 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(drawn.choice([1, 1, 8])):
            content[drawn.randrange(min(len(content), 6000))] = drawn.randrange(256)
        path.write_bytes(content)
        try:
            found = gguf.read(path)
            found.tokenizer_files()
            sum(1 for _ in found.tensors())
        except DataError:
            refused += 1
    assert 100 < refused < 600


KEYS, TENSORS = llama()
ONE: Tensor = ("token_embd.weight", (8, 264), 0, f32(8, 264))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "magic|ends"),
        (b"GGML" + bytes(60), "begins with b'GGML'"),
        (build(KEYS, TENSORS, head=b"GGUF" + struct.pack("<I", 1)), "GGUF version 1"),
        (build(KEYS, TENSORS, head=b"GGUF" + struct.pack(">I", 3)), "big-endian GGUF 3"),
        (build(KEYS, TENSORS, counts=(1 << 60, 1)), "the tensor count is 1,152,921,504,606,846,976"),
        (build(KEYS, TENSORS, counts=(1, 1 << 40)), "the key count is"),
        (build([("a", 1), ("a", 2)], []), "key a is there twice"),
        (build([("a", struct.pack("<IQ", STRING, 1 << 50) + b"x")], []), "a is a string of 1125899906842624 bytes"),
        (build([("a", struct.pack("<IQ", STRING, 90) + b"x")], []), "a is a string|a takes 90 bytes"),
        (build([("a", struct.pack("<IIQ", ARRAY, U32, 1 << 40))], []), "a's length is 1,099,511,627,776"),
        (build([("a", struct.pack("<IIQ", ARRAY, U64, (1 << 61) + 1))], []), "a's length"),
        (build([("a", struct.pack("<IIQ", ARRAY, STRING, 1 << 33))], []), "a's length"),
        (build([("a", struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(12))], []), "array of type 9"),
        (build([("a", struct.pack("<I", 77))], []), "value type 77"),
        (build([("a", struct.pack("<I", STRING) + text(b"\xff\xfe"))], []), "not UTF-8"),
        (build([("k" * 70_000, 1)], []), "a string of 70000 bytes"),
        (build(KEYS | {"general.alignment": 0}, TENSORS), "general.alignment is 0"),
        (build(KEYS | {"general.alignment": 24}, TENSORS), "general.alignment is 24"),
        (build(KEYS | {"general.alignment": "32"}, TENSORS), "general.alignment is 32"),
        (build(KEYS, [*TENSORS, TENSORS[1]]), "output_norm.weight is there twice"),
        (build(KEYS, TENSORS, offsets={"output_norm.weight": 1 << 50}), "beyond where the last one ends"),
        (build(KEYS, TENSORS, offsets={"output_norm.weight": 64}), "inside the tensor before it"),
        (build(KEYS, TENSORS, offsets={"output_norm.weight": (1 << 64) - 32}), "beyond where"),
        (build(KEYS, [("w", (8, 1 << 62), 0, b"")]), "w is"),
        (build(KEYS, [("w", (1 << 32, 1 << 32), 0, b"")]), "does not hold"),
        (build(KEYS, [("w", (8, 0), 0, b"")]), "does not hold"),
        (build(KEYS, [("w", (1,) * 5, 0, b"")]), "has 5 dimensions"),
        (build(KEYS, [("w", (), 0, b"")]), "has 0 dimensions"),
        (build(KEYS, [("w", (8, 8), 2, bytes(999))]), "w is Q4_0, in blocks of 32, but its rows have 8 values"),
        (build(KEYS, [("w", (32, 8), 16, bytes(999))]), "w is stored as ggml type IQ2_XXS"),
        (build(KEYS, [("w", (32, 8), 999, bytes(999))]), "w is stored as ggml type 999"),
        (build(KEYS, [("w", (64, 8), 0, bytes(32))]), "w takes 2048 bytes"),
    ],
    ids=lambda found: found[:40] if isinstance(found, str) else "",
)
def test_a_lying_header_is_named(content: bytes, said: str, refused: Callable[[bytes], str]) -> None:
    message = refused(content)
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general__architecture": "qwen2moe"}, "general.architecture is 'qwen2moe', which llmctl does not build"),
        ({"general__architecture": None}, "general.architecture is None"),
        ({"general__architecture": 7}, "general.architecture is 7"),
        ({"llama__block_count": 1_000_000_000}, "block_count is 1000000000, but it has 1 blocks"),
        ({"llama__block_count": None}, "has no llama.block_count"),
        ({"llama__embedding_length": 16}, "embedding_length asks for 16, but token_embd.weight has 8"),
        ({"llama__feed_forward_length": 17}, "feed_forward_length asks for 17, but blk.0.ffn_up.weight has 16"),
        ({"llama__attention__head_count": 3}, "head_count asks for"),
        ({"llama__attention__head_count": 0}, "head_count is 0, but it must be a count"),
        ({"llama__attention__head_count": "two"}, "head_count is 'two', but it must be one number"),
        ({"llama__attention__head_count_kv": [1, 2]}, "but it must be one number"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "must be one number"),
        ({"llama__rope__dimension_count": 2, "llama__attention__key_length": 4}, "rotates 2 of 4 dimensions"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope'; llmctl reads linear and yarn"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model is 'bert'; llmctl builds gpt2 and llama"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "viking"}, "tokenizer.ggml.pre is 'viking'"),
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": ["a"] * 264}, "has 264 pieces, but not all differ"),
        ({"tokenizer__ggml__tokens": ["a" * 100_000]}, "a piece of 100,000 characters"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "token_type has 2 entries for 264 pieces"),
        ({"tokenizer__ggml__scores": [1.0]}, "no tokenizer.ggml.scores for its 264 pieces"),
        ({"tokenizer__ggml__merges": ["a b", "a b c"]}, "'a b c', but a merge is two pieces"),
        ({"tokenizer__ggml__merges": ["a zz"]}, "a tokenizer that contradicts itself"),
        (
            {
                "tokenizer__ggml__tokens": ["<unk>", "a b:c $A", "</s>", *"defgh"],
                "tokenizer__ggml__token_type": None,
                "tokenizer__ggml__scores": [0.0] * 8,
            },
            "a tokenizer that contradicts itself",
        ),
        ({"tokenizer__ggml__merges": 7}, "a tokenizer that contradicts itself"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": [1, 2]}, "a tokenizer that contradicts itself"),
        ({"tokenizer__ggml__eos_token_id": 4_000_000}, "eos_token_id is 4000000, but there are 264 pieces"),
    ],
    ids=lambda found: found[:50] if isinstance(found, str) else "",
)
def test_lying_metadata_is_named(changes: dict[str, Any], said: str, refused: Callable[[bytes], str]) -> None:
    message = refused(build(*llama(**changes)))
    assert said in message, message


@pytest.mark.parametrize("key", [*KEYS, "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token",
                                 "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_space_prefix",
                                 "tokenizer.chat_template", "llama.rope.freq_base", "llama.rope.scaling.type",
                                 "llama.attention.head_count_kv", "general.alignment"])  # fmt: skip
def test_a_key_of_another_type_is_read_or_refused(key: str, tmp_path: Path) -> None:
    path, problems = tmp_path / "typed.gguf", []
    for other in (0, 3, (1 << 32) - 1, -1.5, float("inf"), "", "text", [1, 2], ["a", "b"], [0.5]):
        keys, tensors = llama()
        path.write_bytes(build(keys | {key: other}, tensors))
        try:
            found = gguf.read(path)
            found.tokenizer_files()
            list(found.tensors())
        except DataError as problem:
            problems.append(problem)
    assert all(problem.file == str(path) for problem in problems)


def test_what_another_architecture_has_is_named(refused: Callable[[bytes], str]) -> None:
    keys, tensors = llama()
    experts: list[Tensor] = [(f"blk.0.ffn_{name}.weight", (8, 2), 0, f32(8, 2)) for name in ("gate_inp", "up_exps")]
    assert "does not have: blk.N.ffn_gate_inp.weight, blk.N.ffn_up_exps.weight" in refused(
        build(keys, tensors + experts)
    )
    other = refused(build(keys | {"general.architecture": "qwen3moe"}, tensors + experts))
    assert "beside a Llama's tensors it has blk.N.ffn_gate_inp.weight" in other


def test_a_sparse_giant_takes_no_memory(tmp_path: Path) -> None:
    """64 GB of holes that say they are one string, then one array, under 2 GB of address space."""
    path = tmp_path / "sparse.gguf"
    code = (
        "import resource, sys; from pathlib import Path; from llmctl.errors import DataError; "
        "from llmctl.model import gguf_file\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)\n"
        "try: gguf_file.read(Path(sys.argv[1]))\n"
        "except DataError as found: print(found)\n"
    )
    for lie in (struct.pack("<IQ", STRING, 1 << 35), struct.pack("<IIQ", ARRAY, F32, 1 << 33),
                struct.pack("<IIQ", ARRAY, STRING, 1 << 32)):  # fmt: skip
        path.write_bytes(build([("a", lie)], []))
        with path.open("r+b") as file:
            file.truncate(64 << 30)
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "headers up to 268,435,456" in done.stdout or "strings) fit here" in done.stdout, done.stdout


def test_a_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(build(*llama()))
    found = gguf.read(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="ends in the middle of"):
        list(found.tensors())


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    keys, tensors = llama()
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    first.write_bytes(build(keys | {"split.count": 2, "split.tensors.count": 11}, tensors[:4]))
    with pytest.raises(DataError, match=r"m-00002-of-00002\.gguf is missing"):
        gguf.read(first)
    second.write_bytes(build({"split.count": 2}, tensors[4:]))
    for part in (first, second):
        assert len(dict(gguf.read(part).tensors())) == 11
    second.write_bytes(build({"split.count": 2}, tensors[3:]))
    with pytest.raises(DataError, match="is also in another part"):
        gguf.read(first)
    second.write_bytes(build({"split.count": 2}, tensors[5:]))
    with pytest.raises(DataError, match=r"split.tensors.count is 11, but the parts hold 10"):
        gguf_file.read(first)
