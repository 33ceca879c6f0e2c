"""Vocabularies extended by another language: shorter there, the same elsewhere, and the same in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import DataError
from llmctl.text import extension
from llmctl.text.tokenizer import Tokenizer
from tests.text import kinds
from tests.text.kinds import TEXTS, chinese, english

EXTENDED = ("llama3", "llama2", "llama2_legacy", "gemma")
NEW = 120


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)


@pytest.fixture(scope="module", params=EXTENDED)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that has seen no Chinese, with an added piece and special ones behind its vocabulary."""
    saved = tmp_path_factory.mktemp(request.param)
    made = kinds.KINDS[request.param](only_english=True)  # type: ignore[call-arg]
    made.add_tokens(["<think>"])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.save_pretrained(saved)
    return Tokenizer.load(saved)


@pytest.fixture(scope="module")
def extended(base: Tokenizer) -> Tokenizer:
    return extension.extend(base, without_latin(chinese()[::2]), NEW)


def without_latin(texts: list[str]) -> list[str]:
    """A vocabulary this small spells English badly too, and would learn it."""
    return [re.sub("[A-Za-z]+", "", text) for text in texts]


def test_chinese_takes_fewer_pieces_and_english_keeps_its_own(base: Tokenizer, extended: Tokenizer) -> None:
    assert len(extended) == len(base) + NEW
    unseen = chinese()[1::2]  # other text, little of it: real corpora give 1.6 times and more
    assert bytes_per_token(extended, unseen) > 1.1 * bytes_per_token(base, unseen)
    same = [text for text in english() if text.isascii()]
    assert len(same) > 200
    assert [extended.encode(text) for text in same] == [base.encode(text) for text in same]


def test_transformers_has_the_same_ids_and_text(base: Tokenizer, extended: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    extended.save(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(extended)
    for text in [*TEXTS, *chinese(), *english()[:50]]:
        ids = extended.encode(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.encode(text) == extended.encode_for_model(text)[0]
        assert theirs.decode(ids) == extended.decode(ids)
    assert extended.encode_with_specials("<|im_start|>中文<think><|im_end|>") == theirs.encode(
        "<|im_start|>中文<think><|im_end|>", add_special_tokens=False
    )
    assert (extended.bos_id, extended.eos_id, extended.special_ids) == (base.bos_id, base.eos_id, base.special_ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
@settings(deadline=None, max_examples=150)
def test_every_text_comes_back_as_from_the_old_tokenizer(base: Tokenizer, extended: Tokenizer, text: str) -> None:
    assert extended.decode(extended.encode(text)) == base.decode(base.encode(text))
    assert len(extended.encode(text)) <= len(base.encode(text))


def test_a_new_piece_is_what_it_was_made_of(base: Tokenizer, extended: Tokenizer) -> None:
    made_of = extension.parts(base, extended)
    assert made_of is not None
    assert len(made_of) == NEW
    for index, ids in enumerate(made_of, len(base)):
        assert len(ids) > 1
        assert b"".join(map(base.token_bytes, ids)) == extended.token_bytes(index)
        assert max(ids) < len(base)
    assert extension.parts(extended, base) is None
    assert extension.parts(base, base) == []


def test_extending_is_repeatable_and_may_be_repeated(base: Tokenizer, extended: Tokenizer) -> None:
    again = extension.extend(base, without_latin(chinese()[::2]), NEW)
    assert again.files == extended.files
    twice = extension.extend(extended, chinese(), 20)
    assert len(twice) == len(extended) + 20
    assert extension.parts(base, twice) is not None
    for text in chinese():
        assert twice.decode(twice.encode(text)) == base.decode(base.encode(text))


def test_words_that_are_spelled_well_stay_as_they_are(base: Tokenizer) -> None:
    words = {word for text in english() for word in re.findall(r" [a-z]{7,}", text)}
    well = sorted(word for word in words if len(base.encode("x" + word)) == 3)[:10]
    assert len(well) == 10
    made = extension.extend(base, [*without_latin(chinese()), "".join(well) * 500], 60)
    for word in well:
        assert made.encode("x" + word) == base.encode("x" + word)


def test_digits_and_punctuation_stay_as_they_are(base: Tokenizer) -> None:
    texts = ["第2024年，，，！！第2024年，，，！！" * 5] * 20
    made = extension.extend(base, texts, 2)
    learned = {made.token_bytes(index) for index in range(len(base), len(made))}
    assert not [piece for piece in learned if any(byte in b"0123456789" for byte in piece)]
    assert not [piece for piece in learned if piece in ("，，".encode(), "！！".encode(), "，".encode())]


def test_too_little_text_says_how_many_there_are(base: Tokenizer) -> None:
    with pytest.raises(DataError, match="too little text that the tokenizer spells badly") as caught:
        extension.extend(base, chinese(), 50_000)
    most = int(caught.value.hint.split("extend = ")[1].split()[0])
    assert len(extension.extend(base, chinese(), most)) == len(base) + most
    with pytest.raises(DataError, match="it makes 0 new pieces") as caught:
        extension.extend(base, ["the and of"] * 20, 10)
    assert "knows this language" in caught.value.hint


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_vocabularies_are_refused(kind: str, tmp_path: Path) -> None:
    kinds.KINDS[kind]().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"(WordPiece|Unigram) vocabulary can't be extended"):
        extension.extend(Tokenizer.load(tmp_path), chinese(), 10)


def test_what_is_no_extension(base: Tokenizer, extended: Tokenizer) -> None:
    def changed(**parts: Any) -> Tokenizer:
        description = json.loads(extended.files["tokenizer.json"])
        model = {**description["model"], **parts}
        return Tokenizer(extended.files | {"tokenizer.json": json.dumps({**description, "model": model}).encode()})

    model = json.loads(extended.files["tokenizer.json"])["model"]
    assert extension.parts(base, changed(merges=model["merges"][1:])) is None
    assert extension.parts(base, changed(vocab=model["vocab"] | {"nothing makes this": len(extended)})) is None
