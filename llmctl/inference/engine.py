"""Many requests over one runner: a fair queue, and one thread that steps them in turn.

Each answer (a sequence) has a cache of its own and is stepped alone, so nothing a neighbour does changes a byte of it.
A step is one call of the runner: a piece of a prompt, one token, or a batch of texts whose vectors are asked for. Up to
`slots` sequences take turns, step by step; the others wait, and free slots go round the waiting *requests*, so that a
hundred prompts of one never starve another.

A client that has gone, a step that raises and a shutdown all take effect before a sequence's next step.
"""

# T prompt tokens, V vocabulary

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import numpy as np

from llmctl import console
from llmctl.inference.encode import Embedder, Row, Vectors
from llmctl.inference.generate import CHUNK, Answer, Finish, pieces, room
from llmctl.inference.runners import Runner
from llmctl.inference.sampling import History, Sampling, Token, generator_of, log_softmax, pick, token
from llmctl.text.tokenizer import Tokenizer

SCORED_VALUES = 2**21  # of the (T, V) log-probabilities of a scored prompt at once: 16 MB in float64
STOP_SECONDS = 5.0  # that `close` waits for a step that is under way


class QueueFull(Exception):
    """The queue holds as many sequences as it may: come again."""


class Stopping(Exception):
    """The engine is shutting down."""


@dataclass(frozen=True)
class Prompt:
    """One answer asked for; `scored`: with the log-probabilities of the prompt itself."""

    ids: Sequence[int]
    sampling: Sampling
    scored: bool = False


@dataclass(frozen=True)
class Texts:
    """Texts whose vectors are asked for: each its ids. They are one sequence, and a step is a batch of them."""

    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one sequence, or the vectors of its texts.

    Attributes:
        index: of its prompt in the request.
        text, tokens: what is new; no half character, and nothing that may yet turn out to be a stop string.
        prompt: of a scored prompt, with the first event; nothing comes before its first token, whose logprob is NaN.
        finish: why the sequence ended, with its last event.
        error: what went wrong; it ends the whole request.
        vectors: of `Texts`, all of them, with the last event.
    """

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: Exception | None = None
    vectors: Vectors | None = None


@dataclass
class Stats:
    """Sequences that run and wait; requests ended since the start, by how; tokens generated."""

    active: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    tokens: int = 0


@dataclass(eq=False)
class Ticket:
    """A request inside the engine."""

    deliver: Callable[[Event], None]
    waiting: deque[tuple[int, Prompt | Texts]]
    unfinished: int
    cancelled: bool = False


@dataclass(eq=False)
class _Sequence:
    ticket: Ticket
    index: int
    steps: Iterator[Event | None] = field(repr=False)


class Engine:
    """Runs requests until `close`. Every method may be called from any thread."""

    def __init__(
        self, runner: Runner | Embedder, tokenizer: Tokenizer, *, slots: int = 4, max_waiting: int = 256
    ) -> None:
        self.runner, self.tokenizer, self.slots, self.max_waiting = runner, tokenizer, slots, max_waiting
        self._stats = Stats()
        self._waiting: deque[Ticket] = deque()
        self._active: deque[_Sequence] = deque()
        self._wake = threading.Condition()  # guards everything above
        self._stopping = self._aborting = False
        self._thread = threading.Thread(target=self._work, name="llmctl-engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt] | Sequence[Texts], deliver: Callable[[Event], None]) -> Ticket:
        """Queues a request; `deliver` gets its events in the engine's thread, and must return at once.

        Raises:
            QueueFull: nothing was queued.
            Stopping: after `close`.
        """
        ticket = Ticket(deliver, deque(enumerate(prompts)), len(prompts))
        with self._wake:
            if self._stopping:
                raise Stopping
            if self._stats.waiting + len(prompts) > self.max_waiting:
                self._stats.rejected += 1
                raise QueueFull
            self._stats.waiting += len(prompts)
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request before its next step; harmless when it has ended."""
        with self._wake:
            if ticket.unfinished and not ticket.cancelled:
                self._stats.cancelled += 1
                self._drop(ticket)
                self._wake.notify()

    def stats(self) -> Stats:
        """A snapshot."""
        with self._wake:
            return replace(self._stats)

    def close(self, grace: float = 0.0) -> None:
        """Takes nothing more; what is here goes on for `grace` seconds and is then ended with `Stopping`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(grace)
        with self._wake:
            self._aborting = True
        self._thread.join(STOP_SECONDS)

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _work(self) -> None:
        while True:
            with self._wake:
                self._sweep()
                self._admit()
                while not self._active:
                    if self._stopping:
                        return
                    self._wake.wait()
                    self._admit()
                if self._aborting:
                    self._abort()
                    return
                sequence = self._active.popleft()
            if self._step(sequence):
                self._active.append(sequence)

    def _sweep(self) -> None:
        """Frees the slots of requests that were cancelled or failed; the cache goes with the generator."""
        for _ in range(len(self._active)):
            sequence = self._active.popleft()
            if not sequence.ticket.cancelled:
                self._active.append(sequence)
        self._stats.active = len(self._active)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.slots:
            ticket = self._waiting.popleft()
            index, prompt = ticket.waiting.popleft()
            if ticket.waiting:
                self._waiting.append(ticket)
            self._active.append(_Sequence(ticket, index, self._steps(index, prompt)))
            self._stats.waiting -= 1
            self._stats.active += 1

    def _step(self, sequence: _Sequence) -> bool:
        """One step; whether there is another."""
        ticket = sequence.ticket
        try:
            event = next(sequence.steps)
            if event is None:
                return True
            with self._wake:  # counted before it is told: who has the last event finds the request ended
                self._stats.tokens += len(event.tokens)
                ticket.unfinished -= event.finish is not None
                self._stats.finished += not ticket.unfinished and not ticket.cancelled
            ticket.deliver(event)
            return event.finish is None
        except Exception as reason:  # whatever a runner raises is this request's end, and no other's
            self._fail(ticket, sequence.index, reason)
            return False

    def _fail(self, ticket: Ticket, index: int, reason: Exception) -> None:
        console.warn(f"a request failed: {type(reason).__name__}: {reason}")
        console.debug("".join(traceback.format_exception(reason)))
        with self._wake:
            if ticket.cancelled:
                return
            self._stats.failed += 1
            self._drop(ticket)
        with contextlib.suppress(Exception):  # delivering may be what failed
            ticket.deliver(Event(index, error=reason))

    def _drop(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        self._stats.waiting -= len(ticket.waiting)
        ticket.waiting.clear()
        with contextlib.suppress(ValueError):
            self._waiting.remove(ticket)

    def _abort(self) -> None:
        for ticket in {*(sequence.ticket for sequence in self._active), *self._waiting}:
            self._stats.cancelled += 1
            self._drop(ticket)
            with contextlib.suppress(Exception):
                ticket.deliver(Event(0, error=Stopping()))
        self._active.clear()
        self._stats.active = 0

    def _steps(self, index: int, prompt: Prompt | Texts) -> Iterator[Event | None]:
        """What is asked for, a step at a time; the last event has `finish`."""
        if isinstance(prompt, Texts):
            assert isinstance(self.runner, Embedder)
            return _embed(self.runner, index, prompt)
        assert not isinstance(self.runner, Embedder)
        return self._write(self.runner, index, prompt)

    def _write(self, runner: Runner, index: int, prompt: Prompt) -> Iterator[Event | None]:
        """What `generate.stream` does."""
        sampling = prompt.sampling
        limit = room(runner, prompt.ids, sampling)
        if not limit and not prompt.scored:
            yield Event(index, finish="length")
            return
        cache, first = runner.begin(prompt.ids, limit)
        chunk = max(1, min(CHUNK, SCORED_VALUES // runner.vocab_size)) if prompt.scored else CHUNK
        scores = [Token(first[0], math.nan)] if prompt.scored else []
        for start, piece in enumerate(pieces(first, chunk)):
            if start:
                yield None
            logits = runner.forward(piece, cache, last_only=not prompt.scored)
            if prompt.scored:  # the logits at a position are about the next one
                following = first[len(scores) : len(scores) + logits.shape[1]]
                scores += _score(logits[0, : len(following)], following, sampling.logprobs)
        if not limit:
            yield Event(index, prompt=tuple(scores), finish="length")
            return
        generator, history = generator_of(sampling), History(first)
        answer = Answer(runner, self.tokenizer, sampling, limit)
        while True:
            delta = answer.push(pick(logits[0, -1], sampling, generator, history))
            history.output.append(delta.tokens[0].id)
            yield Event(index, delta.text, delta.tokens, tuple(scores), delta.finish_reason)
            if delta.finish_reason is not None:
                return
            scores = []
            logits = runner.forward(np.array([[history.output[-1]]], np.int64), cache)


def _embed(embedder: Embedder, index: int, texts: Texts) -> Iterator[Event | None]:
    vectors = np.empty((len(texts.rows), embedder.dimensions), np.float32)
    for places, found in embedder.batches(texts.rows):
        vectors[places] = found
        yield None
    yield Event(index, vectors=vectors, finish="stop")


def _score(logits: np.ndarray, ids: Sequence[int], top: int) -> list[Token]:
    """Logits (T, V) and the T tokens that came."""
    return [token(row, id_, top) for row, id_ in zip(log_softmax(logits), ids, strict=True)]


class Answers:
    """A request as an async iterator over its events. Leaving the `with` block cancels what is not finished."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt] | Sequence[Texts]) -> None:
        """Queues the request at once; raises what `submit` raises."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._unfinished = len(prompts)
        self._ticket = engine.submit(prompts, self._arrive)

    def _arrive(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.cancel(self._ticket)

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> Event:
        """The next event; raises the error that ended the request."""
        if not self._unfinished:
            raise StopAsyncIteration
        event = await self._events.get()
        if event.error is not None:
            raise event.error
        self._unfinished -= event.finish is not None
        return event
