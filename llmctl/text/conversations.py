"""Chats to finetune on: JSONL in the shapes people have, or the pairs built into Python.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}                     also {"question", "answer"} and {"prompt", "response"}
    {"instruction": "...", "input": "...", "output": "..."}    Alpaca; also {"instruction", "context", "response"}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}    ShareGPT

A `.json` file with one array of such objects is read too: Alpaca and ShareGPT are handed on that way. Standard library
only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text import builtin, sources
from llmctl.text.jsonl import SKIP_HINT, OnError, Skipper, records, valid
from llmctl.text.sources import Tally

SUFFIXES = (*sources.JSONL, ".json")
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}
QUESTIONS, ANSWERS = ("prompt", "question"), ("completion", "response", "answer", "output")
INPUTS = ("input", "context")
SHAPES = "messages, prompt and completion, instruction and output (Alpaca), or conversations (ShareGPT)"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, each with a role (system, user or assistant) and its content; at least one is the assistant's."""

    messages: tuple[dict[str, str], ...]
    origin: str  # file:line
    key: str = ""  # what the split hashes; empty: the messages themselves

    @property
    def split_key(self) -> str:
        return self.key or json.dumps(self.messages, ensure_ascii=False, sort_keys=True)


def with_system(conversation: Conversation, system: str) -> Conversation:
    """The conversation under a system message, where one is asked for and it has none of its own.

    It stays on its side of the split: only what the source says is hashed.
    """
    if not system or conversation.messages[0]["role"] == "system":
        return conversation
    messages = ({"role": "system", "content": system}, *conversation.messages)
    return Conversation(messages, conversation.origin, conversation.split_key)


def conversations(
    spec: str, root: Path, *, on_error: OnError = "stop", tally: Tally | None = None
) -> Iterator[Conversation]:
    """The conversations of a source: a file, a folder, a glob, or `builtin:python-docstrings`, in a fixed order.

    Raises:
        DataError: missing or empty; a line that is no conversation, with file:line (with `on_error` "stop").
    """
    tally = tally if tally is not None else Tally()
    before = tally.documents
    if spec == builtin.DOCSTRINGS:
        for question, answer, origin, key in builtin.pairs():
            tally.documents += 1
            yield Conversation(_turns(question, answer), origin, key)
        return
    if spec.startswith(builtin.PREFIX):
        builtin.files(spec)  # an unknown name is named as such
        raise DataError("this built-in source is text, not chats", file=spec, hint=f'use "{builtin.DOCSTRINGS}"')
    for path in sources.resolve(spec, root):
        shown = sources.shown_as(path, spec, root)
        if path.suffix.lower() not in SUFFIXES:
            if sources.is_named(spec, root):
                hint = "write one JSON object a line into a .jsonl file; plain text goes under [prep] sources"
                raise DataError(
                    f"chats are read from .jsonl files, this is {path.suffix or 'a file without suffix'}",
                    file=shown,
                    hint=hint,
                )
            tally.passed_over[path.suffix.lower() or "other"] += 1
            continue
        tally.files += 1
        skipper = Skipper(on_error, shown)
        lines = _array(path, shown) if path.suffix.lower() == ".json" else records(path, shown, skipper)
        for number, record in lines:
            try:
                messages = turns(record, shown, number)
            except DataError as problem:
                skipper.take(problem)
                continue
            tally.documents += 1
            yield Conversation(messages, f"{shown}:{number}")
        tally.bad_lines += skipper.bad
    if tally.documents == before:
        raise DataError("no conversation in it", file=spec, hint=f"each line of a .jsonl has {SHAPES}")


def turns(record: Any, shown: str, number: int) -> tuple[dict[str, str], ...]:
    """The turns of one record, whichever shape it has.

    Raises:
        DataError: no shape that is known, a turn without text, or no answer in it.
    """
    if not isinstance(record, Mapping):
        raise _wrong(f"the line is a {type(record).__name__}", shown, number)
    if isinstance(record.get("messages"), list):
        found = tuple(_turn(turn, "role", "content", shown, number) for turn in record["messages"])
    elif isinstance(record.get("conversations"), list):
        first = (
            [{"role": "system", "content": record["system"]}]
            if isinstance(record.get("system"), str) and record["system"]
            else []
        )
        found = (*first, *(_turn(turn, "from", "value", shown, number) for turn in record["conversations"]))
    else:
        answer = next((record[key] for key in ANSWERS if isinstance(record.get(key), str)), None)
        question = next((record[key] for key in ("instruction", *QUESTIONS) if isinstance(record.get(key), str)), None)
        if answer is None or question is None:
            raise _wrong(f"the line's keys are {', '.join(map(str, record))}", shown, number)
        given = next((record[key] for key in INPUTS if isinstance(record.get(key), str) and record[key].strip()), "")
        found = _turns(f"{question}\n\n{given}" if "instruction" in record and given else question, answer)
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in found):
        raise _wrong("no answer in it: nothing to learn from", shown, number)
    return found


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": valid(question)}, {"role": "assistant", "content": valid(answer)}


def _turn(turn: Any, role_key: str, text_key: str, shown: str, number: int) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise _wrong(f"a turn is a {type(turn).__name__}", shown, number)
    said, text = turn.get(role_key), turn.get(text_key)
    role = "system" if said == "system" else ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _wrong(f"a turn's {role_key!r} is {said!r}; system, user and assistant are known", shown, number)
    if isinstance(text, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in text]
        text = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        raise _wrong(f"a turn has no text under {text_key!r}", shown, number)
    return {"role": role, "content": valid(text)}


def _wrong(found: str, shown: str, number: int) -> DataError:
    return DataError(
        f"not a conversation: {found}", file=shown, line=number, hint=f"expected: {SHAPES}; or {SKIP_HINT}"
    )


def _array(path: Path, shown: str) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON array, numbered from 1."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as reason:
        raise DataError(f"not JSON ({reason})", file=shown, hint="an array of objects is expected, or .jsonl") from None
    if not isinstance(content, list):
        raise DataError(
            f"a {type(content).__name__}, not an array", file=shown, hint="an array of objects is expected, or .jsonl"
        )
    yield from enumerate(content, 1)
