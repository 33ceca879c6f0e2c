"""How far a step moves the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmctl.model.transformer import Decoder
from llmctl.training import loop, movement, optim
from llmctl.training.batch import Batch
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision
from tests.shapes import SHAPES


def test_how_far_a_step_moves_the_weights() -> None:
    torch.manual_seed(0)
    small, large = torch.randn(30, 40), torch.randn(32_768, 16)
    before = movement.snapshot([small, large])
    moves = [torch.randn_like(small), torch.randn_like(large) * torch.linspace(0, 1, 16)]
    for weights, move in zip((small, large), moves, strict=True):
        weights += 0.01 * move
    exact = math.sqrt(sum(float((0.01 * move).square().sum()) for move in moves))
    norm = math.sqrt(sum(float(weights.square().sum()) for weights in (small, large)))
    change, weight = movement.movement([small, large], before).tolist()
    assert math.sqrt(change) == pytest.approx(exact, rel=0.01)  # of the large one, an eighth is looked at
    assert math.sqrt(weight) == pytest.approx(norm, rel=0.01)
    assert movement.movement([small], before[:1])[0].item() == pytest.approx(
        float((0.01 * moves[0]).square().sum()), rel=1e-4
    )
    assert sum(part.numel() for part in before) <= small.numel() + movement.SAMPLED


def test_a_step_tells_when_it_is_asked() -> None:
    """Exactly, in a model whose tensors are small; and a step that was skipped moved nothing."""
    model = Decoder.random(SHAPES["qwen3"], seed=1)
    rows = np.random.default_rng(0).integers(10, 90, (4, 17))
    befores: list[list[torch.Tensor]] = []

    def rate(number: int) -> float:
        befores.append([parameter.detach().clone() for parameter in model.parameters()])
        return 1.0

    steps = loop.train(
        Learner(model),
        optim.build(model, "adamw", 0.01, 0.1),
        (Batch((rows[:, :-1],), rows[:, 1:], 4) for _ in range(4)),
        steps=range(4),
        rate=rate,
        micro_batch=4,
        max_grad_norm=1.0,
        precision=Precision(torch.device("cpu")),
        stop=lambda: False,
        measure_every=2,
    )
    for step in steps:
        assert (step.update_norm is not None) == (step.number in (2, 4))
        if step.update_norm is not None:
            pairs = [(now.detach(), old) for now, old in zip(model.parameters(), befores[-1], strict=True)]
            change = math.sqrt(sum(float((now - old).square().sum()) for now, old in pairs))
            weight = math.sqrt(sum(float(now.square().sum()) for now, _ in pairs))
            assert step.update_norm == pytest.approx(change / weight, rel=1e-5)
            assert 1e-4 < step.update_norm < 1
