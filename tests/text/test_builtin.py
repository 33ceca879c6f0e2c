"""The texts built into Python."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llmctl.errors import DataError
from llmctl.text import builtin
from llmctl.text.conversations import Conversation, conversations
from llmctl.text.sources import Document, Tally, documents, is_held_out


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return list(documents(builtin.STDLIB, Path(), tally=Tally()))


@pytest.fixture(scope="module")
def pairs() -> list[Conversation]:
    return list(conversations(builtin.DOCSTRINGS, Path()))


def test_the_library_is_code_and_topics_without_tests_and_tables(library: list[Document]) -> None:
    origins = [document.origin for document in library]
    keys = {document.key for document in library}
    assert {"argparse", "asyncio", "asyncio.tasks", "encodings.utf_8", "pydoc_data.topics.assert"} <= keys
    assert keys.isdisjoint({"encodings.cp1252", "pydoc_data.topics", "this.test"})
    assert not [origin for origin in origins if "/test/" in origin or "/tests/" in origin or "site-packages" in origin]
    assert len(origins) == len(set(origins))
    assert 5_000_000 < sum(len(document.text) for document in library) < 30_000_000


def test_a_pair_is_a_function_without_its_docstring_and_the_first_sentence(pairs: list[Conversation]) -> None:
    by_origin = {pair.origin: pair for pair in pairs}
    assert len(pairs) > 3_000
    assert len(by_origin) == len(pairs)
    for pair in pairs:
        user, assistant = pair.messages
        source = user["content"].removeprefix(builtin.QUESTION + "\n\n")
        [function] = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert len(source) <= builtin.MAX_SOURCE
        assert assistant["content"].endswith((".", "!", "?"))
        assert "\n" not in assistant["content"]
        assert len(assistant["content"].split()) >= builtin.MIN_WORDS
        assert len(assistant["content"]) <= builtin.MAX_ANSWER


def test_the_same_modules_are_held_out_of_both(library: list[Document], pairs: list[Conversation]) -> None:
    held_out = {document.key for document in library if is_held_out(document, 6.0)}
    assert held_out
    assert {pair.key for pair in pairs} <= {document.key for document in library}
    assert {pair.key for pair in pairs if is_held_out(pair, 6.0)} <= held_out
    assert not [pair for pair in pairs if not is_held_out(pair, 6.0) and pair.key in held_out]
    questions = [pair.messages[0]["content"] for pair in pairs]
    assert len(questions) == len(set(questions))  # a copy in another module would be in both splits


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum.\n\nMore.", "Return the sum."),
        ("Return the\n    sum of two numbers, e.g. 1 and 2. More.", "Return the sum of two numbers, e.g. 1 and 2."),
        ("Return the sum of a and b", "Return the sum of a and b."),
        ("Too short.", ""),
        ("f(x) -> the value of it", ""),
        ("These are the options:", ""),
        ("An unbalanced (eg. this) one", ""),
        ("", ""),
    ],
)
def test_first_sentences(docstring: str, sentence: str) -> None:
    assert builtin.first_sentence(docstring) == sentence


def test_each_built_in_goes_where_it_belongs() -> None:
    with pytest.raises(DataError, match="text, not chats"):
        next(conversations(builtin.STDLIB, Path()))
    with pytest.raises(DataError, match="no such built-in source"):
        next(conversations("builtin:x", Path()))
    assert next(documents(builtin.DOCSTRINGS, Path(), tally=Tally())).text.startswith(builtin.QUESTION)
