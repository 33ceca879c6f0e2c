"""The reference decoder: one prompt, one runner, a token at a time. What serves many requests must agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmctl.errors import UsageError
from llmctl.inference.runners import Ids, Runner
from llmctl.inference.sampling import History, Sampling, Token, generator_of, pick
from llmctl.text.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "Completion",
    "Delta",
    "Finish",
    "TextStream",
    "Token",
    "complete",
    "generate",
    "pieces",
    "room",
    "samples",
    "stream",
    "taken",
]

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
    """The tokens that continue `prompt`, or answer it; the last one may be an end of text, `runner.eos_ids`.

    Args:
        prompt: ids, with the BOS or EOS it needs: nothing is added.
        cancel: asked before every step of the model; true ends the text there.

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the context.
    """
    limit = room(runner, prompt, sampling)
    if not limit or (cancel is not None and cancel()):
        return
    cache, first = runner.begin(prompt, limit)
    generator, history = generator_of(sampling), History(first)
    for start, piece in enumerate(pieces(first)):
        if start and cancel is not None and cancel():
            return
        logits = runner.forward(piece, cache)
    while True:
        token = pick(logits[0, -1], sampling, generator, history)
        yield token
        history.output.append(token.id)
        ended = token.id in runner.eos_ids and not sampling.ignore_eos
        if ended or len(history.output) == limit or (cancel is not None and cancel()):
            return
        logits = runner.forward(np.array([[token.id]], np.int64), cache)


def pieces(ids: Sequence[int], size: int = CHUNK) -> Iterator[Ids]:
    """Ids as (1, T) arrays of at most `size`, in order."""
    whole = np.asarray(ids, np.int64)[None]
    for start in range(0, whole.shape[1], size):
        yield whole[:, start : start + size]


def room(runner: Runner, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens may follow the prompt: `max_tokens`, or fewer where the context ends.

    Raises:
        UsageError: an empty prompt, or one that leaves no room.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="a text begins with the tokenizer's BOS token")
    free = runner.max_length - taken(runner, len(prompt), runner.max_length)
    if free < 0 or (free == 0 and sampling.max_tokens != 0):
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens; prompt and answer have to fit in {runner.max_length:,}",
            hint="shorten the prompt",
        )
    return free if sampling.max_tokens is None else min(free, sampling.max_tokens)


def taken(runner: Runner, length: int, context: int) -> int:
    """Positions of a context that a prompt of so many tokens takes from its answer; one for an encoder takes none."""
    return len(runner.start_ids) if runner.start_ids and length <= context else length


class Answer:
    """An answer in the making: tokens in, text out, until an end of the text, a stop string or the limit."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, sampling: Sampling, limit: int) -> None:
        self.text = TextStream(tokenizer, sampling.stop)
        self._ends = () if sampling.ignore_eos else runner.eos_ids
        self._left = limit

    def push(self, token: Token) -> Delta:
        """What a token shows; with `finish_reason` if it is the last one."""
        self._left -= 1
        shown = self.text.push(token.id)
        finish: Finish | None = "stop" if self.text.stopped else None
        if finish is None and token.id in self._ends:
            shown, finish = shown + self.text.flush(), "stop"
        elif finish is None and not self._left:
            shown += self.text.flush(cut_off=True)
            finish = "stop" if self.text.stopped else "length"
        return Delta(shown, (token,), finish)


def stream(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: Callable[[], bool] | None = None,
) -> Iterator[Delta]:
    """`generate` as text: no half characters, nothing of a stop string. The last delta says why the text ended."""
    limit = room(runner, prompt, sampling)
    answer, held = Answer(runner, tokenizer, sampling, limit), list[Token]()
    for token in generate(runner, prompt, sampling, cancel):
        delta = answer.push(token)
        held.append(token)
        if delta.text or delta.finish_reason is not None:
            yield replace(delta, tokens=tuple(held))
            held = []
        if delta.finish_reason is not None:
            return
    yield Delta(answer.text.flush(cut_off=True), tuple(held), "cancelled" if limit else "length")


def complete(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: Callable[[], bool] | None = None,
) -> Completion:
    """The whole continuation of `prompt` at once."""
    return _joined(list(stream(runner, tokenizer, prompt, sampling, cancel)))


def samples(
    runner: Runner, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, n: int
) -> list[Completion]:
    """`n` answers to one prompt, drawn side by side: the prompt is read once, and every step is one batch.

    With a seed, answer i is what `complete` draws with seed + i, but for what a batch rounds otherwise than one row.
    """
    limit = room(runner, prompt, sampling)
    if not limit:
        return [Completion("", (), "length")] * n
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**64 for i in range(n)]
    answers = [Answer(runner, tokenizer, sampling, limit) for _ in range(n)]
    generators = [generator_of(replace(sampling, seed=seed)) for seed in seeds]
    cache, first = runner.begin(prompt, limit)
    histories, deltas = [History(first) for _ in range(n)], [list[Delta]() for _ in range(n)]
    for piece in pieces(first):
        logits = runner.forward(piece, cache)  # (1, 1, V)
    cache, logits = runner.select(cache, [0] * n), np.repeat(logits, n, 0)
    going = list(range(n))  # the answers that are not finished, in the order of the cache's rows
    while True:
        for row, i in enumerate(going):
            token = pick(logits[row, -1], sampling, generators[i], histories[i])
            histories[i].output.append(token.id)
            deltas[i].append(answers[i].push(token))
        kept = [row for row, i in enumerate(going) if deltas[i][-1].finish_reason is None]
        if not kept:
            return [_joined(answer) for answer in deltas]
        if len(kept) < len(going):
            cache, going = runner.select(cache, kept), [going[row] for row in kept]
        logits = runner.forward(np.array([[histories[i].output[-1]] for i in going], np.int64), cache)


def _joined(deltas: Sequence[Delta]) -> Completion:
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
