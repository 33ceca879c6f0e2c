"""Which parameter is optimised how, and the learning rate over time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmctl.model.transformer import Decoder
from llmctl.training import optim
from tests.shapes import SHAPES


def groups(kind: str, tied: bool = True) -> dict[str, tuple[str, float]]:
    """Parameter -> (optimiser, weight decay)."""
    model = Decoder.random(replace(SHAPES["qwen3"], tie_word_embeddings=tied), seed=1)
    names = {id(p): name for name, p in model.named_parameters()}
    made = optim.build(model, kind, 0.01, 0.1)  # type: ignore[arg-type]
    found = [
        (names[id(p)], (type(optimizer).__name__, group["weight_decay"]))
        for optimizer in made
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)  # each exactly once
    return dict(found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_matrices_decay_and_nothing_else(kind: str, tied: bool) -> None:
    for name, (optimizer, decay) in groups(kind, tied).items():
        matrix = name.endswith("_proj.weight")
        assert decay == (0.1 if matrix else 0.0), name
        assert optimizer == ("Muon" if matrix and kind == "muon" else "AdamW"), name


def test_frozen_parameters_are_left_out() -> None:
    model = Decoder.random(SHAPES["llama"], seed=1)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    made = optim.build(model, "muon", 0.01, 0.1)
    assert [p is model.model.norm.weight for group in made[0].param_groups for p in group["params"]] == [True]
    assert len(made) == 1


def test_ten_steps_equal_torchs_own_adamw() -> None:
    ours, theirs = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = optim.build(ours, "adamw", 0.01, 0.1)[0]
    reference = torch.optim.AdamW(theirs.parameters(), 0.01, optim.BETAS, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(4, 8, generator=generator)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)


def test_muon_moves_a_matrix_as_far_as_adamw_would() -> None:
    """Moonlight's scaling: an update has a root mean square of about 0.2 learning rates, whatever the shape."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
        before = layer.weight.detach().clone()
        optimizer = optim.build(layer, "muon", 0.01, 0.0)[0]
        layer.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        moved = float((layer.weight.detach() - before).square().mean().sqrt()) / 0.01
        assert 0.12 < moved < 0.28, shape


def test_the_rate_is_a_share_of_each_groups_peak() -> None:
    made = optim.build(Decoder.random(SHAPES["llama"], seed=1), "muon", 0.01, 0.1)
    for factor in (0.5, 0.1, 1.0):
        optim.set_rate(made, factor)
        assert {group["lr"] for optimizer in made for group in optimizer.param_groups} == {0.01 * factor}


def share(step: int, kind: str, floor: float = 0.0, warmup: int = 10) -> float:
    return optim.schedule(step, kind=kind, steps=100, warmup=warmup, decay_ratio=0.4, floor=floor)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_never_zero(kind: str) -> None:
    assert [share(step, kind) for step in range(10)] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert share(10, kind) == pytest.approx(1.0)


def test_cosine() -> None:
    assert share(55, "cosine") == pytest.approx(0.5)
    assert share(99, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert share(99, "cosine", floor=0.1) > 0.1


def test_warm_up_stable_decay() -> None:
    assert [share(step, "wsd") for step in (10, 30, 60)] == [1.0, 1.0, 1.0]
    assert share(80, "wsd") == pytest.approx(0.5)
    assert share(99, "wsd") == pytest.approx(0.025)
    assert share(99, "wsd", floor=0.1) == pytest.approx(0.1 + 0.9 * 0.025)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_a_rate_is_a_share_in_every_run_however_short(kind: str, steps: int) -> None:
    for warmup in (0, 1, steps, steps + 5):
        found = [
            optim.schedule(step, kind=kind, steps=steps, warmup=warmup, decay_ratio=0.4, floor=0.0)
            for step in range(steps)
        ]
        assert all(0 < value <= 1 for value in found)
