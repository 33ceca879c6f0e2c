"""What a training decides once and keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmctl import console
from llmctl.device import Device
from llmctl.model.transformer import Decoder
from llmctl.recipe import PretrainSection
from llmctl.training import choices, planning
from llmctl.training.choices import Choices
from llmctl.training.objectives import Learner
from tests.shapes import SHAPES
from tests.test_artifact import job


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    console.configure()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(deterministic)


def chosen(folder: Path, device: Device, micro_batch: int = 4, **keys: object) -> Choices:
    work = job(folder, "pretrain")
    work.device = device
    section = PretrainSection.model_validate(keys)
    plan = planning.make(section, sequences=800, length=16, width=64, peak=1e-3)
    return choices.choose(work, section, LEARNER, dataclasses.replace(plan, batch=8, micro_batch=micro_batch))[0]


LEARNER = Learner(Decoder.random(SHAPES["qwen3"], seed=1))
HERE, THERE = Device("cpu", "here", 1, frozenset({"avx2"})), Device("cpu", "there", 2, frozenset({"avx512_bf16"}))


def test_choices_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed on another machine, it goes on as it began, and says that it may not be bitwise the same."""
    first = chosen(tmp_path, HERE)
    assert (first.dtype, first.threads, first.micro_batch) == ("fp32", 1, 4)
    assert chosen(tmp_path, HERE) == first
    assert capsys.readouterr().out == ""
    assert chosen(tmp_path, THERE, micro_batch=8) == first
    assert "warning: this run was begun on another machine" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


def test_a_micro_batch_that_is_asked_for_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who ran out of memory must be able to go on with less of it."""
    chosen(tmp_path, HERE, 8)
    assert chosen(tmp_path, HERE, 2, micro_batch_size=2).micro_batch == 2
    assert "micro_batch_size 8 -> 2" in capsys.readouterr().out
    assert chosen(tmp_path, HERE, 8).micro_batch == 8


def test_choices_that_cannot_be_read_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = chosen(tmp_path, HERE)
    path = job(tmp_path, "pretrain").work / "choices.json"
    for text in ("", "{}", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert chosen(tmp_path, HERE) == first
        assert "cannot be read" in capsys.readouterr().out


def test_choices_are_plain_and_shown() -> None:
    made = Choices("bf16", "amx_bf16", 0, "torch.compile", 2, 8, ("amx_bf16",))
    assert made.describe() == "bf16 (amx_bf16) · torch.compile"
    assert made.autocast
    assert not dataclasses.replace(made, dtype="fp32").autocast
