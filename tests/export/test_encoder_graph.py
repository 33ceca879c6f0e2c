"""Encoders of every family, with every head and in both profiles, run by plain ONNX Runtime against transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, GateError
from llmctl.export import encoder_graph, stage, sublayers, tensorrt_support
from llmctl.export.builder import Graph
from llmctl.export.form import Form
from llmctl.inference.onnx_encoder import EncoderRunner
from llmctl.model import hf
from llmctl.recipe import Recipe
from tests.export.conftest import CPU, make_job
from tests.inference.encoders import MADE, write
from tests.parity import families

PROFILES = ("ort", "portable")
HEADED = families.MASKED | families.HEADS
IDS, MASK = families.ids_of(3, 40), torch.ones(3, 40, dtype=torch.int64)
MASK[1, 7:] = 0
MASK[2, 23:] = 0
IDS[MASK == 0] = 3  # transformers' classifiers find a text's end by this id
POOLED = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def exported(model: Path, profile: str) -> Path:
    """The folder of the graph, without the gate."""
    folder = model.with_name(f"{model.name}-{profile}")
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder_graph.write(model, folder, hf.read_config(model), {"llmctl.model": "test"}, Form(profile))  # type: ignore[arg-type]
    return folder


def run(folder: Path, mask: torch.Tensor = MASK, **more: torch.Tensor) -> dict[str, np.ndarray]:
    """Every output, by name."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    given = {"input_ids": IDS if mask is MASK else IDS.flip(1), "attention_mask": mask, **more}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: value.numpy() for name, value in given.items()}), strict=True))


def types_of(config: Any) -> dict[str, torch.Tensor]:
    """Which text of a pair each token is of, for models that ask."""
    if getattr(config, "type_vocab_size", 0) < 2:
        return {}
    return {"token_type_ids": (torch.arange(40) > 20).long().expand(3, 40)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADED)
def test_heads(name: str, tmp_path: Path) -> None:
    theirs = families.reference(name)
    model, types = families.saved(theirs, tmp_path / "model"), types_of(theirs.config)
    with torch.no_grad():
        said = theirs(IDS, attention_mask=MASK, **types)
    for profile in PROFILES:
        found = run(exported(model, profile), **types)
        for output, values in found.items():
            expected, whole = said[output].numpy(), values.ndim == 2 and values.shape[1] != 40
            real = slice(None) if whole else MASK.numpy().astype(bool)  # what padding says means nothing
            assert values.shape == expected.shape
            assert np.abs(values[real] - expected[real]).max() < 1e-5
    question = name.endswith("QuestionAnswering")
    assert set(found) == ({"start_logits", "end_logits"} if question else {"logits"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("name", families.BASES)
def test_embeddings(name: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that transformers has, and of them one vector a text of length 1; padding changes nothing."""
    monkeypatch.setitem(families.EVERY, name, families.BASES[name])
    theirs = families.reference(name)
    model, types = families.saved(theirs, tmp_path / "model"), types_of(theirs.config)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({POOLED[pooling]: True}))
    with torch.no_grad():
        states = theirs(IDS, attention_mask=MASK, **types).last_hidden_state
    real = MASK.bool()
    means = torch.stack([row[at].mean(0) for row, at in zip(states, real, strict=True)])
    lasts = torch.stack([row[at][-1] for row, at in zip(states, real, strict=True)])
    vectors = torch.nn.functional.normalize({"mean": means, "cls": states[:, 0], "last": lasts}[pooling], dim=-1)
    for profile in PROFILES:
        found = run(exported(model, profile), **types)
        assert set(found) == {"last_hidden_state", "sentence_embedding"}
        assert np.abs(found["last_hidden_state"][real.numpy()] - states[real].numpy()).max() < 2e-5
        assert np.abs(found["sentence_embedding"] - vectors.numpy()).max() < 1e-6


@pytest.mark.parametrize("profile", PROFILES)
def test_padding_on_the_left(profile: str, tmp_path: Path) -> None:
    """As Qwen3-Embedding's card pads: places are counted from the first real token, and no row of padding is NaN."""
    theirs, _ = write(tmp_path / "model", "qwen3")
    folder, mask = exported(tmp_path / "model", profile), MASK.flip(1)
    alone = []
    for ids, real in zip(IDS.flip(1), mask.bool(), strict=True):
        with torch.no_grad():
            states = theirs(ids[real][None]).last_hidden_state[0]
        alone.append(torch.nn.functional.normalize(states[-1], dim=0).numpy())
    found = run(folder, mask)
    assert np.isfinite(found["last_hidden_state"]).all()
    assert np.abs(found["sentence_embedding"] - np.stack(alone)).max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["modernbert", "RobertaForQuestionAnswering", "GPT2ForSequenceClassification"])
def test_the_portable_graph_is_of_the_standard_alone(name: str, tmp_path: Path) -> None:
    """And of what TensorRT's documents say it takes."""
    model = families.saved(families.reference(name), tmp_path / "model")
    graph = onnx.load(str(exported(model, "portable") / "model.onnx"), load_external_data=False)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 24)]
    given = {node.output[0]: node.op_type for node in graph.graph.node}
    for node in graph.graph.node:
        if node.op_type == "Attention":  # heads apart: TensorRT takes four dimensions alone
            assert {given[name] for name in node.input[:2]} <= {"RotaryEmbedding", "Transpose"}
            assert given[node.input[3]] == "Or"  # a bool mask
    assert tensorrt_support.unsupported(model.with_name("model-portable") / "model.onnx") == []
    fused = onnx.load(str(exported(model, "ort") / "model.onnx"), load_external_data=False)
    assert "FusedMatMul" in {node.op_type for node in fused.graph.node}


@pytest.mark.filterwarnings("ignore")
def test_what_the_graph_has_no_nodes_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ("LlamaForSequenceClassification", families.LLAMA | families.rope(rope_type="dynamic", factor=2.0))
    config = hf.read_config(families.saved(families.reference("LlamaForSequenceClassification"), tmp_path / "plain"))
    assert encoder_graph.unbuilt(config) == ""
    monkeypatch.setitem(families.EVERY, "dynamic", row)
    model = families.saved(families.reference("dynamic"), tmp_path / "model")
    assert encoder_graph.unbuilt(hf.read_config(model)) == ""  # its context ends where stretching would begin
    stretched = hf.read_config(model)
    longer = dataclasses.replace(stretched, max_position_embeddings=4 * stretched.max_position_embeddings)
    assert encoder_graph.unbuilt(longer) == "rope_scaling = dynamic"
    with pytest.raises(DataError, match="rope_scaling = dynamic"):
        encoder_graph.write(model, tmp_path, longer, {})


@pytest.fixture
def encoders(publish: Callable[..., Artifact], tmp_path: Path) -> Callable[[str], Artifact]:
    """Publishes a tiny sentence encoder as the model of a run."""

    def make(name: str) -> Artifact:
        return publish("import", "model", lambda folder: write(folder, name))

    return make


def job_of(model: Artifact, root: Path, **section: Any) -> Job:
    recipe = Recipe.model_validate({"name": "test", "export": section, "root": root, "file": root / "r.toml"})
    return make_job(root, f"export/{model.place}/onnx-ort", "export", {"model": model}, recipe)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("form", [("ort", "fp32"), ("portable", "fp32"), ("ort", "fp16")], ids="-".join)
def test_the_stage_publishes_what_passes(
    name: str, form: tuple[str, str], encoders: Callable[[str], Artifact], tmp_path: Path
) -> None:
    model = encoders(name)
    made = stage.export(job_of(model, tmp_path, profile=form[0], dtype=form[1]))
    report = json.loads((made.path / "parity.json").read_text())
    assert report["passed"]
    assert made.metrics["parity_error"] < (1e-5 if form[1] == "fp32" else 1e-2)
    cases = [found["case"] for found in report["logits"]]
    assert {"odd length", "padded batch", "padded batch, states"} <= set(cases)
    assert ("padded on the left" in cases) == (name == "qwen3")
    assert not (made.path / "genai_config.json").exists()  # onnxruntime-genai knows no encoders
    assert EncoderRunner(made.path, CPU).config.task == "embedding"


def test_nothing_is_published_that_is_not_the_model(
    encoders: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, model = sublayers.gains, encoders("bert")

    def wrong(g: Graph, name: str) -> list[str]:
        weight, *bias = right(g, name)
        return [weight, bias[0] if "embed" not in name else g.table(f"{name}.zero", np.zeros(48, np.float32))]

    monkeypatch.setattr(sublayers, "gains", wrong)
    monkeypatch.setattr(Graph, "__init__", forgiving(Graph.__init__))
    with pytest.raises(GateError, match="the exported graph is not the model"):
        stage.export(job_of(model, tmp_path))
    assert not list(tmp_path.rglob("export/**/artifact.json"))


def forgiving(build: Callable[..., None]) -> Callable[..., None]:
    """A graph that misses no tensor."""

    def built(g: Graph, *rest: Any) -> None:
        build(g, *rest)
        g.used.update(g.tensors)

    return built
