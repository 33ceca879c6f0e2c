"""The runner interface over torch, and which runner a folder gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl import device
from llmctl.errors import DataError, UsageError
from llmctl.inference import runners
from llmctl.inference.runners import Runner, TorchRunner
from llmctl.model import hf
from llmctl.model.transformer import Decoder
from tests.shapes import LLAMA, SHAPES

CPU = device.pick("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.save(Decoder.random(SHAPES["qwen3 grouped, wide heads, untied"], 0), tmp_path, tmp_path)
    return tmp_path


def test_a_model_folder_gets_torch(folder: Path) -> None:
    runner: Runner = runners.load(folder, CPU)
    assert isinstance(runner, TorchRunner)
    assert (runner.vocab_size, runner.max_length, runner.eos_ids) == (97, 320, (6, 2))
    ids = np.arange(12).reshape(2, 6)
    logits = runner.forward(ids, last_only=False)
    assert logits.shape == (2, 6, 97)
    assert logits.dtype == np.float32
    cache = runner.new_cache(2, 6)
    steps = [runner.forward(ids[:, at : at + 1], cache) for at in range(6)]
    np.testing.assert_allclose(np.concatenate(steps, 1), logits, atol=1e-5)


def test_padding_on_the_right_changes_nothing_before_it(folder: Path) -> None:
    runner = runners.load(folder, CPU)
    ids = np.arange(12).reshape(2, 6)
    padded = np.pad(ids, ((0, 0), (0, 3)))
    np.testing.assert_allclose(
        runner.forward(padded, last_only=False)[:, :6], runner.forward(ids, last_only=False), atol=1e-5
    )


def test_bf16_stays_close(folder: Path) -> None:
    ids = np.arange(40)[None]
    exact, rounded = (TorchRunner(folder, CPU, dtype).forward(ids) for dtype in ("fp32", "bf16"))
    np.testing.assert_allclose(rounded, exact, atol=0.02)
    assert rounded.dtype == np.float32


def test_a_runner_over_a_model_in_training_follows_it_and_leaves_it_training() -> None:
    model = Decoder.random(replace(LLAMA, dropout=0.5), 0).train()
    runner, ids = TorchRunner.of(model), np.arange(9)[None]
    first = runner.forward(ids)
    np.testing.assert_array_equal(runner.forward(ids), first)  # no dropout
    assert model.training
    model.head_weight().data.mul_(2.0)
    assert np.abs(runner.forward(ids) - first).max() > 1e-3


@pytest.mark.parametrize("ids", [[[97]], [[-1]]])
def test_ids_outside_the_vocabulary_are_refused(folder: Path, ids: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 96"):
        runners.load(folder, CPU).forward(np.array(ids))


def test_what_a_folder_is_not_for(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UsageError, match=r"no model\.onnx"):
        runners.load(folder, CPU, "onnx")
    with pytest.raises(UsageError, match="'tensorrt' is not known"):
        runners.load(folder, CPU, "tensorrt")
    with pytest.raises(DataError, match=r"no config\.json"):
        runners.load(tmp_path_factory.mktemp("empty"), CPU)
