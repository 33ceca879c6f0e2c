"""Chats in the shapes people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.errors import DataError
from llmctl.text.conversations import Conversation, conversations
from llmctl.text.sources import Tally

ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(folder: Path, *records: Any, **options: Any) -> list[Conversation]:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(conversations("a.jsonl", folder, **options))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, ASKED, ANSWERED]}, [SYSTEM, ASKED, ANSWERED]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ANSWERED]}, [ASKED, ANSWERED]),
        ({"prompt": "Why?", "completion": "Because."}, [ASKED, ANSWERED]),
        ({"prompt": "Why?", "response": "Because."}, [ASKED, ANSWERED]),
        ({"question": "Why?", "answer": "Because.", "id": 3}, [ASKED, ANSWERED]),
        ({"instruction": "Why?", "input": "", "output": "Because."}, [ASKED, ANSWERED]),
        (
            {"instruction": "Sum up.", "input": "A text.", "output": "Because."},
            [{"role": "user", "content": "Sum up.\n\nA text."}, ANSWERED],
        ),
        (
            {"instruction": "Sum up.", "context": "A text.", "response": "Because.", "category": "x"},
            [{"role": "user", "content": "Sum up.\n\nA text."}, ANSWERED],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
            },
            [SYSTEM, ASKED, ANSWERED],
        ),
    ],
)
def test_shapes(tmp_path: Path, record: Any, messages: list[dict[str, str]]) -> None:
    [found] = read(tmp_path, record)
    assert list(found.messages) == messages
    assert found.origin == "a.jsonl:1"
    (tmp_path / "a.json").write_text(json.dumps([record, record]))
    assert [list(found.messages) for found in conversations("a.json", tmp_path)] == [messages, messages]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "just text"}, "the line's keys are text"),
        (["a"], "the line is a list"),
        ({"messages": [ASKED]}, "no answer in it"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "no answer in it"),
        ({"messages": [{"role": "robot", "content": "x"}, ANSWERED]}, "'role' is 'robot'"),
        ({"messages": ["hello"]}, "a turn is a str"),
        ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "no text under 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWERED]}, "no text under 'content'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "no text under 'value'"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path: Path, record: Any, message: str) -> None:
    good = {"messages": [ASKED, ANSWERED]}
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, good, record)
    assert (caught.value.file, caught.value.line) == ("a.jsonl", 2)
    tally = Tally()
    assert len(read(tmp_path, good, record, good, on_error="skip", tally=tally)) == 2
    assert tally.bad_lines == 1


def test_files_that_hold_no_chats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"read from \.jsonl files, this is \.txt"):
        next(conversations("a.txt", tmp_path))
    with pytest.raises(DataError, match="no conversation in it"):
        next(conversations(".", tmp_path))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match="a dict, not an array"):
        next(conversations("b.json", tmp_path))
    (tmp_path / "b.json").write_text("[")
    with pytest.raises(DataError, match="not JSON"):
        next(conversations("b.json", tmp_path))


def test_the_split_hashes_the_messages(tmp_path: Path) -> None:
    one, same, other = read(
        tmp_path,
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"prompt": "a", "completion": "c"},
    )
    assert one.split_key == same.split_key != other.split_key


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("sft/dolly-15k/dolly-15k.jsonl", 1000),
        ("sft/fastchat/dummy_conversation.json", 500),
        ("sft/oasst-zh/oaast_sft_zh.json", 500),
    ],
)
def test_real_files(shared_data: Path, source: str, count: int) -> None:
    found = list(conversations(str(shared_data / source), Path(), on_error="skip"))
    assert len(found) >= count
    assert all(turn["content"] is not None for chat in found for turn in chat.messages)
