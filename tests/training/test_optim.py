"""Which parameter is optimised how, and the learning rate over time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmctl.model.transformer import Decoder
from llmctl.training import muon, optim
from tests.shapes import SHAPES


def groups(kind: str, tied: bool = True) -> dict[str, tuple[str, float]]:
    """Parameter -> (optimiser, weight decay)."""
    model = Decoder.random(replace(SHAPES["qwen3"], tie_word_embeddings=tied), seed=1)
    names = {id(p): name for name, p in model.named_parameters()}
    made = optim.build(model, kind, 0.01, 0.1)  # type: ignore[arg-type]
    found = [
        (names[id(p)], (type(optimizer).__name__, group.get("decay", group["weight_decay"])))
        for optimizer in made
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)  # each exactly once
    return dict(found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_matrices_decay_and_nothing_else(kind: str, tied: bool) -> None:
    for name, (optimizer, decay) in groups(kind, tied).items():
        matrix = name.endswith("_proj.weight")
        assert decay == (0.1 if matrix else 0.0), name
        expected = {"muon": "Muon" if matrix else "AdamW", "adamw": "AdamW", "sgd": "SGDW"}[kind]
        assert optimizer == expected, name


def test_heads_of_tasks_do_not_decay() -> None:
    model = torch.nn.ModuleDict({"head": torch.nn.ModuleDict({"classifier": torch.nn.Linear(8, 2)})})
    made = optim.build(model, "muon", 0.01, 0.1)
    assert [(type(optimizer), group["weight_decay"]) for optimizer in made for group in optimizer.param_groups] == [
        (torch.optim.AdamW, 0.0)
    ]


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_biases_of_distances_have_a_rate_of_their_own(kind: Any) -> None:
    """They are added to logits: at AdamW's usual rate a short training leaves them near zero."""
    model = torch.nn.Module()
    model.relative_bias, model.q_proj = torch.nn.Embedding(4, 2), torch.nn.Linear(8, 8)
    made = optim.build(model, kind, 0.01, 0.1)
    optim.set_rate(made, 0.5)
    rates = {id(p): group["lr"] for optimizer in made for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.relative_bias.weight)] == pytest.approx(0.005 if kind == "sgd" else 0.2)
    assert {rates[id(p)] for p in model.q_proj.parameters()} == {0.005}
    assert made[0].param_groups[0]["lr"] == 0.005  # the one that is shown


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
    reference = torch.optim.AdamW(theirs.parameters(), 0.01, (0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(4, 8, generator=generator)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)


def test_sgd_is_torchs_with_a_decay_that_knows_no_learning_rate() -> None:
    ours, theirs = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = optim.build(ours, "sgd", 0.01, 0.2)
    reference = torch.optim.SGD(theirs.parameters(), 0.01, 0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for share in (0.5, 1.0, 0.75, 0.25):
        x = torch.randn(4, 8, generator=generator)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().sum().backward()
        optim.set_rate(mine, share)
        mine[0].step()
        reference.param_groups[0]["lr"] = 0.01 * share
        with torch.no_grad():
            theirs.weight *= 1 - 0.2 * share
        reference.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_decay_that_is_not_given_is_the_methods() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    for kind in ("muon", "adamw"):
        assert optim.build(layer, kind, 0.01)[0].param_groups[0]["weight_decay"] == 0.1
    assert optim.build(layer, "sgd", 0.01)[0].param_groups[0]["decay"] == 2e-4


@pytest.mark.parametrize(
    ("dtype", "products"), [("bf16", torch.bfloat16), ("fp16", torch.float32), ("fp32", torch.float32)]
)
def test_muon_multiplies_in_what_the_hardware_does_fast(
    dtype: str, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.extend(matrix.dtype for matrix in matrices)
        return matrices

    monkeypatch.setattr(muon, "orthogonal", watched)
    layer = torch.nn.Linear(8, 8, bias=False)
    layer.weight.grad = torch.ones(8, 8)
    optim.build(layer, "muon", 0.01, dtype=dtype)[0].step()
    assert seen == [products]


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


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_never_zero(kind: str) -> None:
    assert [share(step, kind) for step in range(10)] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert share(10, kind) == pytest.approx(1.0)


def test_cosine() -> None:
    assert share(55, "cosine") == pytest.approx(0.5)
    assert share(99, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert share(99, "cosine", floor=0.1) > 0.1


def test_linear() -> None:
    assert [share(step, "linear") for step in (10, 55, 99)] == pytest.approx([1, 0.5, 1 / 90])
    assert share(55, "linear", floor=0.1) == pytest.approx(0.55)


def test_inverse_square_root() -> None:
    """Vaswani et al.'s formula as a share of its peak; a floor is where it stays."""
    for step in range(100):
        number, warmup = step + 1, 11
        noam = min(number**-0.5, number * warmup**-1.5) / warmup**-0.5
        assert share(step, "inverse_sqrt") == pytest.approx(noam)
        assert share(step, "inverse_sqrt", floor=0.5) == pytest.approx(noam if step < 10 else max(0.5, noam))


def test_a_decay_longer_than_what_follows_the_warm_up_does_not_leap() -> None:
    found = [optim.schedule(s, kind="wsd", steps=20, warmup=15, decay_ratio=1.0, floor=0.0) for s in range(20)]
    assert found[15:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_warm_up_stable_decay() -> None:
    assert [share(step, "wsd") for step in (10, 30, 60)] == [1.0, 1.0, 1.0]
    assert share(80, "wsd") == pytest.approx(0.5)
    assert share(99, "wsd") == pytest.approx(0.025)
    assert share(99, "wsd", floor=0.1) == pytest.approx(0.1 + 0.9 * 0.025)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_a_rate_is_a_share_in_every_run_however_short(kind: str, steps: int) -> None:
    for warmup in (0, 1, steps, steps + 5):
        found = [
            optim.schedule(step, kind=kind, steps=steps, warmup=warmup, decay_ratio=0.4, floor=0.0)
            for step in range(steps)
        ]
        assert all(0 < value <= 1 for value in found)
