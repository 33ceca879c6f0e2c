"""The shapes of OpenAI's answers: choices, chunks, log-probabilities, usage.

Completions and chat differ in names only: each is a `Kind`, so that one path streams both and one path collects both.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.inference.sampling import Token
from llmctl.serve.model import Model

JSON = dict[str, Any]


@dataclass
class Usage:
    """Tokens: a prompt counts once however many answers it gets; the token that ends an answer counts too."""

    prompt: int
    completion: int = 0

    def body(self) -> JSON:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Kind(ABC):
    """One answer in the making, of one of the two endpoints."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: Model, *, logprobs: bool) -> None:
        self.model, self.logprobs = model, logprobs
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: JSON | None, finish: str | None) -> JSON:
        """A finished choice of a whole answer."""

    @abstractmethod
    def delta(self, index: int, text: str | None, logprobs: JSON | None, finish: str | None) -> JSON:
        """A choice of a chunk; without text it is the terminal one."""

    def opening(self, index: int) -> JSON | None:
        """The choice that opens a stream, if there is one."""
        return None

    @abstractmethod
    def scores(self, index: int, tokens: Sequence[Token]) -> JSON | None:
        """The log-probabilities of further tokens of a choice; None where nobody asked."""

    def whole(self, choices: list[JSON], usage: Usage) -> JSON:
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.body()}

    def chunk(self, choices: list[JSON], **more: Any) -> bytes:
        """One event of the stream."""
        return sse({**self._head, "object": self.chunk_object, "choices": choices, **more})

    def spell(self, index: int) -> str:
        """A token as text. Half a character is spelled as OpenAI does: `bytes:\\xe4\\xbd`."""
        if index in self.model.special_names:
            return self.model.special_names[index]
        piece = self.model.tokenizer.token_bytes(index)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Completion(Kind):
    """POST /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: Model, *, logprobs: bool) -> None:
        super().__init__(model, logprobs=logprobs)
        self._places: dict[int, tuple[Any, int]] = {}  # choice -> its decoder and the characters so far

    def choice(self, index: int, text: str, logprobs: JSON | None, finish: str | None) -> JSON:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, text: str | None, logprobs: JSON | None, finish: str | None) -> JSON:
        return self.choice(index, text or "", logprobs, finish)

    def scores(self, index: int, tokens: Sequence[Token]) -> JSON | None:
        """`text_offset` counts characters of the choice's text; the first token of a prompt has no logprob."""
        if not self.logprobs:
            return None
        decoder, at = self._places.get(index) or (self.model.tokenizer.stream(), 0)
        offsets = []
        for token in tokens:
            offsets.append(at)
            at += len(decoder.push(token.id))
        self._places[index] = decoder, at
        return {
            "tokens": [self.spell(token.id) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """Best first, the token itself included. Of two pieces of one spelling the likelier stands for both."""
        if math.isnan(token.logprob):
            return None
        top: dict[str, float | None] = {}
        for index, logprob in sorted({**dict(token.top), token.id: token.logprob}.items(), key=lambda item: -item[1]):
            top.setdefault(self.spell(index), _number(logprob))
        return top


class Chat(Kind):
    """POST /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: JSON | None, finish: str | None) -> JSON:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, text: str | None, logprobs: JSON | None, finish: str | None) -> JSON:
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> JSON:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def scores(self, index: int, tokens: Sequence[Token]) -> JSON | None:
        if not self.logprobs:
            return None
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, index: int, logprob: float) -> JSON:
        piece = self.model.tokenizer.token_bytes(index) or self.spell(index).encode()
        return {"token": self.spell(index), "logprob": _number(logprob), "bytes": list(piece)}


def _number(logprob: float) -> float | None:
    """JSON has no NaN (the first token of a prompt) and no infinity; OpenAI's API says -9999 for "never"."""
    return None if math.isnan(logprob) else max(logprob, -9999.0)


def sse(body: JSON) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
