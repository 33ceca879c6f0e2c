"""A tiny model that knows a few lines by heart, as a chat model's folder and as a base model's; and a server on it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.nn.functional as F

from llmctl import device
from llmctl.inference.engine import Engine
from llmctl.inference.runners import Runner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from llmctl.serve import api, stage
from llmctl.serve.model import Model, load
from llmctl.text import tokenizer as tokenizers
from llmctl.text.chat import CHATML, ChatTemplate, supervised

TEXTS = [
    "The cat sat on the mat and looked at the moon. Then it slept until morning.\n",
    "def add(a, b):\n    return a + b\n",
    "你好，世界。我们在这里看书，猫在那里睡觉。\n",
]
DIALOGUES = [("What is the cat doing?", "It sleeps on the mat."), ("你好", "你好，世界。"), ("Add?", "def add(a, b)")]
CONTEXT = 256


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`chat` and `base`: the same weights, with and without the chat template."""
    torch.set_num_threads(1)
    tokenizer = tokenizers.train(TEXTS * 20, "bpe", 380)
    template = ChatTemplate(CHATML)
    ends = (tokenizer.special("<|im_end|>"), tokenizer.eos_id)
    config = Config(
        "qwen3",
        len(tokenizer),
        64,
        160,
        2,
        2,
        2,
        32,
        CONTEXT,
        qk_norm=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=ends,
    )
    model = Decoder.random(config, seed=0)
    _learn(model, _examples(tokenizer, template))
    made = {}
    for kind in ("chat", "base"):
        made[kind] = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
        made[kind].mkdir()
        hf.save(model, tokenizer, made[kind])
    template.save(made["chat"])
    return made


def _examples(tokenizer: Any, template: ChatTemplate) -> list[list[int]]:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    texts = [[bos, *tokenizer.encode(text), eos] for text in TEXTS]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question, reply in DIALOGUES
    ]
    return texts + [supervised(template, tokenizer, turn)[0] for turn in turns]


def _learn(model: Decoder, examples: list[list[int]]) -> None:
    width = max(map(len, examples))
    ids = torch.tensor([[*example, *[-1] * (width - len(example))] for example in examples])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(60):
        logits = model(ids[:, :-1].clamp_min(0))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    assert loss.item() < 0.1, f"the tiny model has not learned its lines: loss {loss.item():.2f}"


@pytest.fixture(scope="session")
def chat_model(folders: dict[str, Path]) -> Model:
    return load(folders["chat"], device.pick("cpu"))


@pytest.fixture(scope="session")
def base_model(folders: dict[str, Path]) -> Model:
    return load(folders["base"], device.pick("cpu"))


@dataclass
class Running:
    """A server over a real socket."""

    url: str
    service: api.Service
    engine: Engine

    def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **more)

    def settled(self) -> bool:
        """Whether every slot becomes free."""
        return until(lambda: not (stats := self.engine.stats()).active and not stats.waiting)


@contextmanager
def running(model: Model, *, api_key: str = "", slots: int = 4, max_waiting: int = 256) -> Iterator[Running]:
    """Serves a model as `llmctl serve` does, without its signals."""
    service = api.Service()
    engine = Engine(model.runner, model.tokenizer, slots=slots, max_waiting=max_waiting)
    listener = stage.listen("127.0.0.1", 0)
    url = stage.url("127.0.0.1", listener.getsockname()[1])
    with stage.Server(api.application(service, api_key=api_key), listener):
        service.ready(model, engine)
        yield Running(url, service, engine)
        engine.close()


@pytest.fixture(scope="session")
def server(chat_model: Model) -> Iterator[Running]:
    with running(chat_model) as made:
        yield made


def until(happens: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Polls; the bound is only so that a failing test ends."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if happens():
            return True
        pause.wait(0.01)
    return False


class Watched:
    """A runner that a test can hold, in the middle of a step, and make fail; it remembers the ids it was given."""

    def __init__(
        self, runner: Runner, *, permits: int | None = None, fails: Callable[[list[int]], bool] | None = None
    ) -> None:
        self._runner, self._fails = runner, fails
        self._permits = threading.Semaphore(permits or 0)
        self._free = permits is None
        self.seen: list[list[int]] = []  # what each step was given, the step under way included

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def release(self) -> None:
        """Holds no step any more."""
        self._free = True
        self._permits.release()

    def forward(self, ids: Any, cache: Any = None, last_only: bool = True) -> Any:
        self.seen.append(ids[0].tolist())
        if not self._free:
            assert self._permits.acquire(timeout=20), "nobody let this step go on"
        if self._fails is not None and self._fails(self.seen[-1]):
            raise RuntimeError("a step that fails on cue")
        return self._runner.forward(ids, cache, last_only)


def watched(model: Model, **how: Any) -> tuple[Model, Watched]:
    """The model over a watched runner."""
    runner = Watched(model.runner, **how)
    return dataclasses.replace(model, runner=runner), runner
