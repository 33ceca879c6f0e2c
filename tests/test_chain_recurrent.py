"""The recurrent baseline through every stage, from text to an exported model that answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmctl.model import hf
from llmctl.model.lstm import LSTM
from tests import project
from tests.project import STAGES, Project
from tests.warm import Warm

# Ctrl-C in the middle of the sixth step, sent by the training itself.
INTERRUPTED = """
import os, signal, llmctl.training.objectives as o
loss, calls = o.loss, 0
def stopped(*args, **more):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return loss(*args, **more)
o.loss = stopped
"""


@pytest.fixture(scope="module")
def _whole(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("recurrent") / "project"
    project.write(folder)
    made = Project(folder, warm)
    made.edit("depth = 1", 'family = "lstm"\ndepth = 2\ndropout = 0.1')
    done = made.llmctl("run", "t.toml", "-v")
    assert done.code == 0, done.out + done.err
    assert "hidden_size 160 = a transformer's width x sqrt(12/8" in done.out
    assert "learning_rate 0.03 = 0.024 x sqrt(256 / width)" in done.out  # six times a transformer's
    return made


@pytest.fixture
def whole(_whole: Project, tmp_path: Path) -> Project:
    """A copy of a project whose whole chain has run."""
    return project.copy(_whole, tmp_path / "whole")


def test_every_stage_is_made_and_gated(whole: Project) -> None:
    assert set(whole.identities()) == set(STAGES)
    assert not any(stage != "up to date" for stage in whole.states().values())
    model = hf.load(whole.run / "finetune")
    assert isinstance(model, LSTM)
    trained, scored = (whole.manifest(place)["metrics"] for place in ("pretrain", "eval/finetune"))
    assert trained["parameters"] == sum(tensor.numel() for tensor in model.parameters())
    assert trained["val_loss"] < 5.5  # log(400) is 5.99
    assert scored["val_bits_per_byte"] > 0
    assert whole.manifest("export/finetune/onnx-ort")["metrics"]["parity_error"] < 1e-5


def test_both_runtimes_answer_alike(whole: Project) -> None:
    said = [
        whole.llmctl("chat", place, "-p", "What is 4 and 4?", "--temperature", "0", "--max-tokens", "20")
        for place in ("runs/t/export/finetune/onnx-ort", "runs/t/finetune")
    ]
    assert [done.code for done in said] == [0, 0], said[0].err + said[1].err
    assert said[0].out == said[1].out


def test_going_on_after_a_signal_is_bitwise(whole: Project) -> None:
    """Dropout and the data's order included; in pretrain and in finetune."""
    for place in ("pretrain", "finetune"):
        kept = whole.weights(place)
        shutil.rmtree(whole.run / place)
        done = whole.llmctl(place, "t.toml", before=INTERRUPTED)
        assert done.code == 130, done.out + done.err
        done = whole.llmctl(place, "t.toml")
        assert done.code == 0, done.err
        assert "resuming at step" in done.out
        assert whole.weights(place) == kept


def test_what_an_lstm_has_not_is_refused_before_anything_is_made(fresh: Project) -> None:
    fresh.edit("depth = 1", 'family = "lstm"\ndepth = 1')
    for setting, message in (
        ('finetune.method="lora"', "no projections"),
        ('export.formats=["hf"]', "no other tool"),
        ("model.num_attention_heads=2", "lstm has no such thing"),
    ):
        done = fresh.llmctl("run", "t.toml", "--set", setting, "--json")
        assert done.code == 2, done.out
        assert message in done.json["error"]["message"]
    assert not fresh.run.exists()


def test_lora_on_a_model_that_turns_out_to_be_an_lstm(whole: Project) -> None:
    shutil.copytree(whole.run / "pretrain", whole.path / "base")
    whole.edit('family = "lstm"\ndepth = 2\ndropout = 0.1\nmax_seq_length = 64', 'from = "base"')
    whole.edit('sources = ["chats.jsonl"]', 'sources = ["chats.jsonl"]\nmethod = "lora"')
    done = whole.llmctl("finetune", "t.toml", "--run-dir", "runs/adapted", "--json")
    assert done.code == 2, done.out
    assert "an LSTM has none" in done.json["error"]["message"]
