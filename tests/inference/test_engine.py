"""The engine against the reference decoder, over a runner whose every step a test can hold, watch and fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from llmctl.inference.engine import Answers, Engine, Event, Prompt, QueueFull, Stopping
from llmctl.inference.generate import complete
from llmctl.inference.sampling import Sampling, log_softmax
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer

EOS = 2


class Bigram:
    """A model whose next token depends on the last two: cheap, deterministic, and it needs its cache."""

    vocab_size, max_length = 300, 1500
    eos_ids: tuple[int, ...] = (EOS,)
    start_ids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(2, self.vocab_size, self.vocab_size)).astype(np.float32)
        self.held: threading.Semaphore | None = None
        self.fails: Callable[[list[int]], bool] = lambda ids: False
        self.steps: list[list[int]] = []
        self.lock = threading.Lock()

    def begin(self, prompt: Sequence[int], new: int) -> tuple[list[int], list[int]]:
        return [], list(prompt)

    def select(self, cache: list[int], rows: Sequence[int]) -> list[int]:
        raise NotImplementedError

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> list[int]:
        assert batch == 1
        return []

    def forward(self, ids: Any, cache: list[int] | None = None, last_only: bool = True) -> Any:
        assert self.lock.acquire(blocking=False), "two steps at once"
        try:
            self.steps.append(ids[0].tolist())
            if self.held is not None:
                assert self.held.acquire(timeout=20)
            if self.fails(self.steps[-1]):
                raise RuntimeError("on cue")
            cache = [] if cache is None else cache
            start = len(cache)
            cache += ids[0].tolist()
            rows = [
                self.table[0, cache[at]] + self.table[1, cache[at - 1] if at else 0] for at in range(start, len(cache))
            ]
            return np.stack(rows)[None, -1:] if last_only else np.stack(rows)[None]
        finally:
            self.lock.release()

    def hold(self, steps: int = 0) -> None:
        self.held = threading.Semaphore(steps)

    def release(self, steps: int = 10**6) -> None:
        assert self.held is not None
        self.held.release(steps)


@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    return tokenizers.train(["any"], "byte")


@pytest.fixture
def runner() -> Bigram:
    return Bigram()


@pytest.fixture
def engine(runner: Bigram, letters: Tokenizer) -> Iterator[Engine]:
    made = Engine(runner, letters, slots=3, max_waiting=6)
    yield made
    if runner.held is not None:
        runner.release()
    made.close()
    assert not made._thread.is_alive()


class Inbox:
    """What a request has got so far."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, ready: Callable[[list[Event]], bool]) -> list[Event]:
        with self._changed:
            assert self._changed.wait_for(lambda: ready(self.events), 20)
            return list(self.events)

    def ended(self, answers: int = 1) -> list[Event]:
        """Waits for the end of the request."""
        return self.wait(
            lambda events: sum(e.finish is not None for e in events) == answers or any(e.error for e in events)
        )


def ask(seed: int = 0, **more: Any) -> Prompt:
    values = {"temperature": 1.0, "seed": seed, "max_tokens": 30, **more}
    return Prompt([1, *range(50, 60 + seed % 7)], Sampling(**values))


def test_answers_are_those_of_the_reference_decoder(engine: Engine, runner: Bigram, letters: Tokenizer) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"ignore_eos": True, "max_tokens": 200},
        {"stop": ("e", "qq")},
        {"max_tokens": 1},
        {"max_tokens": 0},
        {"logprobs": 3, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"logit_bias": {EOS: 100.0}},
    ]
    inboxes = []
    for seed, variant in enumerate(variants):
        inbox = Inbox()
        while True:
            try:
                engine.submit([ask(seed, **variant)], inbox)
                break
            except QueueFull:
                inboxes[-1][0].ended()
        inboxes.append((inbox, ask(seed, **variant)))
    finishes = set()
    for inbox, prompt in inboxes:
        events = inbox.ended()
        expected = complete(Bigram(), letters, prompt.ids, prompt.sampling)
        assert "".join(event.text for event in events) == expected.text
        assert tuple(token for event in events for token in event.tokens) == expected.tokens
        assert [event.finish for event in events if event.finish] == [expected.finish_reason]
        finishes.add(expected.finish_reason)
    assert finishes == {"stop", "length"}  # both ways to end were really there


def test_active_requests_take_turns(engine: Engine, runner: Bigram) -> None:
    runner.hold()
    inboxes = [Inbox() for _ in range(3)]
    for mark, inbox in enumerate(inboxes):
        engine.submit([Prompt([mark], Sampling(max_tokens=4, ignore_eos=True))], inbox)
    runner.release()
    for inbox in inboxes:
        inbox.ended()
    assert [len(step) for step in runner.steps] == [1] * 12
    assert runner.steps[:3] == [[0], [1], [2]]  # each has its first token before one has its second
    orders = [[event.index for event in inbox.events] for inbox in inboxes]
    assert orders == [[0] * 4] * 3


def test_a_request_of_many_prompts_does_not_starve_another(engine: Engine, runner: Bigram) -> None:
    runner.hold()
    greedy = Sampling(max_tokens=1, ignore_eos=True)
    engine.submit([Prompt([10 + i], greedy) for i in range(5)], many := Inbox())
    engine.submit([Prompt([99], greedy)], one := Inbox())
    runner.release()
    many.ended(5)
    one.ended()
    assert runner.steps.index([99]) <= 4


def test_a_long_prompt_comes_in_pieces_between_which_others_step(engine: Engine, runner: Bigram) -> None:
    runner.hold()
    engine.submit([Prompt([7] * 1300, Sampling(max_tokens=1))], long := Inbox())
    engine.submit([Prompt([8], Sampling(max_tokens=2, ignore_eos=True))], short := Inbox())
    runner.release()
    long.ended()
    short.ended()
    sizes = [len(step) for step in runner.steps]
    assert sorted(sizes) == [1, 1, 276, 512, 512]
    assert sizes.index(1) < sizes.index(276)


def test_a_scored_prompt_has_the_models_own_log_probabilities(engine: Engine, runner: Bigram) -> None:
    ids = np.random.default_rng(1).integers(3, 300, 700).tolist()
    engine.submit([Prompt(ids, Sampling(max_tokens=1, logprobs=2), scored=True)], inbox := Inbox())
    (event,) = inbox.ended()
    rows = log_softmax(Bigram().forward(np.array([ids]), last_only=False)[0])
    assert [token.id for token in event.prompt] == ids
    assert math.isnan(event.prompt[0].logprob)
    assert [token.logprob for token in event.prompt[1:]] == [rows[at, id_] for at, id_ in enumerate(ids[1:])]
    assert all(len(token.top) == 2 and token.top[0][1] >= token.top[1][1] for token in event.prompt[1:])
    assert len(event.tokens) == 1


def test_a_failing_step_ends_its_own_request_only(engine: Engine, runner: Bigram) -> None:
    runner.fails = lambda ids: 66 in ids
    broken = [Prompt([5, 4], Sampling(max_tokens=50, ignore_eos=True)), Prompt([5, 66], Sampling(max_tokens=5))]
    engine.submit(broken, bad := Inbox())
    engine.submit([ask(1)], good := Inbox())
    assert isinstance(bad.ended(3)[-1].error, RuntimeError)
    assert good.ended()[-1].finish
    assert engine.stats().failed == 1
    runner.fails = lambda ids: False
    engine.submit([ask(1)], again := Inbox())
    assert again.ended()[-1].finish


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cancelling_frees_the_slot_before_the_next_step(engine: Engine, runner: Bigram, steps: int) -> None:
    runner.hold(steps)
    ticket = engine.submit([Prompt([7] * 2, Sampling(ignore_eos=True, max_tokens=100))], inbox := Inbox())
    inbox.wait(lambda events: len(events) == steps)
    while len(runner.steps) <= steps:  # now it is held in the middle of a step
        threading.Event().wait(0.001)
    engine.cancel(ticket)
    engine.cancel(ticket)
    runner.release()
    engine.submit([Prompt([9], Sampling(max_tokens=1))], after := Inbox())
    after.ended()
    assert len(runner.steps) == steps + 2  # the one under way, and the newcomer's
    stats = engine.stats()
    assert (stats.cancelled, stats.active, stats.waiting) == (1, 0, 0)


def test_a_waiting_request_can_leave_the_queue(engine: Engine, runner: Bigram) -> None:
    runner.hold()
    engine.submit([ask(i) for i in range(3)], Inbox())
    while engine.stats().active < 3:
        threading.Event().wait(0.001)
    waiting = engine.submit([ask(4), ask(5)], Inbox())
    assert engine.stats().waiting == 2
    engine.cancel(waiting)
    assert engine.stats().waiting == 0


def test_the_queue_is_bounded_and_takes_all_of_a_request_or_nothing(engine: Engine, runner: Bigram) -> None:
    runner.hold()
    engine.submit([ask(i) for i in range(3)], first := Inbox())
    while engine.stats().active < 3:
        threading.Event().wait(0.001)
    engine.submit([ask(i) for i in range(5)], second := Inbox())
    with pytest.raises(QueueFull):
        engine.submit([ask(), ask()], Inbox())
    assert engine.stats().waiting == 5
    runner.release()
    first.ended(3)
    second.ended(5)
    assert engine.stats().rejected == 1


def test_closing_lets_answers_end_and_takes_no_more(runner: Bigram, letters: Tokenizer) -> None:
    engine = Engine(runner, letters, slots=1)
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        engine.submit([ask()], inbox)
    engine.close(20)
    assert all(inbox.events[-1].finish for inbox in inboxes)
    with pytest.raises(Stopping):
        engine.submit([ask()], Inbox())


def test_closing_ends_what_takes_too_long(runner: Bigram, letters: Tokenizer) -> None:
    engine = Engine(runner, letters, slots=1)
    runner.hold(3)
    endless = Prompt([7], Sampling(ignore_eos=True))
    engine.submit([endless], active := Inbox())
    engine.submit([endless, endless], waiting := Inbox())
    active.wait(lambda events: len(events) == 3)
    closing = threading.Thread(target=engine.close)
    closing.start()
    runner.release()
    closing.join(20)
    assert isinstance(active.events[-1].error, Stopping)
    assert [type(event.error) for event in waiting.events] == [Stopping]


def test_answers_as_an_async_iterator(engine: Engine, runner: Bigram, letters: Tokenizer) -> None:
    async def whole(prompt: Prompt) -> str:
        with Answers(engine, [prompt]) as answers:
            return "".join([event.text async for event in answers])

    async def left_early() -> None:
        with Answers(engine, [Prompt([1], Sampling(ignore_eos=True))]) as answers:
            async for _ in answers:
                break

    async def failing() -> None:
        with Answers(engine, [Prompt([66], Sampling(max_tokens=2))]) as answers:
            async for _ in answers:
                pass

    async def together() -> list[str]:
        return list(await asyncio.gather(*(whole(ask(seed)) for seed in range(3))))

    expected = [complete(Bigram(), letters, ask(seed).ids, ask(seed).sampling).text for seed in range(3)]
    assert asyncio.run(together()) == expected
    runner.fails = lambda ids: bool(time.sleep(0.02))  # or a busy machine finishes before the client has left
    asyncio.run(left_early())
    runner.fails = lambda ids: 66 in ids
    with pytest.raises(RuntimeError, match="on cue"):
        asyncio.run(failing())
    stats = engine.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (3, 1, 1)
