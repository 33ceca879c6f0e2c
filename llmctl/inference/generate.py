"""The reference decoder: one prompt, one runner, a token at a time. What serves many requests must agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmctl.errors import UsageError
from llmctl.inference.runners import Runner
from llmctl.inference.sampling import History, Sampling, Token, generator_of, pick
from llmctl.text.tokenizer import Tokenizer

__all__ = ["Completion", "Delta", "Finish", "TextStream", "Token", "complete", "generate", "room", "stream"]

# "stop": the model ended the text, or a stop string did. "length": max_tokens or the context did.
Finish = Literal["stop", "length", "cancelled"]
# Prompt tokens at a time, so that a cancelled request ends soon even in a long prompt.
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a stream, the tokens that made it, and with the last one why it ended."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: Finish | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished text. `tokens` holds every token drawn, those that ended it included."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: Finish

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]


def generate(
    runner: Runner, prompt: Sequence[int], sampling: Sampling, cancel: Callable[[], bool] | None = None
) -> Iterator[Token]:
    """The tokens that continue `prompt`; the last one may be an end of text, `runner.eos_ids`.

    Args:
        prompt: ids, with the BOS it needs: nothing is added.
        cancel: asked before every step of the model; true ends the text there.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
    """
    limit = room(runner, prompt, sampling)
    if not limit:
        return
    generator, history = generator_of(sampling), History(prompt)
    cache = runner.new_cache(max_length=len(prompt) + limit)
    ids = np.asarray(prompt, np.int64)[None]  # (1, T)
    for start in range(0, len(prompt), CHUNK):
        if cancel is not None and cancel():
            return
        logits = runner.forward(ids[:, start : start + CHUNK], cache)
    while True:
        token = pick(logits[0, -1], sampling, generator, history)
        yield token
        history.output.append(token.id)
        ended = token.id in runner.eos_ids and not sampling.ignore_eos
        if ended or len(history.output) == limit or (cancel is not None and cancel()):
            return
        logits = runner.forward(np.array([[token.id]], np.int64), cache)


def room(runner: Runner, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens may follow the prompt: `max_tokens`, or fewer where the context ends.

    Raises:
        UsageError: an empty prompt, or one that leaves no room.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="a text begins with the tokenizer's BOS token")
    free = runner.max_length - len(prompt)
    if free < 0 or (free == 0 and sampling.max_tokens != 0):
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens; prompt and answer have to fit in {runner.max_length:,}",
            hint="shorten the prompt",
        )
    return free if sampling.max_tokens is None else min(free, sampling.max_tokens)


def stream(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: Callable[[], bool] | None = None,
) -> Iterator[Delta]:
    """`generate` as text: no half characters, nothing of a stop string. The last delta says why the text ended."""
    text = TextStream(tokenizer, sampling.stop)
    limit, count, held = room(runner, prompt, sampling), 0, list[Token]()
    ended = False
    for token in generate(runner, prompt, sampling, cancel):
        count += 1
        held.append(token)
        ended = token.id in runner.eos_ids and not sampling.ignore_eos
        shown = text.push(token.id)
        if text.stopped:
            yield Delta(shown, tuple(held), "stop")
            return
        if shown and not ended and count < limit:
            yield Delta(shown, tuple(held))
            held, shown = [], ""
        elif ended or count == limit:
            finish: Finish = "stop" if ended else "length"
            shown += text.flush(cut_off=not ended)
            yield Delta(shown, tuple(held), "stop" if text.stopped else finish)
            return
    yield Delta(text.flush(cut_off=True), tuple(held), "length" if count == limit else "cancelled")


def complete(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: Callable[[], bool] | None = None,
) -> Completion:
    """The whole continuation of `prompt` at once."""
    deltas = list(stream(runner, tokenizer, prompt, sampling, cancel))
    finish = deltas[-1].finish_reason
    assert finish is not None
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return Completion("".join(delta.text for delta in deltas), tokens, finish)


class TextStream:
    """Ids to text that may be shown at once: whole characters, and nothing that may yet turn out to be a stop string.

    `stopped` is true once a stop string was found; the text then ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._pieces = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""

    def push(self, id: int) -> str:
        """The text that this id lets go of."""
        return self._show(self._pieces.push(id))

    def flush(self, cut_off: bool = False) -> str:
        """The rest. With `cut_off` the text did not end by itself, and bytes of an unfinished character are dropped."""
        text = self._show("" if cut_off else self._pieces.flush()) + self._held
        self._held = ""
        return text

    def _show(self, new: str) -> str:
        text = self._held + new
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
