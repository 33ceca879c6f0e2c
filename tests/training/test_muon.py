"""Muon in batches, against torch's own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.optim import Muon as Torchs

from llmctl.training import muon
from llmctl.training.muon import Muon, orthogonal

SHAPES = ((24, 24), (24, 40), (40, 24), (24, 24), (1, 24), (40, 24), (24, 40))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) / 5) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter], steps: int = 10, seed: int = 1) -> None:
    """Gradients that follow from the weights, as in training: a difference would grow."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in weights:
            p.grad = p.detach().sin() + torch.randn(p.shape, generator=generator)
        optimizer.step()


def furthest(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def torchs(weights: list[nn.Parameter]) -> Torchs:
    return Torchs(weights, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("stacked", [1, 3 * 24 * 40, 2**19])
def test_ten_steps_equal_torchs_own(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 keeps 8 bits, and a stack's product may add up in another order than a single one's (here it doesn't): the
    tolerance is four roundings of an update, 0.2 x 0.01 x sqrt(40) at most."""
    monkeypatch.setattr(muon, "STACKED", {"cpu": stacked})
    ours, theirs = parameters(), parameters()
    train(Muon(ours, 0.01, 0.1), ours)
    train(torchs(theirs), theirs)
    assert furthest(ours, theirs) < 4 * 2**-8 * 0.2 * 0.01 * 40**0.5
    assert furthest(ours, parameters()) > 0.01


def test_in_fp32_it_is_the_same_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # how torch.optim.Muon rounds
    ours, theirs = parameters(), parameters()
    train(Muon(ours, 0.01, 0.1, products=torch.float32), ours)
    train(torchs(theirs), theirs)
    assert furthest(ours, theirs) < 1e-6


def test_what_comes_out_is_orthogonal() -> None:
    matrices = [p.detach() for p in parameters() if sorted(p.shape) == [24, 40]]
    for matrix, done in zip(matrices, orthogonal(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert done.shape == matrix.shape
        assert torch.linalg.svdvals(done).min() > 0.6
        assert torch.linalg.svdvals(done).max() < 1.3
        assert (u.T @ done @ v.T).diagonal().min() > 0.6  # the same singular vectors, not any orthogonal matrix


def test_it_repeats_bit_for_bit_and_goes_on_from_its_buffers() -> None:
    once, twice = parameters(), parameters()
    train(Muon(once, 0.01, 0.1), once)
    first = Muon(twice, 0.01, 0.1)
    train(first, twice, steps=5)
    second = Muon(twice, 0.01, 0.1)
    for p in twice:
        assert list(first.state[p]) == ["momentum_buffer"]
        second.state[p] = {"momentum_buffer": first.state[p]["momentum_buffer"].clone()}
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for p in twice:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = p.detach().sin() + noise
        if step >= 5:
            second.step()
    assert furthest(once, twice) == 0.0


def test_a_parameter_without_a_gradient_stays() -> None:
    weights = parameters()
    optimizer = Muon(weights, 0.01, 0.1)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    moved = [not torch.equal(p, before) for p, before in zip(weights, parameters(), strict=True)]
    assert moved == [True] + 6 * [False]
    assert len(optimizer.state) == 1


def test_no_gradient_at_all_is_no_nan() -> None:
    weights = parameters()
    for p in weights:
        p.grad = torch.zeros_like(p)
    Muon(weights, 0.01, 0.0).step()
    assert furthest(weights, parameters()) == 0.0
