"""The step: what accumulates, what is skipped, and that stopping and going on is bitwise going through."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from llmctl.errors import RunError
from llmctl.finetune.batches import Example
from llmctl.finetune.batches import batches as chat_batches
from llmctl.model import lora
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from llmctl.text import shards
from llmctl.text.shards import Shards, Writer
from llmctl.training import checkpoint, guard, loop, objectives, optim
from llmctl.training.batch import IGNORED, Batch, ahead
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from llmctl.training.objectives import Learner
from llmctl.training.precision import LossScale, Precision
from tests.shapes import SHAPES

CONFIG = replace(SHAPES["qwen3"], hidden_size=32, num_hidden_layers=2, max_position_embeddings=16)
STEPS = 20


def never() -> bool:
    return False


def random_batches(size: int = 4, length: int = 16, seed: int = 0) -> Iterator[Batch]:
    random, position = np.random.default_rng(seed), 0
    while True:
        rows = random.integers(10, CONFIG.vocab_size, (size, length + 1))
        position += size
        yield Batch((rows[:, :-1],), rows[:, 1:], position)


def built(config: Config = CONFIG, kind: Any = "muon") -> tuple[Decoder, list[Optimizer]]:
    model = Decoder.random(config, seed=1)
    return model, optim.build(model, kind, 0.01, 0.1)


def trained(
    model: Decoder,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Batch],
    steps: range,
    micro_batch: int = 4,
    stop: Callable[[], bool] = never,
    loss: Callable[..., torch.Tensor] = objectives.loss,
    max_grad_norm: float = 1.0,
    planned: int = STEPS,
    scale: LossScale | None = None,
) -> list[Step]:
    def rate(step: int) -> float:
        return optim.schedule(step, kind="cosine", steps=planned, warmup=3, decay_ratio=0.4, floor=0.1)

    return list(
        loop.train(
            learning(model, loss),
            optimizers,
            batches,
            steps=steps,
            rate=rate,
            micro_batch=micro_batch,
            max_grad_norm=max_grad_norm,
            precision=Precision(torch.device("cpu")),
            stop=stop,
            scale=scale,
        )
    )


def learning(model: Any, loss: Callable[..., torch.Tensor]) -> Learner:
    learner = Learner(model)
    learner.forward = lambda *tensors, **named: loss(model, *tensors, **named)  # type: ignore[method-assign]
    return learner


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------ resuming


def corpus(folder: Path) -> Shards:
    """Ten samples an epoch, so that twenty steps of four cross seven edges."""
    random = np.random.default_rng(5)
    with Writer(folder, CONFIG.vocab_size, 1, 2) as writer:
        for _ in range(12):
            writer.add("train", random.integers(10, CONFIG.vocab_size, 13).tolist(), 13)
    return Shards.open(folder, "train")


def of_shards(folder: Path, position: int) -> Iterator[Batch]:
    samples = shards.batches(Shards.open(folder, "train"), seed=3, max_seq_length=16, batch_size=4, position=position)
    for rows, after in samples:
        yield Batch((rows[:, :-1],), rows[:, 1:], after)


def of_chats(_: Path, position: int) -> Iterator[Batch]:
    random = np.random.default_rng(7)
    examples = [Example(tuple(random.integers(10, 90, n).tolist()), (False,) + (True,) * (n - 1)) for n in range(4, 16)]
    return chat_batches(examples, size=4, seed=3, pad_id=3, length=16, position=position)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("loader", [of_shards, of_chats], ids=["shards", "chats"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_twenty_steps_equal_ten_and_ten(tmp_path: Path, kind: str, loader: Any, adapters: bool) -> None:
    """Faults 4 and 5: with dropout, accumulation and epoch boundaries, bitwise, through the files of a checkpoint."""
    corpus(tmp_path)
    config = replace(CONFIG, dropout=0.2)

    def model_and_optimizers() -> tuple[Decoder, list[Optimizer]]:
        model = Decoder.random(config, seed=1)
        if adapters:
            lora.apply(model, 4, 8.0, ("q_proj", "down_proj"), seed=2)
        return model, optim.build(model, kind, 0.01, 0.1)  # type: ignore[arg-type]

    torch.manual_seed(11)
    whole, optimizers = model_and_optimizers()
    every = trained(whole, optimizers, loader(tmp_path, 0), range(STEPS), micro_batch=2)

    torch.manual_seed(11)
    half, optimizers = model_and_optimizers()
    first = trained(half, optimizers, loader(tmp_path, 0), range(10), micro_batch=2)
    checkpoint.Saver(tmp_path / "work", half, optimizers).finish(State(10, first[-1].position))

    torch.manual_seed(99)  # another process
    other, optimizers = model_and_optimizers()
    found = checkpoint.newest(tmp_path / "work")
    assert found is not None
    folder, state = found
    checkpoint.restore(folder, other, optimizers)
    assert same(half, other)
    second = trained(other, optimizers, loader(tmp_path, state.position), range(state.step, STEPS), micro_batch=2)

    assert same(whole, other)
    assert [(s.number, s.loss, s.gradient_norm, s.learning_rate, s.position) for s in every] == [
        (s.number, s.loss, s.gradient_norm, s.learning_rate, s.position) for s in first + second
    ]


@pytest.mark.parametrize("at", range(0, 24, 3))
def test_stopping_at_any_micro_batch_drops_just_that_step(tmp_path: Path, at: int) -> None:
    """Fault 9: what was begun is undone, the random state included, and going on is bitwise going through."""
    config = replace(CONFIG, dropout=0.3)
    torch.manual_seed(5)
    whole, optimizers = built(config)
    trained(whole, optimizers, random_batches(), range(6), micro_batch=1)

    asked = iter(range(1000))
    torch.manual_seed(5)
    model, optimizers = built(config)
    steps = trained(model, optimizers, random_batches(), range(6), 1, stop=lambda: next(asked) >= at)
    assert len(steps) == min(6, at // 5)  # a look before the step, and one before each of its four micro-batches
    assert all(p.grad is None for p in model.parameters())
    rest = random_batches()
    for _ in steps:
        next(rest)
    trained(model, optimizers, rest, range(len(steps), 6), micro_batch=1)
    assert same(whole, model)


def test_the_position_counts_what_was_trained_on_and_no_more(tmp_path: Path) -> None:
    corpus(tmp_path)
    model, optimizers = built()
    steps = trained(model, optimizers, of_shards(tmp_path, 0), range(5))
    assert [step.position for step in steps] == [4, 8, 12, 16, 20]


# -------------------------------------------------------------------------------------------------------- accumulation


def gradients(micro_batch: int, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradient that a step sees, taken out just before it would be used."""
    model, optimizers = built()
    seen: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizers[0].register_step_pre_hook(keep)
    trained(model, optimizers, iter([batch]), range(1), micro_batch, max_grad_norm=0.0)
    return seen


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    """The mean over the batch's supervised tokens, however unevenly they are spread over the micro-batches."""
    batch = next(random_batches(size=6))
    labels = batch.labels.copy()
    labels[0, 3:] = IGNORED
    labels[4, :] = IGNORED
    uneven = Batch(batch.inputs, labels, batch.position)
    whole, parts = gradients(6, uneven), gradients(micro_batch, uneven)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)  # fp32; measured 2e-8 absolute


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    batch = next(random_batches())
    model = Decoder.random(CONFIG, seed=1).train()
    logits = model(torch.from_numpy(batch.inputs[0]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten()).backward()
    ours = gradients(2, batch)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_loss_is_a_mean_over_supervised_tokens_and_the_norm_is_before_clipping() -> None:
    batch = next(random_batches())
    model, optimizers = built()
    logits = Decoder.random(CONFIG, seed=1)(torch.from_numpy(batch.inputs[0]))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
    found = gradients(4, batch)
    step = trained(model, optimizers, iter([batch]), range(1), micro_batch=1, max_grad_norm=1e-3)[0]
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    assert step.gradient_norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in found.values())), rel=1e-4
    )
    assert step.gradient_norm > 1e-3


def test_clipping_scales_the_gradient_to_the_norm_asked_for() -> None:
    batch = next(random_batches())
    model, optimizers = built(kind="adamw")
    norms: list[float] = []

    def keep(*_: Any) -> None:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))

    optimizers[0].register_step_pre_hook(keep)
    trained(model, optimizers, iter([batch]), range(1), max_grad_norm=0.01)
    assert norms == [pytest.approx(0.01, rel=1e-3)]


# ------------------------------------------------------------------------------------------------------- NaN and speed


def failing(at: set[int], value: float) -> Callable[..., torch.Tensor]:
    """A loss that is `value` in the calls named, counted from 1."""
    calls = 0

    def loss(model: Decoder, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return objectives.loss(model, ids, labels) * (value if calls in at else 1.0)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_no_number_is_skipped(value: float) -> None:
    """Fault 11: the weights and the optimiser's state stay as they were, and training goes on."""
    model, optimizers = built()
    before = copy.deepcopy(model)
    step = trained(model, optimizers, random_batches(), range(1), loss=failing({1}, value))[0]
    assert step.skipped
    assert same(before, model)
    assert not any(optimizer.state for optimizer in optimizers)
    assert all(p.grad is None for p in model.parameters())
    rest = trained(model, optimizers, random_batches(), range(1, 4), loss=failing(set(), value))
    assert [step.skipped for step in rest] == [False] * 3
    assert not same(before, model)


def test_one_bad_micro_batch_skips_the_whole_step() -> None:
    model, optimizers = built()
    before = copy.deepcopy(model)
    assert trained(model, optimizers, random_batches(), range(1), 1, loss=failing({3}, math.nan))[0].skipped
    assert same(before, model)


def test_a_gradient_that_is_no_number_is_skipped_though_the_loss_is_one() -> None:
    model, optimizers = built()
    before = copy.deepcopy(model)

    def explodes(model: Decoder, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = objectives.loss(model, ids, labels)
        return value + torch.sqrt((value - value.detach()).abs())  # 0 forward, infinite backward

    step = trained(model, optimizers, random_batches(), range(1), loss=explodes)[0]
    assert math.isfinite(step.loss)
    assert step.skipped
    assert same(before, model)


def test_training_stops_when_it_is_no_accident() -> None:
    model, optimizers = built()
    always = failing(set(range(1000)), math.nan)
    with pytest.raises(RunError, match=f"no number for {guard.IN_A_ROW} steps in a row") as caught:
        trained(model, optimizers, random_batches(), range(100), loss=always)
    assert "learning_rate" in caught.value.hint
    now_and_then = failing(set(range(1, 1000, 2)), math.nan)
    steps = trained(model, optimizers, random_batches(), range(2 * guard.IN_A_ROW + 2), loss=now_and_then)
    assert sum(step.skipped for step in steps) == guard.IN_A_ROW + 1


def test_speed_is_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic, on a clock of our own: litgpt#1805 divided by a timestamp."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    model, optimizers = built()
    steps = trained(model, optimizers, random_batches(size=3, length=16), range(2))
    assert [(step.tokens, step.seconds, step.tokens_per_second) for step in steps] == [(48, 2.0, 24.0)] * 2


def test_dropout_is_on_in_every_step(tmp_path: Path) -> None:
    """Validation in between puts the model into evaluation mode and must put it back."""
    from llmctl.inference import scoring

    model, optimizers = built(replace(CONFIG, dropout=0.5))
    modes = []

    def watch(model: Decoder, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        modes.append(model.training)
        return objectives.loss(model, ids, labels)

    for _ in loop.train(
        learning(model, watch),
        optimizers,
        random_batches(),
        steps=range(3),
        rate=lambda step: 1.0,
        micro_batch=4,
        max_grad_norm=1.0,
        precision=Precision(torch.device("cpu")),
        stop=never,
    ):
        scoring.score(model, np.arange(10, 40), max_seq_length=8)
    assert modes == [True] * 3


# --------------------------------------------------------------------------------------------------------- fp16 scale


def test_a_scaled_loss_makes_the_same_steps() -> None:
    """A power of two scales exactly: bitwise the same losses and weights."""
    plain, scaled = built(), built()
    steps = trained(*plain, random_batches(), range(4), 2)
    scale = LossScale(1024.0)
    assert [step.loss for step in trained(*scaled, random_batches(), range(4), 2, scale=scale)] == [
        step.loss for step in steps
    ]
    assert same(plain[0], scaled[0])
    assert (scale.scale, scale.good) == (1024.0, 4)


def test_an_overflow_halves_the_scale_and_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.training.precision.PATIENCE", 3)
    scale = LossScale(8.0)
    model, optimizers = built()
    steps = trained(model, optimizers, random_batches(), range(5), loss=failing({2}, math.inf), scale=scale)
    assert [step.skipped for step in steps] == [False, True, False, False, False]
    assert (scale.scale, scale.good) == (8.0, 0)  # halved once, doubled after three good steps


# ------------------------------------------------------------------------------------------------------ batches, ahead


def test_batches_made_ahead_are_the_same_and_stop_when_nobody_reads() -> None:
    def count(steps: int) -> list[int]:
        found = []
        for batch in (source := ahead(random_batches())):
            found.append(batch.position)
            if len(found) == steps:
                source.close()
        return found

    assert count(5) == [4, 8, 12, 16, 20]
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_what_goes_wrong_ahead_is_raised() -> None:
    def broken() -> Iterator[Batch]:
        yield next(random_batches())
        raise OSError("a shard is gone")

    source = ahead(broken())
    next(source)
    with pytest.raises(OSError, match="a shard is gone"):
        next(source)
    assert list(ahead(iter([]))) == []
