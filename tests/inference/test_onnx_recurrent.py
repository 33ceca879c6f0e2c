"""The exported LSTM under its runner, and the model under torch's, against the model itself; decoding; an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.export import lstm_graph
from llmctl.inference import generate, runners, scoring
from llmctl.inference.engine import Engine, Event, Prompt
from llmctl.inference.onnx_recurrent import RecurrentRunner
from llmctl.inference.runners import Runner, TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.lstm import LSTM
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
    section = ModelSection(family="lstm", num_hidden_layers=2, hidden_size=48, max_seq_length=160)
    lstm = LSTM.random(shapes.derive(section, len(tokenizer))[0], seed=0)
    with torch.no_grad():
        for name, tensor in lstm.named_parameters():
            tensor.mul_(1.0 if "embed_tokens" in name else 4.0)
    folder = tmp_path_factory.mktemp("model")
    hf.save(lstm, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    lstm_graph.write(model, folder, hf.read_config(model), {})
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module", params=["onnx", "torch"])
def runner(request: pytest.FixtureRequest, model: Path, exported: Path) -> Runner:
    return runners.load(exported if request.param == "onnx" else model, CPU)


@pytest.fixture(scope="module")
def reference(model: Path) -> LSTM:
    loaded = hf.load(model)
    assert isinstance(loaded, LSTM)
    return loaded


def ids_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 200, (rows, length))


def logits(reference: LSTM, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return reference(torch.from_numpy(ids)).numpy()


def test_the_graph_chooses_its_runner(exported: Path, model: Path) -> None:
    assert isinstance(runners.load(exported, CPU), RecurrentRunner)
    assert isinstance(runners.load(model, CPU), TorchRunner)


def test_however_the_tokens_arrive(runner: Runner, reference: LSTM) -> None:
    ids = ids_of(2, 30)
    expected, cache = logits(reference, ids), runner.new_cache(2)
    np.testing.assert_allclose(runner.forward(ids, None, last_only=False), expected, atol=2e-5)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 29), (29, 30)):
        found = runner.forward(ids[:, start:end], cache)
        np.testing.assert_allclose(found, expected[:, end - 1 : end], atol=2e-5)
    assert cache.length == 30


def test_rows_of_different_lengths(exported: Path, reference: LSTM) -> None:
    """Padded on the right: each row keeps the state behind its own last token, and goes on from there."""
    runner, texts = RecurrentRunner(exported, CPU), [ids_of(1, size, size) for size in (5, 1, 13)]
    given = np.zeros((3, 13), np.int64)
    for row, text in enumerate(texts):
        given[row, : text.shape[1]] = text
    cache, new = runner.new_cache(3), np.array([5, 1, 13])
    last = runner.forward(given, cache, new=new)
    step = runner.forward(np.array([[9], [8], [7]]), cache)
    for row, text in enumerate(texts):
        expected = logits(reference, np.concatenate([text, [[9 - row]]], axis=1))[0]
        np.testing.assert_allclose(last[row, 0], expected[-2], atol=2e-5)
        np.testing.assert_allclose(step[row, 0], expected[-1], atol=2e-5)
    assert cache.lengths.tolist() == [6, 2, 14]


def test_a_view_shares_what_the_whole_remembers(exported: Path, reference: LSTM) -> None:
    runner, ids = RecurrentRunner(exported, CPU), ids_of(3, 9)
    cache = runner.new_cache(3)
    runner.forward(ids[:, :8], cache)
    part = runner.forward(ids[1:2, 8:], cache.rows(1, 2))
    np.testing.assert_allclose(part[0, 0], logits(reference, ids[1:2])[0, -1], atol=2e-5)
    assert cache.lengths.tolist() == [8, 9, 8]
    step = runner.forward(np.full((3, 1), 5), cache)
    np.testing.assert_allclose(step[1, 0], logits(reference, np.append(ids[1], 5)[None])[0, -1], atol=2e-5)
    cache.reset()
    again = runner.forward(ids[:, :1], cache)
    np.testing.assert_allclose(again[:, 0], logits(reference, ids[:, :1])[:, 0], atol=2e-5)


def test_selected_rows_go_on_by_themselves(runner: Runner, reference: LSTM) -> None:
    ids = ids_of(2, 6)
    cache = runner.new_cache(2)
    runner.forward(ids[:, :5], cache)
    chosen = runner.select(cache, [1, 1, 0])
    found = runner.forward(np.array([[9], [8], [7]]), chosen)
    for row, (source, token) in enumerate(((1, 9), (1, 8), (0, 7))):
        text = np.append(ids[source, :5], token)[None]
        np.testing.assert_allclose(found[row, 0], logits(reference, text)[0, -1], atol=2e-5)
    kept = runner.forward(ids[:, 5:], cache)
    np.testing.assert_allclose(kept[:, 0], logits(reference, ids)[:, -1], atol=2e-5)


def test_what_does_not_fit_is_refused(runner: Runner) -> None:
    with pytest.raises(ValueError, match="token ids lie outside"):
        runner.forward(np.array([[100_000]]))
    with pytest.raises(ValueError, match=r"0 \+ 161 positions do not fit in 160"):
        runner.forward(ids_of(1, 161))
    cache = runner.new_cache(1, 4)
    runner.forward(ids_of(1, 3), cache)
    with pytest.raises(ValueError, match=r"3 \+ 2 positions do not fit in 4"):
        runner.forward(ids_of(1, 2), cache)


def test_both_decode_and_score_alike(model: Path, exported: Path, tokenizer: Tokenizer) -> None:
    ours, theirs = (runners.load(folder, CPU) for folder in (exported, model))
    prompt, sampling = tokenizer.prompt("the moon"), Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
    said = [generate.complete(runner, tokenizer, prompt, sampling).ids for runner in (ours, theirs)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 5  # no loop over one token, which would hide a state that is never handed back
    ids = ids_of(1, 500)[0]
    loaded = hf.load(model)
    assert isinstance(loaded, LSTM)
    scores = [scoring.score(scored, ids, max_seq_length=64).loss for scored in (ours, theirs, loaded)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_the_engine_serves_it(exported: Path, tokenizer: Tokenizer) -> None:
    """Four answers that take turns: each what it is by itself."""
    runner = runners.load(exported, CPU)
    engine, events = Engine(runner, tokenizer), list[Event]()
    sampling = Sampling(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [tokenizer.prompt(text) for text in ("a", "the sun", "once upon a time", "x = 1")]
    engine.submit([Prompt(prompt, sampling) for prompt in prompts], events.append)
    engine.close(20.0)
    for index, prompt in enumerate(prompts):
        drawn = [token.id for event in events if event.index == index for token in event.tokens]
        assert drawn == generate.complete(runner, tokenizer, prompt, sampling).ids


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 40}])
def test_a_config_that_lies_about_the_graph_is_refused(exported: Path, tmp_path: Path, change: dict[str, int]) -> None:
    folder = shutil.copytree(exported, tmp_path / "lying")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **change}))
    with pytest.raises(DataError, match=r"has the state past\.h \[2, 'batch_size', 48\] for"):
        runners.load(folder, CPU)
