"""Tokenizers to GGUF metadata and back: the same ids, and transformers' own where it reads a file as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from llmctl.errors import DataError
from llmctl.text import gguf_vocabulary
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL SAY! We'd go.",
    "  two spaces, a tab\tand\r\n\r\n   three, then (12) and 3,456.78 or v2.0b3   ",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！「引号」与 ASCII 混排 123。",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 注释\n\n\nif __name__ == '__main__':\n\tprint(f(2))\n",
    "naïve café Ünïcödé Привет שלום ไทย 🎉👩‍👩‍👧‍👦🇪🇺 €½ <b>&amp;</b> a_b-c/d\\e https://x.y/?z=1#t",
    "a <|im_end|> and <s> spelled out, <think>deeply</think>",
    "",
    " ",
)


def byte_level(pre: str, library: list[str]) -> dict[str, bytes]:
    """The files of a byte-level tokenizer that splits as `pre` does."""
    made = Library(models.BPE(ignore_merges=pre in gguf_vocabulary.WHOLE_WORDS))
    made.pre_tokenizer = gguf_vocabulary._pre_tokenizer(gguf_vocabulary.SPLITS[pre])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        [*library[:6], *TEXTS], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=specials)
    )
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": "<|endoftext|>"}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def sentencepiece(library: list[str], prefix: bool) -> dict[str, bytes]:
    """The files of a Llama 2 kind of tokenizer: `prefix` puts a space before every text."""
    files = tokenizers.train([*library[:6], *TEXTS], "bpe", 700).files
    made = Library.from_buffer(files["tokenizer.json"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return {**files, "tokenizer.json": made.to_str().encode()}


def through(files: Mapping[str, bytes], rows: int, architecture: str = "llama") -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer that comes back, and the metadata it came through."""
    metadata = gguf_vocabulary.to_metadata(files, rows, Path("model"))
    arrays = {key: np.array(metadata[key]) for key in metadata if key.endswith(("token_type", "scores"))}
    return Tokenizer(gguf_vocabulary.from_metadata(metadata | arrays, architecture, Path("model.gguf"))), metadata


def transformers_reads(metadata: Mapping[str, Any], folder: Path, architecture: str = "llama") -> Any:
    """transformers' own tokenizer for the metadata."""
    writer = gguf.GGUFWriter(folder / "t.gguf", architecture)
    for key, value in {f"{architecture}.context_length": 64, **metadata}.items():
        kinds = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
        kinds.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="t.gguf")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level(pre: str, library: list[str], tmp_path: Path) -> None:
    files = byte_level(pre, library)
    before = Tokenizer(files)
    after, metadata = through(files, len(before) + 7)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    theirs = transformers_reads(metadata, tmp_path)
    for text in TEXTS:
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == text
        if "<|im_end|>" in text or (pre == "smollm" and "  (12)" in text):
            continue  # transformers takes spelled special tokens for real, and cuts no digits out: llama.cpp does
        assert theirs.encode(text, add_special_tokens=False) == ids, text
    assert after.special_names == before.special_names
    assert (after.bos_id, after.eos_id, after.unk_id) == (before.bos_id, before.eos_id, before.unk_id)
    assert after.special_ids == before.special_ids
    assert len(after) == len(before) + 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("merges", [True, False])
def test_sentencepiece(prefix: bool, merges: bool, library: list[str], tmp_path: Path) -> None:
    files = sentencepiece(library, prefix)
    before = Tokenizer(files)
    metadata = gguf_vocabulary.to_metadata(files, len(before), Path("model"))
    if not merges:  # as llama.cpp writes them
        del metadata["tokenizer.ggml.merges"]
    arrays = {key: np.array(metadata[key]) for key in metadata if key.endswith(("token_type", "scores"))}
    after = Tokenizer(gguf_vocabulary.from_metadata(metadata | arrays, "llama", Path("model.gguf")))
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert (after.begin_id, after.end_id) == (before.begin_id, before.end_id) == (1, 2)
    theirs = transformers_reads(metadata, tmp_path)
    for text in TEXTS:
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == text
        # transformers puts a space before every text of this kind, but not before one that begins with a space
        if prefix and "<s>" not in text and text.strip():
            assert (theirs.encode(text, add_special_tokens=False) == ids) != text.startswith(" ")
    assert after.special_ids == before.special_ids


def test_gemma(library: list[str], tmp_path: Path) -> None:
    files = sentencepiece(library, prefix=False)
    before = Tokenizer(files)
    after, metadata = through(files, len(before), "gemma3")
    theirs = transformers_reads(metadata, tmp_path, "gemma3")
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        if "<s>" not in text:
            assert theirs.encode(text, add_special_tokens=False) == before.encode(text)


def test_pieces_of_several_spaces_in_a_gemma() -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "  ", "   ", "a", "▁a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3, 3, 2, 1, 1, 1, 1, 1]),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
    }
    made = Tokenizer(gguf_vocabulary.from_metadata(metadata, "gemma3", Path("g")))
    assert made.encode("a   a") == [7, 6, 7]  # the longer run comes after the shorter one
    assert made.begin_id == 2
    assert tokens[5] == "  "


def test_a_text_that_spells_a_special_piece_does_not_become_it() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<", "s", ">", "s>", "a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1]),
        "tokenizer.ggml.add_space_prefix": False,
    }
    made = json.loads(gguf_vocabulary.from_metadata(metadata, "llama", Path("g"))["tokenizer.json"])
    assert [tuple(merge) for merge in made["model"]["merges"]] == [("s", ">")]


@pytest.mark.parametrize(
    ("pre", "ids"), [("llama-bpe", [3]), ("tekken", [3]), ("gpt-2", [0, 1, 2]), ("qwen2", [0, 1, 2])]
)
def test_words_that_are_pieces(pre: str, ids: list[int]) -> None:
    """As llama.cpp has them: in Llama 3's kind a piece that no merge makes is found all the same."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "c", "abc"],
        "tokenizer.ggml.merges": [],
    }
    assert Tokenizer(gguf_vocabulary.from_metadata(metadata, "llama", Path("g"))).encode("abc") == ids


def test_characters(library: list[str]) -> None:
    before = tokenizers.train([*library[:3], *TEXTS], "char", 700)
    after, metadata = through(before.files, len(before))
    assert "tokenizer.ggml.merges" not in metadata
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == text


def test_the_template_and_the_ids_that_the_file_names(bpe: Tokenizer) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    after, metadata = through({**bpe.files, "chat_template.jinja": template.encode()}, len(bpe))
    assert after.files.keys() >= {"tokenizer.json", "tokenizer_config.json"}
    assert metadata["tokenizer.chat_template"] == template
    assert {key: index for key, index in metadata.items() if key.endswith("_token_id")} == {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }
    assert after.special_names == bpe.special_names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made["model"].update(type="WordPiece"), "a vocabulary of type WordPiece"),
        (lambda made: made["model"].update(type="Unigram"), "a vocabulary of type Unigram"),
        (lambda made: made.update(normalizer={"type": "Lowercase"}), "a normaliser Lowercase"),
        (
            lambda made: made.update(pre_tokenizer={"type": "Whitespace"}),
            "a way to split text that GGUF has no name for",
        ),
        (lambda made: made.update(decoder={"type": "WordPiece"}), "the decoder WordPiece"),
    ],
)
def test_what_gguf_cannot_hold_is_named(change: Callable[[Any], None], said: str, library: list[str]) -> None:
    files = byte_level("gpt-2", library[:1])
    made = json.loads(files["tokenizer.json"])
    change(made)
    with pytest.raises(DataError, match=f"{said}.* GGUF file cannot hold"):
        gguf_vocabulary.to_metadata({**files, "tokenizer.json": json.dumps(made).encode()}, 2000, Path("m"))


def test_more_pieces_than_rows_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="has 1024 pieces, but the model's embedding 1000 rows"):
        gguf_vocabulary.to_metadata(bpe.files, 1000, Path("m"))
