"""Encoders and encoder-decoders through every stage they have, by the command line and in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import project
from tests.faults.killing import ARMED
from tests.pretrain.test_stage import rows
from tests.project import Project
from tests.warm import Warm

CUT = project.RECIPE.index("[finetune]"), project.RECIPE.index("[eval]")
FAMILIES = ("modernbert", "t5")


def recipe(family: str) -> str:
    """The project's recipe without what these kinds can't do yet."""
    text = project.RECIPE[: CUT[0]] + project.RECIPE[CUT[1] :]
    return text.replace("depth = 1", f'family = "{family}"\ndepth = 1').replace('"onnx"', '"hf"')


@pytest.fixture(scope="module", params=FAMILIES)
def _made(request: pytest.FixtureRequest, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp(request.param) / "project"
    project.write(folder)
    made = Project(folder, warm)
    made.recipe.write_text(recipe(request.param))
    done = made.llmctl("run", "t.toml")
    assert done.code == 0, done.out + done.err
    return made


@pytest.fixture
def made(_made: Project, tmp_path: Path) -> Project:
    return project.copy(_made, tmp_path / "made")


def is_t5(made: Project) -> bool:
    return 'family = "t5"' in made.recipe.read_text()


# ----------------------------------------------------------------------------------------------------- what is made


def test_the_figures_are_of_hidden_tokens(made: Project) -> None:
    """No bits per byte and no compressors: a model that sees the rest of the text compresses nothing."""
    trained, scored = (made.manifest(place)["metrics"] for place in ("pretrain", "eval/pretrain"))
    assert not [name for name in (*trained, *scored) if "bits" in name or "perplexity" in name]
    assert 0 < trained["val_loss"] < 5.99  # ln(400): better than knowing nothing
    assert 0 <= trained["val_accuracy"] < 0.5
    for name in ("val_loss", "val_accuracy"):
        assert scored[name] == pytest.approx(trained[name], rel=1e-6)  # the same masks, the same text
    results = json.loads((made.run / "eval/pretrain/results.json").read_text())
    assert [column["name"] for column in results["columns"]] == ["pretrain"]
    assert len(results["windows"]) == (made.manifest("prep")["metrics"]["val_tokens"] - 1) // 64


def test_samples_show_what_was_hidden_and_what_was_said(made: Project) -> None:
    found = rows(made, "pretrain", "samples.jsonl")
    assert found
    for sample in found:
        assert ("<extra_id_0>" if is_t5(made) else "<mask>") in sample["prompt"]
        assert "<mask>" not in sample["text"]


def test_a_prompt_may_say_what_is_hidden(made: Project) -> None:
    mark = "<extra_id_0>" if is_t5(made) else "<mask>"
    asked = f"def add(self):{mark}return self"
    done = made.llmctl("pretrain", "t.toml", "--rebuild", "--set", f'pretrain.prompts=["{asked}"]')
    assert done.code == 0, done.err
    assert rows(made, "pretrain", "samples.jsonl")[-1]["prompt"] == asked


@pytest.mark.parametrize("place", ["pretrain", "export/pretrain/hf"])
def test_transformers_takes_the_folder_and_says_the_same(made: Project, place: str) -> None:
    """The same logits (1e-4 in fp32) from the matching Auto classes, and the same ids."""
    transformers = pytest.importorskip("transformers")
    from llmctl.model import hf
    from llmctl.text.tokenizer import Tokenizer

    folder = made.run / place
    ours, tokenizer = hf.load(folder), Tokenizer.load(folder)
    auto = transformers.AutoModelForSeq2SeqLM if is_t5(made) else transformers.AutoModelForMaskedLM
    theirs = auto.from_pretrained(folder, dtype=torch.float32).eval()
    text = (made.path / "text" / "textwrap.py").read_text()[1000:1060]
    ids = torch.tensor([tokenizer.prompt(text)])
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert their_tokenizer(text)["input_ids"] == ids[0].tolist()
    inputs = (ids, ids[:, :9]) if is_t5(made) else (ids,)
    with torch.inference_mode():
        said = theirs(ids, decoder_input_ids=ids[:, :9]) if is_t5(made) else theirs(ids)
        torch.testing.assert_close(ours(*inputs), said.logits, rtol=0, atol=1e-4)
    if not is_t5(made):
        assert their_tokenizer.mask_token == "<mask>"


def test_the_card_names_the_class_and_the_task(made: Project) -> None:
    card = (made.run / "export/pretrain/hf/README.md").read_text()
    auto, task = (
        ("AutoModelForSeq2SeqLM", "text2text-generation") if is_t5(made) else ("AutoModelForMaskedLM", "fill-mask")
    )
    assert f"pipeline_tag: {task}" in card
    assert f"from transformers import {auto}, AutoTokenizer" in card
    assert "vllm" not in card
    assert "causal" not in card.lower()


def test_the_report_and_the_status_know_it(made: Project) -> None:
    assert made.llmctl("report", "runs/t").code == 0
    page = (made.run / "report.html").read_text()
    assert "hidden tokens" in page
    assert "bits/byte" not in page
    assert "% of hidden tokens right" in made.llmctl("status").out


def test_a_model_from_elsewhere_goes_on_learning(made: Project) -> None:
    """`[model] from`: the objective follows from what was brought in, whatever family the recipe would take."""
    shutil.copytree(made.run / "export/pretrain/hf", made.path / "base")
    family = "t5" if is_t5(made) else "modernbert"
    made.edit(f'family = "{family}"\ndepth = 1\nmax_seq_length = 64', 'from = "base"')
    made.edit('name = "t"', 'name = "further"')
    made.edit("vocab_size = 400", 'from = "base"')
    done = made.llmctl("run", "t.toml", "--json")
    assert done.code == 0, done.err
    assert list(done.json["stages"]) == ["prep", "import", "pretrain", "eval/pretrain", "export/pretrain/hf"]
    after = json.loads((made.path / "runs/further/pretrain/artifact.json").read_text())["metrics"]
    assert after["val_loss"] < made.manifest("pretrain")["metrics"]["val_loss"]


def test_two_evaluations_compare_window_by_window(made: Project) -> None:
    shutil.copytree(made.run, made.path / "runs" / "yesterday")
    done = made.llmctl("eval", "t.toml", "--baseline", "runs/yesterday/eval/pretrain")
    assert done.code == 0, done.err
    assert "not significantly worse" in done.out


# ------------------------------------------------------------------------------------------------- stopped and killed


def test_killed_and_run_again_it_is_the_same_to_the_last_bit(made: Project) -> None:
    whole = made.weights()
    shutil.rmtree(made.run / "pretrain")
    kills = 0
    for point in (25, 60, 35, 90):
        done = made.llmctl("pretrain", "t.toml", before=ARMED.format(point=point))
        assert done.code in (0, -9), done.err
        kills += done.code == -9
    assert kills >= 2
    done = made.llmctl("pretrain", "t.toml")
    assert done.code == 0, done.err
    assert made.weights() == whole


# -------------------------------------------------------------------------------------------------------------- errors


def failing(made: Project, *args: str) -> dict[str, Any]:
    done = made.llmctl(*args, "--json")
    assert done.code in (2, 3), done.out + done.err
    error: dict[str, Any] = done.json["error"]
    return error


def test_what_is_not_built_yet_says_so(made: Project) -> None:
    kind = "encoder-decoder" if is_t5(made) else "encoder"
    shutil.copytree(made.run / "pretrain", made.path / "base")
    error = failing(made, "export", "base", "--onnx", "--quantize", "int4")
    assert kind in error["message"]
    assert "without --quantize" in error["hint"]
    made.recipe.write_text('name = "u"\n[model]\nfrom = "base"\n[finetune]\nsources = ["chats.jsonl"]\n')
    error = failing(made, "finetune", "t.toml")
    assert kind in error["message"]
    assert "[finetune]" in error["hint"]


def test_questions_are_not_for_it(made: Project) -> None:
    (made.path / "q.jsonl").write_text('{"question": "What?", "answer": "That."}\n')
    error = failing(made, "eval", "t.toml", "--set", "eval.tasks=q.jsonl")
    assert "questions are for a model that answers" in error["message"]
    assert "[eval] tasks" in error["hint"]


def test_a_context_with_more_spans_than_sentinels(warm: Warm, tmp_path: Path) -> None:
    project.write(tmp_path / "p")
    made = Project(tmp_path / "p", warm)
    made.recipe.write_text(recipe("t5").replace("max_seq_length = 64", "max_seq_length = 700"))
    error = failing(made, "pretrain", "t.toml")
    assert "hides 35 spans" in error["message"]
    assert "max_seq_length = 649 or less" in error["hint"]
