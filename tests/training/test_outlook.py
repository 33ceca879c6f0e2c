"""The micro-batch that is found automatically, and what a training says of its cost."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmctl import device
from llmctl.device import Device
from llmctl.model.config import derive
from llmctl.model.transformer import Decoder
from llmctl.recipe import ModelSection, PretrainSection
from llmctl.training import choices, footprint, loop, optim, outlook, planning
from llmctl.training.batch import Batch
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision

CONFIG, _ = derive(ModelSection(depth=1, max_seq_length=64), 500)
CPU = Device("cpu", "cpu", 1, frozenset())


def job(work: Path = Path()) -> Any:
    return SimpleNamespace(device=CPU, work=work, resolved={})


def picked(**keys: Any) -> int:
    section = PretrainSection.model_validate({"global_batch_size": 8, "max_steps": 4, "dtype": "fp32", **keys})
    made = planning.make(section, sequences=100, length=64, width=64, peak=1e-3)
    return outlook.micro_batch(job(), section, CONFIG, made)


def needs(size: int) -> int:
    section = PretrainSection(global_batch_size=8, max_steps=4)
    made = planning.make(section, sequences=100, length=64, width=64, peak=1e-3)
    wanted = outlook.training(section, CONFIG, made, "fp32", False)
    found = outlook.fitting(wanted, 8, float("inf"))
    assert found is not None
    return footprint.memory(dataclasses.replace(found, micro_batch=size, accumulates=size < 8)).total


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Says how much memory is free."""
    return lambda bytes_: monkeypatch.setattr(device, "free_memory", lambda kind: int(bytes_))


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    monkeypatch.setattr(footprint, "give_back", lambda: calls.append(True) or True)
    return calls


def test_as_much_as_keeps_the_speed_and_fits(free: Callable[[float], None], given_back: list[bool]) -> None:
    free(1e12)
    assert picked() == 8
    free(needs(4) * footprint.HOLES / footprint.ROOM + 1)
    assert picked() == 4
    assert picked(micro_batch_size=8) == 8  # asked for
    free(0)  # the system doesn't say
    assert picked() == 8
    assert given_back == []


def test_short_memory_is_given_back(free: Callable[[float], None], given_back: list[bool]) -> None:
    free(needs(2) / footprint.ROOM + 1)
    assert picked() == 2
    assert given_back


def test_what_cannot_fit_is_told(
    free: Callable[[float], None], given_back: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    free(1e5)
    assert picked() == 1
    assert "llmctl plan" in capsys.readouterr().out


class Small(torch.nn.Module):
    """A GPU that holds two sequences at a time; of more it notices at the second time, with gradients in its memory."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner, self.sizes = learner, list[int]()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.sizes.append(len(ids))
        loss: Tensor = self.learner(ids, labels)
        if len(ids) > 2 and self.sizes.count(len(ids)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


def weights(micro_batch: int, halved: Callable[[int], int] | None, steps: int = 2) -> tuple[Tensor, list[int]]:
    model = Decoder.random(CONFIG, seed=1)
    learner = Small(Learner(model))
    random = np.random.default_rng(0)
    batch = Batch((random.integers(0, 500, (8, 32)),), random.integers(0, 500, (8, 32)))
    done = loop.train(
        learner,
        optim.build(model, "adamw", 0.01, 0.1),
        itertools.repeat(batch),
        steps=range(steps),
        rate=lambda step: 1.0,
        micro_batch=micro_batch,
        max_grad_norm=1.0,
        precision=Precision(torch.device("cpu")),
        stop=lambda: False,
        halved=halved,
    )
    assert len(list(done)) == steps
    return model.model.embed_tokens.weight.detach(), learner.sizes


def test_too_large_a_micro_batch_is_halved_in_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "choices.json").write_text(json.dumps({"micro_batch": 4, "dtype": "fp32"}))
    here = job(tmp_path)
    found, sizes = weights(4, choices.halved(here, PretrainSection()))
    expected, _ = weights(2, None)
    assert torch.equal(found, expected)
    assert sizes == [4, 4] + 2 * [2, 2, 2, 2]
    assert json.loads((tmp_path / "choices.json").read_text()) == {"micro_batch": 2, "dtype": "fp32"}
    assert here.resolved["micro_batch"] == 2


def test_a_micro_batch_that_was_asked_for_is_not_changed() -> None:
    assert choices.halved(job(), PretrainSection(micro_batch_size=8)) is None
    with pytest.raises(torch.OutOfMemoryError):
        weights(4, None)
