"""`derive` fills in what the recipe leaves open, says how, and refuses what no decoder can be."""

from __future__ import annotations

from typing import Any

import pytest

from llmctl.errors import RecipeError
from llmctl.model import config as shapes
from llmctl.model.transformer import Decoder
from llmctl.recipe import ModelSection
from tests.shapes import SHAPES


def derive(**keys: Any) -> tuple[shapes.Config, list[str]]:
    return shapes.derive(ModelSection(**keys), vocab_size=512)


@pytest.mark.parametrize(
    ("depth", "width", "heads", "inner"), [(1, 64, 2, 192), (3, 128, 2, 384), (6, 256, 4, 704), (12, 512, 8, 1408)]
)
def test_depth_derives_the_rest(depth: int, width: int, heads: int, inner: int) -> None:
    config, formulas = derive(depth=depth)
    assert (config.num_hidden_layers, config.hidden_size) == (depth, width)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (heads, heads, inner)
    assert config.head_dim == width // heads
    assert any(f"hidden_size {width}" in line and "128 x depth / 3" in line for line in formulas)
    assert len(formulas) == 6  # one for each value that was not given


def test_nothing_said_is_depth_4() -> None:
    config, formulas = derive()
    assert config == derive(depth=4)[0]
    assert formulas[0] == "depth 4 = what is taken if nothing is said"


def test_what_is_given_is_kept_and_not_called_derived() -> None:
    given = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    config, formulas = derive(family="llama", intermediate_size=200, rope_theta=5e5, tie_word_embeddings=False, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.head_dim, config.rope_theta, config.tie_word_embeddings) == (16, 5e5, False)
    assert formulas == ["head_dim 16 = hidden_size / num_attention_heads"]


def test_heads_may_be_wider_than_the_model() -> None:
    config, _ = derive(hidden_size=64, num_hidden_layers=1, num_attention_heads=3, head_dim=64)
    assert config.num_attention_heads * config.head_dim == 192


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads = 3 does not divide hidden_size = 100"),
        ({"hidden_size": 100}, "head_dim = 32 does not divide hidden_size = 100"),
        ({"hidden_size": 96, "head_dim": 7, "num_attention_heads": 4}, "head_dim = 7 is odd"),
        ({"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ],
)
def test_impossible_shapes_name_the_key(keys: dict[str, int], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        derive(depth=2, **keys)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted(name: str) -> None:
    model = Decoder.random(SHAPES[name], 0)
    assert SHAPES[name].parameters == sum(weight.numel() for weight in model.parameters())
