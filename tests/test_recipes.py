"""Every recipe in recipes/: it loads, it says what it means, and editors accept it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmctl import chain, recipe
from llmctl.artifact import Run
from tests.test_recipe import accepts

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))


def test_there_are_recipes() -> None:
    assert {path.name for path in RECIPES} >= {"tiny.toml", "small.toml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path: Path, tmp_path: Path) -> None:
    made = recipe.load(path)
    assert made.name == path.stem
    assert chain.steps(made, Run(tmp_path / "runs" / made.name))
    schema = recipe.json_schema()
    assert accepts(schema, tomllib.loads(path.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads_as_it_was_resolved(path: Path, tmp_path: Path) -> None:
    made = recipe.load(path)
    kept = tmp_path / "recipe.resolved.toml"
    kept.write_text(recipe.resolved(made, []), encoding="utf-8")
    again = recipe.load(kept)
    assert all(getattr(again, name) == getattr(made, name) for name in ("name", "seed", *recipe.SECTIONS))


# What a run has to reach: a little above what it does.
REACHED = {
    "lstm.toml": ("val_bits_per_byte", 2.6),
    "encoder.toml": ("val_loss", 3.8),  # 6.93 before the first step, 5.4 by knowing how often each piece occurs
    "seq2seq.toml": ("val_loss", 3.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    """Every stage of it, on built-in text; tests/test_chain_end_to_end.py runs tiny.toml."""
    command = [sys.executable, "-m", "llmctl", "run", str(FOLDER / name), "--run-dir", "runs/r", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["stages"]
    assert all(stage["made"] for stage in made.values())
    trained = json.loads((tmp_path / "runs/r/pretrain/artifact.json").read_text())["metrics"]
    metric, most = REACHED[name]
    assert trained[metric] < most


@pytest.mark.slow
def test_shakespeare_learns_characters(shared_data: Path, tmp_path: Path) -> None:
    """The baseline of docs/benchmarks.md ends at 1.900; how long it takes is told there."""
    text = shared_data / "text" / "tinyshakespeare" / "input.txt"
    command = [sys.executable, "-m", "llmctl", "pretrain", str(FOLDER / "shakespeare.toml"), "--json"]
    command += ["--set", f'prep.sources=["{text}"]']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["val_loss"] < 1.89  # 1.869 in bf16
