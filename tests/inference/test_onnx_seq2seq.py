"""An exported T5 behind the runners' interface: it writes what torch writes, alone and in beams."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.export import seq2seq_graph
from llmctl.inference import beam, generate, runners
from llmctl.inference.onnx_seq2seq import Seq2SeqRunner
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.transformer import EncoderDecoder
from llmctl.recipe import ModelSection
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer

CPU = Device("cpu", "test", 1, frozenset())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([], type="byte")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    section = ModelSection(family="t5", num_hidden_layers=2, hidden_size=64, max_seq_length=60)
    made = hf.random(shapes.derive(section, len(tokenizer))[0], seed=2)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.mul_(3.0 if tensor.ndim > 1 else 1.0)
    folder = tmp_path_factory.mktemp("model")
    hf.save(made, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "t5"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    seq2seq_graph.write(model, folder, hf.read_config(model), {})
    return folder


@pytest.fixture(scope="module")
def runner(exported: Path) -> Seq2SeqRunner:
    return Seq2SeqRunner(exported, CPU)


def logits(model: Path, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of one pair, in torch."""
    loaded = hf.load(model)
    assert isinstance(loaded, EncoderDecoder)
    with torch.inference_mode():
        return np.asarray(loaded(torch.from_numpy(source)[None], torch.from_numpy(target)[None])[0])


def ids_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 200, shape)


def test_the_graphs_choose_their_runner(exported: Path, model: Path) -> None:
    assert isinstance(runners.load(exported, CPU), Seq2SeqRunner)
    assert isinstance(runners.load(model, CPU), TorchRunner)


def test_both_write_alike(exported: Path, model: Path, tokenizer: Tokenizer) -> None:
    pair = [runners.load(folder, CPU) for folder in (exported, model)]
    prompt = tokenizer.encode_for_model("what the moon saw")[0]
    for sampling in (Sampling(temperature=0.0, ignore_eos=True), Sampling(seed=3, max_tokens=30)):
        said = [generate.complete(runner, tokenizer, prompt, sampling) for runner in pair]
        assert said[0].ids == said[1].ids
        assert len(set(said[0].ids)) > 5
    found = [beam.search(runner, prompt, num_beams=3, max_tokens=20) for runner in pair]
    assert [text.ids for text in found[0]] == [text.ids for text in found[1]]
    assert [text.score for text in found[0]] == pytest.approx([text.score for text in found[1]], abs=1e-5)


def test_padded_sources_and_pieces(runner: Seq2SeqRunner, model: Path) -> None:
    sources, target = [ids_of(size, seed=size) for size in (5, 1, 13)], ids_of(3, 20, seed=7)
    padded, mask = np.zeros((3, 13), np.int64), np.zeros((3, 13), bool)
    for row, source in enumerate(sources):
        padded[row, : len(source)], mask[row, : len(source)] = source, True
    cache = runner.read(padded, mask)
    for start, end in ((0, 1), (1, 8), (8, 9), (9, 20)):
        found = runner.forward(target[:, start:end], cache, last_only=end - start == 7)
        for row, source in enumerate(sources):
            expected = logits(model, source, target[row])[start:end]
            np.testing.assert_allclose(found[row], expected[-found.shape[1] :], atol=2e-4)
    assert cache.length == 20
    assert cache.held["0.encoder.key"].shape()[2] == 13  # computed with the first piece, kept since


def test_selected_rows_go_on_by_themselves(runner: Seq2SeqRunner, model: Path) -> None:
    sources, target = ids_of(2, 9), ids_of(2, 6, seed=1)
    cache = runner.read(sources)
    runner.forward(target[:, :5], cache)
    chosen = runner.select(cache, [1, 1, 0])
    found = runner.forward(np.array([[9], [8], [7]]), chosen)
    for row, (at, token) in enumerate(((1, 9), (1, 8), (0, 7))):
        expected = logits(model, sources[at], np.append(target[at, :5], token))[-1]
        np.testing.assert_allclose(found[row, 0], expected, atol=2e-4)
    kept = runner.forward(target[:, 5:], cache)
    np.testing.assert_allclose(kept[0, 0], logits(model, sources[0], target[0])[-1], atol=2e-4)


def test_what_does_not_fit_is_refused(runner: Seq2SeqRunner, exported: Path, tmp_path: Path) -> None:
    for ids in ([[-1]], [[100_000]]):
        with pytest.raises(ValueError, match="token ids lie outside"):
            runner.read(np.array(ids))
    cache, _ = runner.begin([5, 6], 3)
    with pytest.raises(ValueError, match="token ids lie outside"):
        runner.forward(np.array([[100_000]]), cache)
    with pytest.raises(ValueError, match=r"0 \+ 5 positions do not fit in 4"):
        runner.forward(ids_of(1, 5), cache)
    with pytest.raises(ValueError, match="needs the cache"):
        runner.forward(ids_of(1, 5))
    with pytest.raises(ValueError, match="a source to read"):
        runner.new_cache()
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(DataError, match="past the end"):
        Seq2SeqRunner(broken, CPU)
