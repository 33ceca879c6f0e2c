"""The recurrent baseline's graph against torch, run by plain ONNX Runtime; the gate; and what it is not exported to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, GateError, UsageError
from llmctl.export import lstm_graph, stage
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.jsonfile import read_json, write_json
from llmctl.model.lstm import LSTM
from llmctl.recipe import ModelSection
from llmctl.text.tokenizer import Tokenizer

Publish = Callable[..., Artifact]
MakeJob = Callable[..., Job]
Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Saved:
    """Saves a random model whose gates open and shut and whose logits are far from even."""

    def save(dtype: str = "fp32", **changes: object) -> Path:
        asked = {"family": "lstm", "num_hidden_layers": 3, "hidden_size": 48, "max_seq_length": 320, **changes}
        config = shapes.derive(ModelSection.model_validate(asked), len(tokenizer))[0]
        model = LSTM.random(config, 0)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.mul_(1.0 if "embed_tokens" in name else 4.0)
        folder = tmp_path / "model"
        folder.mkdir()
        hf.save(model, tokenizer, folder, dtype)
        return folder

    return save


def session(model: Path, folder: Path) -> ort.InferenceSession:
    folder.mkdir()
    lstm_graph.write(model, folder, hf.read_config(model), {"llmctl.model": "test"})
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_and_state_equal_torch(saved: Saved, tmp_path: Path, tied: bool, dtype: str) -> None:
    """An odd prompt, steps and a chunk, rows padded on the right by different amounts, the state handed back."""
    model = saved(dtype, tie_word_embeddings=tied)
    graph, torch_model = session(model, tmp_path / "onnx"), hf.load(model)
    ids = np.random.default_rng(0).integers(0, torch_model.config.vocab_size, (3, 40))
    rows = [(7, 1, 1, 20), (2, 1, 5, 1), (5, 1, 1, 9)]
    state = {"past.h": np.zeros((3, 3, 48), np.float32), "past.c": np.zeros((3, 3, 48), np.float32)}
    found: list[list[np.ndarray]] = [[], [], []]
    starts = np.zeros(3, int)
    for new in zip(*rows, strict=True):
        given = np.zeros((3, max(new)), np.int64)
        for row, (start, count) in enumerate(zip(starts, new, strict=True)):
            given[row, :count] = ids[row, start : start + count]
        lengths = np.array(new, np.int32)
        logits, h, c = graph.run(None, {"input_ids": given, "sequence_lengths": lengths, **state})
        state = {"past.h": h, "past.c": c}
        for row, count in enumerate(new):
            found[row].append(logits[row, :count])
        starts += new
    for row, pieces in enumerate(rows):
        text = torch.from_numpy(ids[row : row + 1, : sum(pieces)])
        with torch.inference_mode():
            expected, cache = torch_model(text)[0].numpy(), torch_model.new_cache()
            torch_model(text, cache)
        assert expected.std() > 0.5
        np.testing.assert_allclose(np.concatenate(found[row]), expected, atol=2e-5)
        np.testing.assert_allclose(state["past.h"][:, row], cache.h[:, 0].numpy(), atol=1e-5)
        np.testing.assert_allclose(state["past.c"][:, row], cache.c[:, 0].numpy(), atol=1e-5)


def test_the_last_logits_alone(saved: Saved, tmp_path: Path) -> None:
    graph = session(saved(), tmp_path / "onnx")
    given = {
        "input_ids": np.arange(12).reshape(2, 6),
        "sequence_lengths": np.array([6, 6], np.int32),
        "past.h": np.zeros((3, 2, 48), np.float32),
        "past.c": np.zeros((3, 2, 48), np.float32),
    }
    whole = graph.run(["logits"], given)[0]
    last = graph.run(["logits"], {**given, "logits_to_keep": np.array([1])})[0]
    assert last.shape[1] == 1
    np.testing.assert_array_equal(last, whole[:, -1:])


def test_the_layers_are_standard_operators(saved: Saved, tmp_path: Path) -> None:
    """One LSTM node a layer, of the standard domain; the head alone is ONNX Runtime's, to store a tied one once."""
    session(saved(), tmp_path / "onnx")
    nodes = onnx.load(str(tmp_path / "onnx/model.onnx"), load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("LSTM") == 3
    assert [node.op_type for node in nodes if node.domain] == ["FusedMatMul"]


def test_weights_that_do_not_fit_are_refused(saved: Saved, tmp_path: Path) -> None:
    model = saved()
    stated = read_json(model / "config.json")
    (tmp_path / "onnx").mkdir()
    write_json(model / "config.json", {**stated, "num_hidden_layers": 2})
    with pytest.raises(DataError, match=r"unexpected model\.lstm\.bias_hh_l2"):
        lstm_graph.write(model, tmp_path / "onnx", hf.read_config(model), {})
    write_json(model / "config.json", {**stated, "hidden_size": 40})
    with pytest.raises(DataError, match=r"model\.embed_tokens\.weight is \[298, 48\], not \[298, 40\]"):
        lstm_graph.write(model, tmp_path / "onnx", hf.read_config(model), {})


# ----------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def model(publish: Publish, saved: Saved) -> Artifact:
    folder = saved()
    return publish("pretrain", "model", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))


def test_the_gate_lets_it_through(model: Artifact, job: MakeJob) -> None:
    artifact = stage.export(job(model))
    report = json.loads((artifact.path / "parity.json").read_text())
    assert report["passed"]
    assert {check["case"] for check in report["logits"]} >= {"past N", "chunks", "padded batch, chunks"}
    assert report["error"] < 1e-5
    assert report["greedy"]["equal"] == report["greedy"]["tokens"] == 256
    names = {path.name for path in artifact.path.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "parity.json"}
    assert "genai_config.json" not in names


def test_gates_in_torchs_order_do_not_pass_for_onnxs(
    model: Artifact, job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lstm_graph, "GATES", (0, 1, 2, 3))
    with pytest.raises(GateError, match="not the model"):
        stage.export(job(model))
    monkeypatch.setattr(lstm_graph, "GATES", (0, 3, 1, 2))
    assert stage.export(job(model)).metrics["parity_error"] < 1e-5


@pytest.mark.parametrize("variant", ["hf", "gguf-q8_0"])
def test_other_tools_have_no_class_for_it(model: Artifact, job: MakeJob, variant: str) -> None:
    with pytest.raises(UsageError, match=f"{variant}: no other tool has a class for an LSTM") as caught:
        stage.export(job(model, variant))
    assert "llmctl export --onnx" in caught.value.hint
