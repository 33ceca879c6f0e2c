"""How well a model answers: bits a byte of the reference answers, and what it says itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.inference import generate
from llmctl.inference.generate import Completion
from llmctl.inference.runners import Runner
from llmctl.inference.sampling import Sampling
from llmctl.text import chat
from llmctl.text.chat import ChatTemplate
from llmctl.text.conversations import Conversation
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerScore:
    """Likelihood of reference answers, the tokens that end a turn left out: a model that never saw a chat can't know
    them.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """NaN where nothing was scored: no conversation fits the context."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def score(
    runner: Runner, tokenizer: Tokenizer, template: ChatTemplate, conversations: Iterable[Conversation]
) -> AnswerScore:
    """Scores the assistant's words of every conversation that fits the context."""
    nats, tokens, size = 0.0, 0, 0
    for conversation in conversations:
        ids, supervised = chat.supervised(template, tokenizer, conversation.messages)
        at = [i for i in range(1, len(ids)) if supervised[i] and ids[i] not in tokenizer.special_ids]
        if not at or len(ids) > runner.max_length:
            continue
        logits = runner.forward(
            np.asarray([ids[:-1]], dtype=np.int64), runner.new_cache(max_length=len(ids)), last_only=False
        )[0]
        rows = logits[[i - 1 for i in at]].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(at)), [ids[i] for i in at]] - np.log(np.exp(rows).sum(-1))
        nats, tokens = nats - float(chosen.sum()), tokens + len(at)
        size += sum(len(tokenizer.token_bytes(ids[i])) for i in at)
    return AnswerScore(nats, tokens, size)


def ask(
    runner: Runner,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
) -> list[tuple[Conversation, Completion]]:
    """The model's own greedy answer to the last question of every conversation that leaves room for one."""
    sampling = Sampling(temperature=0.0, max_tokens=max_new_tokens)
    found: list[tuple[Conversation, Completion]] = []
    for conversation in conversations:
        ids = chat.encode(template, tokenizer, conversation.messages[:-1], add_generation_prompt=True)
        if len(ids) + max_new_tokens <= runner.max_length:
            found.append((conversation, generate.complete(runner, tokenizer, ids, sampling)))
    return found


def ended(said: Sequence[tuple[Conversation, Completion]]) -> float:
    """The share of answers that end by themselves; NaN where there is none."""
    return sum(completion.finish_reason == "stop" for _, completion in said) / len(said) if said else math.nan
