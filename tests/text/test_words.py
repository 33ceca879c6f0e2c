"""Which tokens make a word: the same words whatever the vocabulary is and however it spells them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from llmctl.text import tokenizer
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.words import Words
from tests.text import kinds

TEXT = "The tokenizers' vocabulary: naïve re-reading of snake_case 42 times, 从头开始 (end).\n"
WORDS = ["The", "tokenizers", "'", "vocabulary", ":", "naïve", "re", "-", "reading", "of", "snake_case", "42", "times",
         ",", "从", "头", "开", "始", "(", "end", ")", "."]  # fmt: skip


def words(pieces: Tokenizer, text: str) -> list[str]:
    """The text cut between words."""
    ids = np.array(pieces.encode(text))
    numbers = Words(pieces).numbers(ids)
    assert numbers[0] == 0
    assert set(np.diff(numbers).tolist()) <= {0, 1}
    found = itertools.groupby(zip(numbers.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0])
    return [b"".join(pieces.token_bytes(id) for _, id in group).decode() for _, group in found]


@pytest.mark.parametrize("type", ["bpe", "unigram", "char", "byte"])
def test_our_own_vocabularies(type: str) -> None:
    pieces = tokenizer.train([TEXT * 3, *kinds.english()], type, 420)  # type: ignore[arg-type]
    found = [word.strip() for word in words(pieces, TEXT)]
    assert [word for word in found if word] == WORDS


def test_what_goes_before_a_word_begins_it() -> None:
    pieces = tokenizer.train(kinds.english(), "bpe", 600)
    found = words(pieces, "def reading(it):\n    return it")
    assert "".join(found) == "def reading(it):\n    return it"
    assert [word.strip() for word in found if word.strip()] == ["def", "reading", "(", "it", ")", ":", "return", "it"]


def test_special_tokens_are_no_part_of_a_word() -> None:
    pieces = tokenizer.train(kinds.english(), "byte", 600)
    a, end = pieces.encode("a")[0], pieces.end_id or 0
    assert Words(pieces).numbers(np.array([a, a, end, a])).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "kind", ["gpt2", "roberta", "qwen2", "llama3", "modernbert", "llama2", "gemma", "bert_cased", "t5"]
)
def test_vocabularies_of_other_families(kind: str, tmp_path: Path) -> None:
    """Spelled with U+0120, U+2581 or ##. T5 and BERT have no bytes, and their small vocabularies not every letter."""
    getattr(kinds, kind)().save_pretrained(tmp_path)
    found = words(Tokenizer.load(tmp_path), "it reads the vocabulary, then tokenizes.")
    assert [word.strip() for word in found if word.strip()] == [
        "it", "reads", "the", "vocabulary", ",", "then", "tokenizes", "."
    ]  # fmt: skip
