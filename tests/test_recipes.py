"""Every recipe in recipes/: it loads, it says what it means, and editors accept it."""

from __future__ import annotations

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
