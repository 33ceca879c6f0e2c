"""Vocabularies: equal ids in SentencePiece, tokenizers and transformers; text that comes back as it went in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmctl.errors import DataError
from llmctl.text import tokenizer, vocabulary
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.vocabulary import SPACE, SPECIALS

# Everything that UTF-8 can spell, without the character that SentencePiece writes a space with.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE), max_size=80)
# Texts of the vocabulary's own material: runs, newlines, spaces and special tokens spelled out.
CODE = st.lists(
    st.sampled_from(
        ["def ", "self", "\n", "    ", " ", "\t", "aaaa", "==", "\n\n", "return x", "中文", "é", "1234", *SPECIALS[:9]]
    ),
    max_size=30,
).map("".join)


def sentencepiece_of(made: Tokenizer) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=made.files["tokenizer.model"])


def test_the_pieces_are_laid_out_as_promised(bpe: Tokenizer) -> None:
    assert len(bpe) == 1024
    assert bpe.specials == list(SPECIALS)
    assert (bpe.unk_id, bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 1, 2, 3)
    assert [bpe.special(name) for name in ("<mask>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>")] == [4, 5, 6, 7]
    assert (bpe.special("<extra_id_0>"), bpe.special("<extra_id_31>")) == (10, 41)
    assert [bpe.token_bytes(42 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert bpe.token_bytes(1) == b""
    learned = [bpe.token_bytes(index) for index in range(298, 1024)]
    assert b":\n" in learned  # newlines are in the pieces ...
    assert not [piece for piece in learned if b"\n" in piece.rstrip(b"\n")]  # ... and nothing follows one
    assert not [piece for piece in learned if b" " in piece.lstrip(b" ")]
    assert not [piece for piece in learned if sum(char.isdigit() for char in piece.decode()) > 1]


def test_training_is_repeatable_to_the_byte(library: list[str], bpe: Tokenizer) -> None:
    assert tokenizer.train(library[::8], "bpe", 1024).files == bpe.files


def test_ids_equal_sentencepiece_on_real_code(library: list[str], bpe: Tokenizer) -> None:
    reference = sentencepiece_of(bpe)
    assert bpe.encode_batch(library[::3], threads=2) == reference.encode(library[::3])
    assert [bpe.decode(ids) for ids in bpe.encode_batch(library[:50])] == library[:50]


@pytest.mark.parametrize(
    "corpus", ["text/books/Aesop", "zh/classical/红楼梦", "zh/oi-wiki/docs/math", "text/python-peps"]
)
def test_ids_equal_sentencepiece_on_real_prose(shared_data: Path, corpus: str) -> None:
    files = sorted(path for path in (shared_data / corpus).rglob("*") if path.is_file())
    texts = [path.read_text(encoding="utf-8") for path in files][:60]
    made = tokenizer.train(texts, "bpe", 4096)
    assert made.encode_batch(texts, threads=2) == sentencepiece_of(made).encode(texts)
    assert [made.decode(made.encode(text)) for text in texts] == texts


@given(TEXT | CODE)
@example("\0")
@example("a\r\nb\u2028c\ufeff")
@example("   \n \n\n  x  ")
@example("<0x41><s>▅ ▁".replace(SPACE, ""))
@settings(deadline=None, max_examples=400)
def test_any_text_has_sentencepieces_ids_and_comes_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert ids == sentencepiece_of(bpe).encode(text)
    assert bpe.decode(ids) == text
    assert bpe.special_ids.isdisjoint(ids)


@given(TEXT | CODE, TEXT | CODE)
@settings(deadline=None, max_examples=200)
def test_a_text_encodes_in_two_parts_cut_after_a_newline(bpe: Tokenizer, before: str, after: str) -> None:
    after = after.lstrip("\n")
    assert bpe.encode(before + "\n" + after) == bpe.encode(before + "\n") + bpe.encode(after)


@pytest.mark.parametrize("type", ["bpe", "unigram", "char", "byte"])
def test_every_type_gives_back_what_it_got(library: list[str], type: vocabulary.Type) -> None:
    made = tokenizer.train(library[:20], type, 500)
    assert len(made) == (298 if type == "byte" else len(made) if type == "char" else 500)
    for text in (library[0][:3000], "naïve 中文\t<s></s>\n\n  x", "\0\ufffd😀"):
        assert made.decode(made.encode(text)) == text
        assert made.special_ids.isdisjoint(made.encode(text))
    assert ("tokenizer.model" in made.files) == (type in ("bpe", "unigram"))
    if type == "byte":
        assert made.decode(made.encode(SPACE + " ")) == SPACE + " "
        assert made.encode("é") == [42 + byte for byte in "é".encode()]


def test_a_long_text_is_encoded_in_parts_with_the_same_ids(
    bpe: Tokenizer, library: list[str], monkeypatch: Any
) -> None:
    text = "".join(library[:20]) + "x" * 3000 + " " * 3000 + "\n" * 3000
    whole = sentencepiece_of(bpe).encode(text)
    for chunk in (50, 1000, 1 << 16):
        monkeypatch.setattr(tokenizer, "CHUNK", chunk)
        assert bpe.encode(text[-40 * chunk :]) == sentencepiece_of(bpe).encode(text[-40 * chunk :])
    assert bpe.encode(text) == whole
    assert bpe.encode("x" * 2_000_000 + "\n")[-1] == bpe.encode("\n")[0]  # no newline, no space: still bounded


@given(st.lists(st.integers(-3, 1100), max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_ids_stream_to_the_text_they_decode_to(bpe: Tokenizer, ids: list[int]) -> None:
    stream = bpe.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == bpe.decode(ids)


def test_a_stream_never_shows_half_a_character(bpe: Tokenizer) -> None:
    stream = bpe.stream()
    ids = bpe.encode("😀")
    assert len(ids) == 4
    assert [stream.push(index) for index in ids] == ["", "", "", "😀"]
    assert stream.push(ids[0]) == ""
    assert stream.push(bpe.eos_id or 0) == ""
    assert stream.flush() == "\ufffd"


def test_transformers_gives_the_same_ids_and_text(bpe: Tokenizer, folder: Path, library: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*library[:30], "", " ", "a  b ,c .", "中文 😀\n"]:
        assert theirs(text)["input_ids"] == [1, *bpe.encode(text)]
        assert theirs(text, add_special_tokens=False)["input_ids"] == bpe.encode(text)
        assert theirs.decode(bpe.encode(text)) == text
    assert [
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.unk_token_id,
        theirs.pad_token_id,
        theirs.mask_token_id,
    ] == [1, 2, 0, 3, 4]
    assert len(theirs) == len(bpe)
    assert theirs("a", "b")["input_ids"] == [1, *bpe.encode("a"), 1, *bpe.encode("b")]


def test_saving_and_loading_change_nothing(bpe: Tokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(folder)
    assert loaded.digest() == bpe.digest()
    loaded.save(tmp_path, model_max_length=512)
    again = Tokenizer.load(tmp_path)
    assert again.digest() == bpe.digest()
    assert json.loads(again.files["tokenizer_config.json"])["model_max_length"] == 512
    assert {name for name in again.files if again.files[name] != bpe.files[name]} == {"tokenizer_config.json"}
    assert tokenizer.train(["some other text"], "byte").digest() != bpe.digest()


def test_a_lone_surrogate_is_encoded_as_the_replacement_character(bpe: Tokenizer) -> None:
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"


def test_too_little_text_names_the_largest_vocabulary() -> None:
    texts = ["Hello world, this is a very short text.\n" * 3]
    with pytest.raises(
        DataError, match=r"too little text for a vocabulary of 4,096 pieces: it makes 3\d\d at most"
    ) as caught:
        tokenizer.train(texts, "bpe", 4096)
    most = int(caught.value.hint.split("vocab_size = ")[1].split()[0])
    assert len(tokenizer.train(texts, "bpe", most)) == most
    with pytest.raises(DataError, match="too little text"):
        tokenizer.train(texts, "bpe", most + 1)
    with pytest.raises(DataError, match="no text") as caught:
        tokenizer.train([], "bpe", 4096)
    with pytest.raises(DataError, match="too little text") as caught:
        tokenizer.train(["a"], "bpe", 4096)
    assert 'type = "byte"' in caught.value.hint


def test_rare_characters_take_at_most_half_of_the_vocabulary() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    made = tokenizer.train([text + "\nthe quick brown fox jumps over the lazy dog\n" * 50] * 2, "char", 1000)
    assert len(made) == 1000
    learned = tokenizer.train([text + "\n" + "这是一个很好的例子。" * 500], "bpe", 600)
    assert learned.decode(learned.encode(text)) == text


def test_damaged_folders_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.file == str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no piece <nothing>"):
        Tokenizer.load(folder).special("<nothing>")


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_tokenizers_made_elsewhere_decode_as_their_library_does(
    kind: str, library: list[str], bpe: Tokenizer, tmp_path: Path
) -> None:
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Theirs

    if kind == "gpt2":
        theirs = Theirs(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        theirs.train_from_iterator(
            library[:20], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
        )
    else:
        theirs = Theirs.from_str(bpe.files["tokenizer.json"].decode())
        theirs.post_processor = processors.Sequence([])
        theirs.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        theirs.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    theirs.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    theirs.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, theirs.token_to_id("<|endoftext|>"), ours.eos_id)
    for text in [*[text[:2000] for text in library[:20]], " <think> naïve 中文😀"]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.eos_id not in ours.encode("<|endoftext|>")
    assert theirs.encode("<|endoftext|>").ids[-1] == ours.eos_id
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest() == ours.digest()


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models

    theirs = Theirs(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    theirs.decoder = decoders.CTC()
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="this decoder are not supported: CTC"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"continuing_subword_prefix": "##"}}, "a prefix within words"),  # the library aborts the process
        ({"model": {"vocab": {"a": -1}}}, "not a tokenizer"),
        ({"post_processor": {"single": [{"SpecialToken": {"id": "?", "type_id": 0}}]}}, "not a tokenizer"),  # a panic
    ],
)
def test_files_that_mean_harm_are_named(bpe: Tokenizer, change: dict[str, Any], message: str) -> None:
    whole = json.loads(bpe.files["tokenizer.json"])
    for part, values in change.items():
        whole[part] = {**whole[part], **values} if isinstance(values, dict) and whole[part] else values
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer(bpe.files | {"tokenizer.json": json.dumps(whole).encode()}, Path("model"))
    assert caught.value.file == "model/tokenizer.json"


def test_ids_without_end_are_named(bpe: Tokenizer) -> None:
    whole = json.loads(bpe.files["tokenizer.json"])
    whole["model"]["vocab"]["\u4e00"] = 1 << 31
    with pytest.raises(DataError, match="pieces are read"):
        Tokenizer(bpe.files | {"tokenizer.json": json.dumps(whole).encode()})


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"added_tokens_decoder": {"x": 1, "0": {"content": 3}}},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"5": {"content": "a", "special": "yes"}}},
        {"extra_special_tokens": [{"a": 1}, [2]], "add_bos_token": True, "bos_token": None, "eos_token": [1]},
    ],
)
def test_odd_settings_are_named_or_passed_over(bpe: Tokenizer, config: Any) -> None:
    files = bpe.files | {"tokenizer_config.json": json.dumps(config).encode()}
    with contextlib.suppress(DataError):
        assert Tokenizer(files).encode("a b") == bpe.encode("a b")
