"""A vocabulary trained on real code, for the tests of everything that reads text."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.text import builtin, tokenizer
from llmctl.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def library() -> list[str]:
    """Python's own library: a document a module."""
    return [text for text, _, _ in builtin.texts(builtin.STDLIB)]


@pytest.fixture(scope="session")
def bpe(library: list[str]) -> Tokenizer:
    """A BPE vocabulary of 1,024 pieces of it."""
    return tokenizer.train(library[::8], "bpe", 1024)


@pytest.fixture(scope="session")
def folder(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of that vocabulary."""
    saved = tmp_path_factory.mktemp("bpe")
    bpe.save(saved)
    return saved
