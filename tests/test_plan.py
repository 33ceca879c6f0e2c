"""`llmctl plan`: what it says before prep has run and after, and that the change it names makes the training fit."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from tests.project import Project

GPU = ("--gpu", "h100")


def planned(project: Project, *args: object) -> dict[str, Any]:
    (project.path / "p.toml").write_text(project.recipe.read_text().partition("[finetune]")[0])
    done = project.llmctl("plan", "p.toml", "--run-dir", "runs/t", "--json", *args)
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json["plan"]["pretrain"]
    return found


def test_before_prep_the_unknown_is_named(fresh: Project) -> None:
    found = planned(fresh, *GPU, "--set", "pretrain.epochs=1", "--set", "model.depth=2")
    assert found["steps"] == 12  # max_steps counts
    assert found["unknown"] == []
    whole = fresh.recipe.read_text()
    fresh.edit("max_steps = 12\nglobal_batch_size = 4\n", "")
    found = planned(fresh, *GPU)
    fresh.recipe.write_text(whole)
    assert found["tokens"] is None
    assert found["seconds"] is None
    assert any("steps follow" in line for line in found["unknown"])
    assert found["parameters"] == sum(found["parameters_by_part"].values())
    assert not (fresh.path / "runs" / "t" / "pretrain").exists()


def test_it_is_what_the_training_does(finished: Project) -> None:
    from llmctl.artifact import Artifact

    found, made = planned(finished), Artifact.open(finished.run / "pretrain").metrics
    for key in ("parameters", "steps", "tokens"):
        assert found[key] == made[key], key
    assert found["memory_bytes"] == made["planned_memory_bytes"]
    assert made["memory_bytes"] > 0
    assert found["flops"] == found["flops_per_token"] * found["tokens"]
    told = (finished.run / "logs" / "pretrain.log").read_text()
    assert told.index(" memory ") < told.index(" planned ") < told.index("the same text")


def test_a_time_budget_is_declared_and_what_it_became_recorded(fresh: Project) -> None:
    fresh.edit("max_steps = 12\nglobal_batch_size = 4\ndtype", 'time_budget = "2s"\nglobal_batch_size = 4\ndtype')
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 0, done.err
    assert "time_budget 2s = 1 layers" in done.err
    made = json.loads((fresh.run / "pretrain" / "artifact.json").read_text())
    assert made["sections"]["pretrain"]["time_budget"] == "2s"
    assert made["sections"]["pretrain"]["epochs"] is None
    assert made["environment"]["resolved"]["time_budget"]["depth"] is None  # the recipe says it
    assert made["metrics"]["steps"] > 1
    assert 0.1 < made["metrics"]["seconds"] < 20
    assert "up to date" in fresh.llmctl("pretrain", "t.toml").out


def test_time_is_operations_over_the_rate(fresh: Project) -> None:
    one, eight = planned(fresh, *GPU, "--mfu", "0.5"), planned(fresh, *GPU, "--mfu", "0.5", "--nproc", "8")
    assert one["flops_per_second"] == 0.5 * 989e12
    assert one["seconds"] == pytest.approx(one["flops"] / one["flops_per_second"])
    assert eight["flops_per_second"] == 8 * one["flops_per_second"]
    assert "50 % of the maker's 989 TFLOP/s" in one["rate"]


def of_shape(layers: int, width: int, length: int, *more: str) -> tuple[str, ...]:
    shape = (f"num_hidden_layers={layers}", f"hidden_size={width}", f"max_seq_length={length}")
    return tuple(part for key in (*(f"model.{key}" for key in shape), *more) for part in ("--set", key))


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        (of_shape(3, 1024, 4096, "pretrain.micro_batch_size=32", "pretrain.global_batch_size=32"), "micro_batch_size"),
        (of_shape(8, 2048, 16_384), "activation_checkpointing"),
        (of_shape(8, 4096, 1024), "fsdp"),
    ],
)
def test_the_change_makes_it_fit(fresh: Project, more: tuple[str, ...], kind: str) -> None:
    before = planned(fresh, "--gpu", "t4", *more)
    assert not before["fits"]
    assert kind in before["change"]
    after = planned(fresh, "--gpu", "t4", *more, *shlex.split(before["change"]))
    assert after["fits"], after
    assert after["memory_bytes"] < before["memory_bytes"]


def test_what_is_wrong_is_told(fresh: Project) -> None:
    done = fresh.llmctl("plan", "t.toml", "--gpu", "h1000")
    assert done.code == 2
    assert "h100" in done.err


def test_a_person_reads_a_table(fresh: Project) -> None:
    done = fresh.llmctl("plan", "t.toml", *GPU, "--nproc", "8")
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith(" " * 12) and line[12] != " "]
    assert rows[:6] == ["parameters", "tokens", "operations", "memory", "time", "fits"]
    assert "h100 x 8" in done.out
    assert max(map(len, done.out.splitlines())) < 160
