"""Scoring: every token but the first once, whatever the windows, and the same from torch and from a runner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmctl.errors import UsageError
from llmctl.inference import scoring
from llmctl.inference.runners import TorchRunner
from llmctl.inference.scoring import loglikelihood, score
from llmctl.model.transformer import Decoder
from tests.shapes import SHAPES

MODEL = Decoder.random(SHAPES["qwen3"], 0).eval()
RUNNER = TorchRunner.of(MODEL)
TOKENS = np.random.default_rng(0).integers(0, 97, 101)


def surprise_after(context: np.ndarray, target: int) -> float:
    """The surprise at one token, from a pass of its own."""
    with torch.no_grad():
        return -float(MODEL(torch.from_numpy(context)[None])[0, -1].double().log_softmax(-1)[target])


@pytest.mark.parametrize("total", [2, 3, 7, 50, 101])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 8), (8, 3), (8, 1), (100, 100), (100, 7), (300, 300)])
def test_every_token_but_the_first_is_a_target_once(total: int, length: int, stride: int) -> None:
    targets: list[int] = []
    for start, counted, stop in scoring._windows(total, length, stride):
        assert 0 <= start < counted < stop <= total
        assert stop - 1 - start <= length
        assert counted - start >= min(counted, length - stride + 1)  # tokens before the first target that counts
        targets += range(counted, stop)
    assert targets == list(range(1, total))


@pytest.mark.parametrize(("length", "stride"), [(8, None), (8, 3), (300, None), (16, 1)])
def test_each_target_is_scored_with_the_window_before_it(length: int, stride: int | None) -> None:
    expected = [
        surprise_after(TOKENS[start:at], TOKENS[at])
        for start, counted, stop in scoring._windows(101, length, stride or length) for at in range(counted, stop)
    ]  # fmt: skip
    for model in (MODEL, RUNNER):
        found = score(model, TOKENS, max_seq_length=length, stride=stride)
        assert found.tokens == 100
        assert found.nats == pytest.approx(sum(expected), rel=1e-6)
        assert found.window_nats.sum() == pytest.approx(found.nats, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_change_nothing(batch_size: int) -> None:
    expected = score(MODEL, TOKENS, max_seq_length=8, batch_size=1).nats
    for model in (MODEL, RUNNER):
        found = score(model, TOKENS, max_seq_length=8, batch_size=batch_size)
        assert found.nats == pytest.approx(expected, rel=1e-6)


def test_the_figures() -> None:
    found = scoring.Score(nats=20 * math.log(2), tokens=10, bytes=40)
    assert found.loss == pytest.approx(2 * math.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(0.5)
    assert found.bits_per_byte_of("é" * 10) == pytest.approx(1.0)
    assert math.isnan(scoring.Score(1.0, 1).bits_per_byte)


def test_a_uniform_model_has_the_logarithm_of_its_vocabulary() -> None:
    model = Decoder.random(SHAPES["llama"], 0)
    with torch.no_grad():
        model.head_weight().zero_()
    assert score(model, TOKENS, max_seq_length=32).loss == pytest.approx(math.log(97), rel=1e-6)


def test_training_goes_on_as_before() -> None:
    """Validation in mid-training: dropout off meanwhile, on afterwards; autocast stays close."""
    model = Decoder.random(SHAPES["llama"], 0).train()
    plain = score(model, TOKENS, max_seq_length=32)
    assert model.training
    assert score(model, TOKENS, max_seq_length=32, autocast=True).loss == pytest.approx(plain.loss, rel=1e-2)
    model(torch.from_numpy(TOKENS)[None]).sum().backward()  # what was computed meanwhile does not get in the way


def test_too_few_tokens_and_strides_that_skip() -> None:
    with pytest.raises(UsageError, match="1 tokens are too few"):
        score(MODEL, TOKENS[:1], max_seq_length=8)
    for stride in (0, 9):
        with pytest.raises(UsageError, match=f"stride of {stride}"):
            score(MODEL, TOKENS, max_seq_length=8, stride=stride)


def test_loglikelihood_is_the_sum_of_its_tokens() -> None:
    context, continuation = TOKENS[:9].tolist(), TOKENS[9:13].tolist()
    nats, greedy = loglikelihood(RUNNER, context, continuation)
    assert nats == pytest.approx(-sum(surprise_after(TOKENS[:at], TOKENS[at]) for at in range(9, 13)), rel=1e-6)
    assert not greedy
    with torch.no_grad():
        best = int(MODEL(torch.from_numpy(TOKENS[:9])[None])[0, -1].argmax())
    assert loglikelihood(RUNNER, context, [best])[1]


def test_loglikelihood_cuts_a_long_context_at_the_left() -> None:
    context, continuation = np.resize(TOKENS, 500).tolist(), [5, 6]
    expected, _ = loglikelihood(RUNNER, context[-319:], continuation)
    assert loglikelihood(RUNNER, context, continuation)[0] == pytest.approx(expected, rel=1e-9)
    for bad in (([], [1]), ([1], []), ([1], [1] * 321)):
        with pytest.raises(UsageError):
            loglikelihood(RUNNER, *bad)
