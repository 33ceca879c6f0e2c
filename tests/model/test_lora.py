"""LoRA: starts at the base, trains only its own matrices, and merges without a difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmctl.errors import RecipeError
from llmctl.model import lora
from llmctl.model.families import FAMILIES
from llmctl.model.transformer import Decoder
from tests.shapes import LLAMA, SHAPES

IDS = torch.arange(60).remainder(97).view(2, 30)


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Decoder:
    return Decoder.random(SHAPES[request.param], 0)


def test_merged_equals_unmerged(model: Decoder) -> None:
    names, before = list(model.state_dict()), model(IDS)
    lora.apply(model, r=4, alpha=8, targets=("all-linear",), seed=1)
    assert torch.equal(model(IDS), before)  # B is zero: training starts at the base
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=5.0)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    unmerged = model(IDS)
    merged = lora.merge(model)
    assert (unmerged - before).abs().max() > 0.01
    torch.testing.assert_close(merged(IDS), unmerged, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == names
    assert all(weight.requires_grad for weight in merged.parameters())


def test_only_the_adapter_is_trained(model: Decoder) -> None:
    lora.apply(model, r=2, alpha=4, targets=("q_proj", "v_proj"), seed=1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {
        f"model.layers.{layer}.self_attn.{target}.{part}.weight"
        for layer in range(3) for target in ("q_proj", "v_proj") for part in ("lora_A", "lora_B")
    }  # fmt: skip


def test_the_seed_draws_the_adapter() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = Decoder.random(SHAPES["llama"], 0)
        lora.apply(model, r=2, alpha=4, targets=("q_proj",), seed=seed)
        return lora.adapter_state(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    ("r", "targets", "named"), [(4, ("q_prj",), "q_prj"), (4, (), "nothing"), (0, ("q_proj",), "lora_r")]
)
def test_mistakes_are_named(r: int, targets: tuple[str, ...], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        lora.apply(Decoder.random(SHAPES["llama"], 0), r=r, alpha=8, targets=targets, seed=0)


def test_a_family_that_peft_adapts_otherwise_is_refused() -> None:
    gpt2 = replace(LLAMA, family="gpt2", **FAMILIES["gpt2"].switches)
    with pytest.raises(RecipeError, match="gpt2 stores its projections"):
        lora.apply(Decoder.random(gpt2, 0), r=2, alpha=8, targets=("q_proj",), seed=0)
