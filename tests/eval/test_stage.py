"""`llmctl eval`, through the command line."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import Any

import pytest

from tests.project import Project


def results(project: Project, subject: str = "finetune") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.run / "eval" / subject / "results.json").read_text())
    return found


def samples(project: Project, subject: str = "finetune") -> list[dict[str, Any]]:
    path = project.run / "eval" / subject / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(project: Project, *rows: dict[str, Any], name: str = "sums.jsonl") -> None:
    (project.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.edit("[eval]", f'[eval]\ntasks = ["{name}"]')


# ------------------------------------------------------------------------------------------------------------ figures


def test_it_says_which_weights_it_scored(finished: Project) -> None:
    """litgpt#1357: the wrong weights were evaluated, in silence."""
    digests = {place: hashlib.sha256(finished.weights(place)).hexdigest() for place in ("pretrain", "finetune")}
    columns = results(finished)["columns"]
    assert [column["name"] for column in columns] == ["untrained", "pretrain", "finetune"]
    assert [column["weights"] for column in columns] == ["", digests["pretrain"], digests["finetune"]]
    assert finished.manifest("eval/finetune")["metrics"]["weights_sha256"] == digests["finetune"]
    assert f"weights {digests['finetune'][:8]}" in (finished.run / "logs" / "eval.log").read_text()


def test_the_figures_are_those_of_pretraining(finished: Project) -> None:
    """Two ways to one number: the stage that trained the model scored the same split."""
    column = next(column for column in results(finished)["columns"] if column["name"] == "pretrain")
    made = finished.manifest("pretrain")["metrics"]
    for key in ("val_loss", "val_bits_per_byte", "val_perplexity"):
        assert column["metrics"][key] == pytest.approx(made[key], rel=1e-4)
    metrics = finished.manifest("eval/finetune")["metrics"]
    assert metrics["val_loss_before"] == column["metrics"]["val_loss"]


def test_the_pieces_add_up_to_the_loss(finished: Project) -> None:
    found = results(finished)
    tokens = finished.manifest("prep")["metrics"]["val_tokens"] - 1
    assert math.fsum(found["windows"]) / tokens == pytest.approx(found["columns"][-1]["metrics"]["val_loss"])


def test_answers_stand_beside_their_questions(finished: Project) -> None:
    """A conversation that is passed over must not shift the others' answers."""
    path = finished.path / "chats.jsonl"
    long = [{"prompt": f"{'Tell me more. ' * 12} {index}", "completion": f"No {index}."} for index in range(60)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *long]))
    finished.edit("max_examples = 4", "max_examples = 40")
    assert finished.llmctl("run", "t.toml").code == 0
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    asked |= {row["prompt"]: row["completion"] for row in long}
    found = samples(finished)
    assert found
    for row in found:
        assert asked[row["prompt"]] == row["reference"]
        assert len(row["prompt"]) < 120  # the long ones leave no room for an answer


WATCHED = """
import json, llmctl.inference.answers as answers
ask = answers.ask
def watched(runner, tokenizer, template, conversations, max_new_tokens):
    with open("asked.jsonl", "a") as stream:
        stream.writelines(json.dumps(found.messages) + "\\n" for found in conversations)
    return ask(runner, tokenizer, template, conversations, max_new_tokens)
answers.ask = watched
"""


def test_what_finetuning_learned_from_is_never_asked(finished: Project) -> None:
    """A system message must not move a conversation to the other side of the split, and evaluation asks under it."""
    from llmctl.text.conversations import conversations
    from llmctl.text.sources import is_held_out

    finished.edit("max_steps = 6", 'max_steps = 6\nsystem = "Be brief."\nval_percent = 30')
    finished.edit("max_examples = 4", "max_examples = 40")
    assert finished.llmctl("finetune", "t.toml").code == 0
    assert finished.llmctl("eval", "t.toml", before=WATCHED).code == 0
    asked = [json.loads(line) for line in (finished.path / "asked.jsonl").read_text().splitlines()]
    assert {messages[0]["content"] for messages in asked} == {"Be brief."}
    every = list(conversations("chats.jsonl", finished.path))
    held_out = {found.messages[0]["content"] for found in every if is_held_out(found, 30)}
    assert {messages[1]["content"] for messages in asked} == held_out
    assert finished.manifest("finetune")["metrics"]["conversations"] == len(every) - len(held_out)


def test_chats_that_no_training_saw_are_all_asked(finished: Project) -> None:
    rows = [{"prompt": f"And {index}?", "completion": f"Also {index}."} for index in range(7)]
    (finished.path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished.edit("[eval]\nmax_examples = 4", '[eval]\nmax_examples = 40\nconversations = "test.jsonl"')
    assert finished.llmctl("eval", "t.toml", before=WATCHED).code == 0
    asked = {json.loads(line)[0]["content"] for line in (finished.path / "asked.jsonl").read_text().splitlines()}
    assert asked == {row["prompt"] for row in rows}


def test_a_base_model_is_measured_without_the_chats(finished: Project) -> None:
    """It has no turns: chats that are not here must not stand in its way, nor make its figures stale."""
    assert finished.llmctl("eval", "runs/t/pretrain").code == 0
    (finished.path / "chats.jsonl").unlink()
    done = finished.llmctl("eval", "runs/t/pretrain", "--rebuild")
    assert done.code == 0, done.err


def test_answers_that_were_never_asked_for_are_no_metric(finished: Project) -> None:
    """None of none is not 0 %."""
    finished.edit("max_new_tokens = 8", "max_new_tokens = 64")
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 0, done.err
    assert "answers_ended" not in done.json["metrics"]
    assert done.json["metrics"]["answer_bits_per_byte"] > 0


def test_the_base_model_alone(finished: Project) -> None:
    done = finished.llmctl("eval", "runs/t/pretrain", "--json")
    assert done.code == 0, done.err
    assert [column["name"] for column in results(finished, "pretrain")["columns"]] == ["untrained", "pretrain"]
    assert "answers_ended" not in done.json["metrics"]  # it was never taught to answer


def test_the_exported_model_scores_as_the_model(finished: Project) -> None:
    done = finished.llmctl("eval", "runs/t/export/finetune/onnx-ort", "--json")
    assert done.code == 0, done.err
    metrics = finished.manifest("eval/finetune")["metrics"]
    for key in ("val_loss", "answer_bits_per_byte", "answers_ended"):
        assert done.json["metrics"][key] == pytest.approx(metrics[key], rel=1e-4), key


def test_a_text_of_ones_own(finished: Project) -> None:
    finished.edit("[eval]", '[eval]\ntext = "text/string.py"')
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["val_loss"] != finished.manifest("pretrain")["metrics"]["val_loss"]


# -------------------------------------------------------------------------------------------------------------- tasks


def test_multiple_choice_and_exact_answers(finished: Project) -> None:
    choices = [{"question": f"What is {i} and {i}?", "choices": ["It is.", "1"], "answer": i % 2} for i in range(8)]
    exact = [{"question": f"What is {i}?", "answer": "no model says this"} for i in range(3)]
    questions(finished, *choices)
    (finished.path / "exact.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exact))
    finished.edit('tasks = ["sums.jsonl"]', 'tasks = ["sums.jsonl", "exact.jsonl"]')
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 0, done.err
    metrics = done.json["metrics"]
    assert metrics["exact_accuracy"] == 0.0
    accuracy = metrics["sums_accuracy"]
    assert accuracy * 4 == int(accuracy * 4)  # max_examples = 4 of them were asked
    assert metrics["sums_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 4))


def test_a_task_that_is_all_examples_is_an_error(finished: Project) -> None:
    questions(finished, {"question": "What?", "answer": "That."})
    done = finished.llmctl("eval", "t.toml", "--set", "eval.num_fewshot=1")
    assert done.code == 3
    assert "num_fewshot" in done.err


def test_a_line_of_a_task_that_cannot_be_used_is_named(finished: Project) -> None:
    questions(finished, {"question": "What?", "answer": "That."}, {"question": "Why?"})
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 3
    assert done.json["error"]["line"] == 2


# --------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize(("rule", "code"), [("<99", 0), (">=0.5", 0), ("<0.1", 5), (" > 99 ", 5), ("<=0.1", 5)])
def test_a_gate(finished: Project, rule: str, code: int) -> None:
    """Also where the evaluation is up to date: what CI asks must not depend on who asked first."""
    finished.edit("[export]", f'[eval.require]\nval_bits_per_byte = "{rule}"\n[export]')
    inode = (finished.run / "eval" / "finetune").stat().st_ino
    for command in ("eval", "run"):
        done = finished.llmctl(command, "t.toml", "--json")
        assert done.code == code, done.err
        if code:
            assert "val_bits_per_byte is" in done.json["error"]["message"]
            assert f"required {rule.strip()}" in done.json["error"]["message"]
    assert (finished.run / "eval" / "finetune").stat().st_ino == inode  # nothing was measured again for it


def test_a_gate_that_is_missed_stops_before_the_export(fresh: Project) -> None:
    fresh.edit("[export]", '[eval.require]\nval_bits_per_byte = "<0.1"\n[export]')
    done = fresh.llmctl("run", "t.toml")
    assert done.code == 5
    assert (fresh.run / "eval/finetune/artifact.json").exists()
    assert not (fresh.run / "export").exists()


def test_a_gate_on_a_metric_that_is_not_there(finished: Project) -> None:
    finished.edit("[export]", '[eval.require]\nval_bits = "<0.1"\n[export]')
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 2
    assert "val_bits: the evaluation has no such metric" in done.json["error"]["message"]
    assert "val_bits_per_byte" in done.json["error"]["hint"]


def broken_weights(project: Project, value: float) -> None:
    """A model that says NaN, published as whole as any other."""
    before = (
        "import torch, llmctl.model.hf as hf; save = hf.save\n"
        "def worse(model, *a, **k):\n"
        "    with torch.no_grad(): model.model.norm.weight.mul_({})\n"
        "    return save(model, *a, **k)\n"
        "hf.save = worse"
    ).format(f"float('{value}')")
    done = project.llmctl("finetune", "t.toml", "--rebuild", before=before)
    assert done.code == 0, done.err


def test_a_model_that_says_nan_is_no_success(finished: Project) -> None:
    broken_weights(finished, math.nan)
    done = finished.llmctl("eval", "t.toml", "--json")
    assert done.code == 4, done.err
    assert "no numbers" in done.json["error"]["message"]


# ------------------------------------------------------------------------------------------------------------ baseline


def test_a_regression_is_found_and_itself_is_none(finished: Project) -> None:
    shutil.copytree(finished.run, finished.path / "runs" / "yesterday")
    baseline = "runs/yesterday/eval/finetune"
    same = finished.llmctl("eval", "t.toml", "--baseline", baseline)
    assert same.code == 0, same.err
    assert "not significantly worse than runs/yesterday/eval/finetune" in same.out
    broken_weights(finished, 0.5)
    done = finished.llmctl("eval", "t.toml", "--baseline", baseline, "--json")
    assert done.code == 5
    assert done.json["error"]["code"] == "gate"
    assert "significantly worse than runs/yesterday/eval/finetune: val_loss" in done.json["error"]["message"]


def test_the_baseline_may_be_what_is_replaced(finished: Project) -> None:
    """`--baseline runs/t/eval/finetune` means the evaluation that lies there now, not the one about to be made."""
    broken_weights(finished, 0.5)
    done = finished.llmctl("eval", "t.toml", "--baseline", "runs/t/eval/finetune")
    assert done.code == 5, done.out


@pytest.mark.parametrize("baseline", ["runs/t/pretrain", "runs/nothing/eval/finetune"])
def test_a_baseline_that_is_none_is_refused_before_anything_is_measured(finished: Project, baseline: str) -> None:
    shutil.rmtree(finished.run / "eval")
    assert finished.llmctl("eval", "t.toml", "--baseline", baseline).code == 3
    assert not (finished.run / "eval").exists()


# ------------------------------------------------------------------------------------------------------------- the rest


def test_the_table_in_markdown_has_stdout_for_itself(finished: Project) -> None:
    for _ in range(2):  # made, and up to date
        done = finished.llmctl("eval", "t.toml", "--markdown")
        assert done.code == 0, done.err
        lines = done.out.splitlines()
        assert lines[0] == "|  | untrained | pretrain | finetune |"
        assert lines[1] == "| --- | ---: | ---: | ---: |"
        assert all(line.startswith("| ") and line.count("|") == 5 for line in lines)
        shutil.rmtree(finished.run / "eval")


def test_two_models_with_one_score_are_doubted(finished: Project) -> None:
    """Different weights, the same loss to the last digit: one of them was not really loaded."""
    same = """
from pathlib import Path
import llmctl.model.hf as hf
load = hf.load
hf.load = lambda folder, *a, **k: load(Path("runs/t/pretrain") if folder.name == "finetune" else folder, *a, **k)
"""
    done = finished.llmctl("eval", "t.toml", "--rebuild", before=same)
    assert done.code == 0, done.err
    assert "pretrain and finetune have different weights and exactly the same loss" in done.out
    plain = finished.llmctl("eval", "t.toml", "--rebuild")
    assert "exactly the same loss" not in plain.out


def test_a_model_of_which_nothing_was_said_reads_a_built_in_text(finished: Project) -> None:
    shutil.copytree(
        finished.run / "finetune", finished.path / "hub", ignore=shutil.ignore_patterns("artifact.json", "*.jsonl")
    )
    done = finished.llmctl("eval", "hub", "--json")
    assert done.code == 0, done.err
    assert "scored on the beginning of builtin:python-stdlib" in done.err
    built_in = done.json["metrics"]["val_loss"]
    done = finished.llmctl("eval", "hub", "--set", "eval.text=text", "--json")
    assert done.code == 0, done.err
    assert 0 < done.json["metrics"]["val_loss"] != built_in > 0
