"""The average of the weights."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path

import torch

from llmctl.model.transformer import Decoder
from llmctl.training import checkpoint, optim
from llmctl.training.checkpoint import State
from llmctl.training.ema import Ema
from tests.shapes import SHAPES


def model() -> Decoder:
    return Decoder.random(SHAPES["llama"], seed=1)


def step(weights: Decoder, seed: int) -> None:
    """Any change of all weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def test_it_is_the_recurrence_with_a_growing_decay() -> None:
    weights = model()
    ema, name = Ema(weights, 0.5), "model.norm.weight"
    expected = weights.get_parameter(name).detach().double().clone()
    for number in range(1, 16):
        step(weights, number)
        ema.follow(number)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weights.get_parameter(name).detach().double()
    assert torch.allclose(ema.tensors[name].double(), expected, atol=1e-6)
    assert (16 - 1) / (10 + 16 - 1) > 0.5  # both parts of the rule were in use


def test_tied_weights_are_averaged_once_and_frozen_ones_never() -> None:
    weights = model()
    weights.model.norm.weight.requires_grad_(False)
    names = {name for name, p in weights.named_parameters() if p.requires_grad}
    assert Ema(weights, 0.9).tensors.keys() == names
    assert "model.norm.weight" not in names


def test_instead_changes_places_and_back_whatever_happens() -> None:
    weights = model()
    ema = Ema(weights, 0.9)
    for number in (1, 2):
        step(weights, number)
        ema.follow(number)
    raw = {name: p.detach().clone() for name, p in weights.named_parameters()}
    average = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    with contextlib.suppress(KeyboardInterrupt), ema.instead():
        assert all(torch.equal(p, average[name]) for name, p in weights.named_parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(p, raw[name]) for name, p in weights.named_parameters())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.tensors.items())


def test_five_and_five_steps_are_ten(tmp_path: Path) -> None:
    weights = model()
    ema, optimizers = Ema(weights, 0.99), optim.build(weights, "adamw", 0.01)
    for number in range(1, 11):
        step(weights, number)
        ema.follow(number)
        if number == 5:
            checkpoint.write(tmp_path, asdict(State(step=5)), checkpoint.contents(weights, optimizers, ema.tensors))
    again = Decoder.random(SHAPES["llama"], seed=2)
    resumed = Ema(again, 0.99)
    checkpoint.restore(tmp_path / "step-00000005", again, optim.build(again, "adamw", 0.01), resumed.tensors)
    for number in range(6, 11):
        step(again, number)
        resumed.follow(number)
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in ema.tensors.items())
