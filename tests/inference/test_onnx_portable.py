"""PortableRunner against the torch model it was exported from: any rows, any pieces, buffers that grow under them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.device import Device
from llmctl.export import graph
from llmctl.export.form import Form
from llmctl.inference import onnx_portable, runners
from llmctl.inference.onnx_portable import GrowingCache, PortableRunner
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder

CPU = Device("cpu", "test", 1, frozenset())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with grouped heads and weights that spread its logits."""
    torch.set_num_threads(1)
    config = Config("qwen3", 300, 48, 80, 2, 4, 2, 16, max_position_embeddings=300, qk_norm=True, eos_token_id=(6, 2))
    decoder = Decoder.random(config, seed=0)
    with torch.no_grad():
        for tensor in decoder.parameters():
            tensor.mul_(6.0 if tensor.ndim > 1 else 1.3)
    folder = tmp_path_factory.mktemp("model")
    hf.save(decoder, folder, folder)
    return folder


@pytest.fixture(scope="module")
def runner(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PortableRunner:
    folder = tmp_path_factory.mktemp("onnx")
    graph.write(model, folder, hf.read_config(model), {}, Form("portable"))
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(model / name, folder / name)
    found = runners.load(folder, CPU)
    assert isinstance(found, PortableRunner)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """Logits of the torch model on three texts, (3, 300, V)."""
    return TorchRunner(model, CPU).forward(texts(), last_only=False)


def texts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (3, 300))


def test_buffers_grow_under_a_text(runner: PortableRunner, expected: np.ndarray) -> None:
    ids, cache = texts()[:1], runner.new_cache()
    for a, b, room in ((0, 40, 64), (40, 64, 64), (64, 65, 128), (65, 200, 256), (200, 300, 300)):
        found = runner.forward(ids[:, a:b], cache, last_only=False)
        np.testing.assert_allclose(found, expected[:1, a:b], atol=1e-4)
        assert cache.room == room
    assert cache.length == cache.max_length == 300
    with pytest.raises(ValueError, match=r"300 \+ 1 positions do not fit in 300"):
        runner.forward(ids[:, :1], cache)


def test_rows_of_any_length_share_a_batch(runner: PortableRunner, expected: np.ndarray) -> None:
    """Chunks with a past in one batch, through views of it that outlive a growth of the whole."""
    ids, cache, at = texts(), runner.new_cache(3), np.zeros(3, int)
    first, last = cache.rows(0, 2), cache.rows(2, 3)

    def step(view: GrowingCache, rows: list[int], new: list[int]) -> None:
        given = np.zeros((len(rows), max(new)), np.int64)
        for i, b in enumerate(rows):
            given[i, : new[i]] = ids[b, at[b] : at[b] + new[i]]
        found = runner.forward(given, view, new=np.array(new))
        at[rows] += new
        np.testing.assert_allclose(found[:, 0], expected[rows, at[rows] - 1], atol=1e-4)

    step(cache, [0, 1, 2], [5, 1, 13])
    step(first, [0, 1], [1, 40])
    step(last, [2], [70])  # the whole moves to wider buffers
    assert cache.room == 128
    step(first, [0, 1], [9, 3])
    step(cache, [0, 1, 2], [1, 1, 1])
    assert cache.lengths.tolist() == at.tolist() == [16, 45, 84]
    assert cache.rows(0, 2) is first


def test_padding_never_reaches_past_the_end(runner: PortableRunner, expected: np.ndarray) -> None:
    """The long row ends where the buffer does: what pads it is not written anywhere."""
    ids, cache = texts(), runner.new_cache(2, 100)
    for b, stop in ((0, 99), (1, 20)):
        runner.forward(ids[b : b + 1, :stop], cache.rows(b, b + 1))
    given = np.stack([ids[0, 99:104], ids[1, 20:25]])
    found = runner.forward(given, cache, new=np.array([1, 5]))
    np.testing.assert_allclose(found[:, 0], expected[[0, 1], [99, 24]], atol=1e-4)


def test_a_row_may_go_on_twice(runner: PortableRunner, expected: np.ndarray) -> None:
    ids, cache = texts(), runner.new_cache(2)
    runner.forward(ids[:2, :10], cache)
    chosen = runner.select(cache, [1, 1, 0])
    found = runner.forward(ids[[1, 1, 0], 10:90], chosen, last_only=False)
    np.testing.assert_allclose(found, expected[[1, 1, 0], 10:90], atol=1e-4)
    assert cache.lengths.tolist() == [10, 10]
    cache.reset()
    np.testing.assert_allclose(runner.forward(ids[1:], cache.rows(0, 2))[:, 0], expected[1:, -1], atol=1e-4)


def test_greedy_ids_equal_torch(model: Path, runner: PortableRunner) -> None:
    found = [greedy(one, texts()[:1, :7], 120) for one in (runner, TorchRunner(model, CPU))]
    assert found[0] == found[1]
    assert len(set(found[0])) > 10


def greedy(runner: runners.Runner, ids: np.ndarray, count: int) -> list[int]:
    (cache, first), found = runner.begin(ids[0].tolist(), count), []
    ids = np.array([first])
    for _ in range(count):
        found.append(int(runner.forward(ids, cache)[0, -1].argmax()))
        ids = np.array([found[-1:]])
    return found


def test_room_is_the_next_power_of_two() -> None:
    assert [onnx_portable.bucket(n) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
