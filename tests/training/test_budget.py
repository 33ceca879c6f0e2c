"""A time budget: which depth, how many tokens, and that the choice is made once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmctl.device import Device
from llmctl.errors import RecipeError
from llmctl.model.config import derive
from llmctl.recipe import ModelSection, of
from llmctl.training import budget, planning, watching

UNLIMITED = 10**12


def depth(flops: float, unique: int = UNLIMITED) -> int:
    found, config = budget.best(ModelSection(max_seq_length=128), 1000, flops, unique)
    assert found == config.num_hidden_layers
    return config.num_hidden_layers


def test_more_time_makes_a_larger_model() -> None:
    depths = [depth(flops) for flops in (1e12, 1e14, 1e16, 1e18)]
    assert depths == sorted(depths)
    assert depths[0] == budget.DEPTHS[0] < depths[-1]


def test_the_law_is_chinchillas() -> None:
    """A compute-optimal model has some 20 tokens a parameter (Hoffmann et al. 2022, Besiroglu et al. 2024)."""
    _, config = budget.best(ModelSection(max_seq_length=128), 32_000, 1e19, UNLIMITED)
    tokens = 1e19 / watching.flops_per_token(config, config.longest)
    assert 10 < tokens / config.parameters < 40


def test_text_read_again_is_worth_less() -> None:
    config, _ = derive(ModelSection(depth=4, max_seq_length=128), 1000)
    once = watching.flops_per_token(config, config.longest) * 1e6
    losses = [
        budget.loss(config, once * epochs, 10**6) - budget.loss(config, once * epochs, UNLIMITED)
        for epochs in (1, 4, 40)
    ]
    assert losses[0] == 0
    assert 0 < losses[1] < 0.2 * losses[2]


def test_what_the_recipe_says_stays() -> None:
    assert budget.best(ModelSection(depth=5), 1000, 1e12, UNLIMITED)[0] is None
    assert budget.best(ModelSection(depth=5), 1000, 1e12, UNLIMITED)[1].num_hidden_layers == 5


@pytest.mark.parametrize("end", ["max_steps = 10", "epochs = 2"])
def test_two_ends_are_an_error(end: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[prep]\nsources = ["x"]\n[pretrain]\ntime_budget = "30m"\n{end}\n')
    from llmctl import recipe as reading

    with pytest.raises(RecipeError, match="time_budget"):
        reading.load(recipe)


def test_the_choice_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "_gemm", lambda job, dtype: 1e11)
    speeds = iter([4e10, 9e10])
    monkeypatch.setattr(budget, "_measure", lambda *_: next(speeds))
    section = {"time_budget": "10m", "compile": False, "dtype": "fp32"}
    recipe = of(
        {"name": "t", "model": {"max_seq_length": 64}, "prep": {"sources": ["x"]}, "pretrain": section},
        (),
        tmp_path / "t.toml",
    )
    declared = recipe.section("pretrain").declared()
    job: Any = budget_job(tmp_path, recipe)
    settled = budget.settle(job, 1000, unique=10**6)
    model, training = settled.recipe.section("model"), settled.recipe.section("pretrain")
    told = capsys.readouterr().out
    config, _ = derive(model, 1000)
    made = planning.make(training, sequences=10**6 // 64, length=64, width=config.hidden_size, peak=1e-3)
    seconds = made.tokens * watching.flops_per_token(config, 64) / 4e10
    assert seconds == pytest.approx(600 * (1 - budget.BETWEEN), rel=0.02)  # a whole number of steps
    assert f"time_budget 10m = {model.depth} layers" in told
    assert "epochs: past 4" in told  # a million tokens are little for ten minutes
    assert budget.settle(job, 1000, unique=10**6).recipe == settled.recipe  # the second speed is never asked for
    assert recipe.section("pretrain").declared() == declared
    assert (
        job.resolved["time_budget"]["depth"]
        == model.depth
        == json.loads((tmp_path / "budget.json").read_text())["depth"]
    )


def budget_job(work: Path, recipe: Any) -> Any:
    import dataclasses

    from llmctl.artifact import Job

    fields: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Job)), None)
    fields |= {"recipe": recipe, "inputs": {}, "device": Device("cpu", "cpu", 1, frozenset()), "resolved": {}}
    run = SimpleNamespace(work=lambda place: work)
    return Job(**{**fields, "run": run, "place": "pretrain"})
