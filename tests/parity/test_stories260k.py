"""A published checkpoint (llama2.c's stories260K) against numbers written down from its own C program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.inference import scoring
from llmctl.inference.generate import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import hf
from llmctl.model.jsonfile import read_json


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, Any]:
    return read_json(shared_data / "models" / "stories260K" / "golden.json")


@pytest.fixture(scope="module")
def runner(shared_data: Path) -> TorchRunner:
    return TorchRunner.of(hf.load(shared_data / "models" / "stories260K" / "hf"))


def test_greedy_ids(golden: dict[str, Any], runner: TorchRunner) -> None:
    expected = golden["greedy_from_bos_256"]
    sampling = Sampling(temperature=0.0, max_tokens=len(expected) - 1, ignore_eos=True)
    assert [token.id for token in generate(runner, expected[:1], sampling)] == expected[1:]


def test_losses(golden: dict[str, Any], runner: TorchRunner) -> None:
    for sentence in golden["sentences"]:
        ids = np.array(sentence["ids"])
        for model in (runner, runner.model):
            score = scoring.score(model, ids, max_seq_length=512)
            assert score.nats == pytest.approx(sentence["nll_sum"], rel=1e-5), json.dumps(sentence["text"])
            assert score.loss == pytest.approx(sentence["nll_mean"], rel=1e-5)


def test_top_logits(golden: dict[str, Any], runner: TorchRunner) -> None:
    prompt = golden["logits_last_prompt"]
    logits = runner.forward(np.array([prompt["ids"]]))[0, -1]
    ids, values = zip(*prompt["top5"], strict=True)
    assert np.argsort(-logits)[:5].tolist() == list(ids)
    np.testing.assert_allclose(logits[list(ids)], values, atol=1e-4)
    np.testing.assert_allclose(logits[:16], prompt["first16"], atol=1e-4)
