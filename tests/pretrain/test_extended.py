"""Continued pretraining in another language: the tokenizer learns pieces of it, and the model grows with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.model import hf
from llmctl.text import tokenizer
from llmctl.text.chat import CHATML, ChatTemplate
from llmctl.text.tokenizer import Tokenizer
from tests import shapes
from tests.project import Project
from tests.text.kinds import chinese, english

RECIPE = """\
name = "t"
seed = 3

[prep]
sources = ["zh.txt"]

[prep.tokenizer]
from = "english"
extend = 60

[model]
from = "english"
max_seq_length = 64

[pretrain]
max_steps = 6
global_batch_size = 4
dtype = "fp32"
compile = false
eval_every = 0
log_every = 1
"""


@pytest.fixture
def project(fresh: Project) -> Project:
    """An English model with a template, Chinese text, and a recipe that brings them together."""
    folder = fresh.path
    (folder / "zh.txt").write_text("\n\n".join(chinese() * 2), encoding="utf-8")
    (folder / "english").mkdir()
    pieces = tokenizer.train(english(), "bpe", 700)
    config = shapes.replace(shapes.LLAMA, vocab_size=len(pieces))
    hf.save(hf.random(config, 1), pieces, folder / "english")
    ChatTemplate(CHATML).save(folder / "english")
    (folder / "t.toml").write_text(RECIPE)
    return fresh


def test_a_model_learns_another_language_with_new_pieces(project: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = project.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.out + done.err
    assert "700 + 60 pieces" in done.out
    run = project.run
    prep = json.loads((run / "prep" / "artifact.json").read_text())["metrics"]
    assert (prep["vocab_size"], prep["round_trip"]) == (760, 1.0)
    base, extended = Tokenizer.load(project.path / "english"), Tokenizer.load(run / "pretrain")
    text = "\n\n".join(chinese())
    assert len(extended.encode(text)) < 0.9 * len(base.encode(text))
    made: Any = json.loads((run / "pretrain" / "artifact.json").read_text())["metrics"]
    assert made["steps"] == 6
    losses = [json.loads(line)["train_loss"] for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] < 8  # log(760) is 6.6
    theirs = AutoTokenizer.from_pretrained(run / "pretrain")
    ids = theirs(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :64]
    assert ids[0].tolist() == extended.encode(text)[:64]
    found = AutoModelForCausalLM.from_pretrained(run / "pretrain")(ids).logits
    torch.testing.assert_close(found, hf.load(run / "pretrain")(ids), rtol=1e-4, atol=1e-4)
    assert ChatTemplate.load(run / "pretrain") == ChatTemplate(CHATML)


def test_a_tokenizer_that_is_no_extension_is_refused(project: Project) -> None:
    project.edit('from = "english"\nextend = 60\n', "vocab_size = 400\n")
    done = project.llmctl("pretrain", "t.toml")
    assert done.code == 3
    assert "is not the one of prep's tokens, nor extended by it" in done.err


def test_extending_nothing_is_a_mistake_in_the_recipe(project: Project) -> None:
    project.edit('from = "english"\nextend = 60\n', "extend = 60\n")
    done = project.llmctl("prep", "t.toml")
    assert done.code == 2
    assert "extend adds to another tokenizer" in done.err


def test_an_encoders_text_is_not_said_to_come_back(project: Project, tmp_path: Path) -> None:
    from tests.text import kinds

    made = kinds.bert()
    made.save_pretrained(project.path / "bert")
    project.edit('from = "english"\nextend = 60\n', 'from = "bert"\n')
    done = project.llmctl("prep", "t.toml")
    assert done.code == 0, done.err
    assert "does not give back every text" in done.out
    folder = project.run / "prep"
    metrics = json.loads((folder / "artifact.json").read_text())["metrics"]
    assert metrics["round_trip"] < 1
    assert metrics["bytes"] == len("\n\n".join(chinese() * 2).encode())  # of the source, which bits a byte divide by
    index = json.loads((folder / "index.json").read_text())
    assert (index["bos"], index["eos"]) == (made.cls_token_id, made.sep_token_id)
    done = project.llmctl("pretrain", "t.toml")
    assert done.code == 3
    assert "nor extended by it" in done.err
