"""T5 as two graphs, run by plain ONNX Runtime the way optimum runs them, against transformers."""

from __future__ import annotations

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
from llmctl.errors import GateError
from llmctl.export import seq2seq_graph, stage, tensorrt_support
from llmctl.export.form import Form
from llmctl.model import config as shapes
from llmctl.model import hf, trunk
from llmctl.recipe import ModelSection, Recipe
from llmctl.text.tokenizer import Tokenizer
from tests.export.conftest import make_job
from tests.parity import families

PROFILES = ("ort", "portable")
SOURCE, TARGET = families.ids_of(3, 90), families.ids_of(3, 50, seed=1)  # farther apart than the last bucket
MASK = torch.ones(3, 90, dtype=torch.int64)
MASK[0, 70:] = 0
MASK[2, :9] = 0


def exported(model: Path, profile: str) -> Path:
    """The folder of the graphs, without the gate."""
    folder = model.with_name(f"{model.name}-{profile}")
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    seq2seq_graph.write(model, folder, hf.read_config(model), {"llmctl.model": "test"}, Form(profile))  # type: ignore[arg-type]
    return folder


class Optimum:
    """What ORTModelForSeq2SeqLM does with the folder: caches of no tokens at first, then what came out.

    It hands the states of the encoder over with every step, and keeps the caches of the source as they came first.
    """

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.encoder, self.decoder = (
            ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("encoder_model.onnx", "decoder_model_merged.onnx")
        )

    def read(self, ids: np.ndarray, mask: np.ndarray) -> None:
        (states,) = self.encoder.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        self.source = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        names = [value.name for value in self.decoder.get_inputs() if value.name.startswith("past")]
        self.past = {name: np.zeros((len(ids), 4, 0, 12), np.float32) for name in names}

    def step(self, ids: np.ndarray) -> np.ndarray:
        names = [value.name for value in self.decoder.get_outputs()]
        found = dict(zip(names, self.decoder.run(names, {"input_ids": ids, **self.source, **self.past}), strict=True))
        first = not next(iter(self.past.values())).shape[2]
        for name, value in found.items():
            if name.startswith("present") and (first or ".decoder." in name):
                self.past[name.replace("present", "past_key_values")] = value
        return np.asarray(found["logits"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.SEQ2SEQ)
def test_transformers_says_the_same(name: str, tmp_path: Path) -> None:
    """Sources padded on both sides; the target in pieces: its first token, one more, the others."""
    theirs = families.reference(name)
    model = families.saved(theirs, tmp_path / "model")
    with torch.no_grad():
        expected = theirs(input_ids=SOURCE, attention_mask=MASK, decoder_input_ids=TARGET).logits.numpy()
    for profile in PROFILES:
        client = Optimum(folder := exported(model, profile))
        client.read(SOURCE.numpy(), MASK.numpy())
        pieces = [client.step(TARGET.numpy()[:, start:end]) for start, end in ((0, 1), (1, 2), (2, 50))]
        found = np.concatenate(pieces, axis=1)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert [tensorrt_support.unsupported(graph) for graph in folder.glob("*.onnx")] == [[], []]


@pytest.mark.filterwarnings("ignore")
def test_optimum_s_names_over_one_file_of_weights(tmp_path: Path) -> None:
    model = families.saved(families.reference("t5"), tmp_path / "model")
    folder = exported(model, "ort")
    graphs = {
        name: onnx.load(str(folder / name), load_external_data=False)
        for name in ("encoder_model.onnx", "decoder_model_merged.onnx")
    }
    encoder, decoder = (graph.graph for graph in graphs.values())
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    past = [value.name for value in decoder.input if value.name.startswith("past")]
    assert past[:4] == [
        f"past_key_values.0.{whose}.{kv}" for whose in ("decoder", "encoder") for kv in ("key", "value")
    ]
    assert [value.name for value in decoder.output] == [
        "logits",
        *(name.replace("past_key_values", "present") for name in past),
    ]
    assert len(past) == 4 * 3
    places = {
        graph.name: {t.external_data[1].value for t in graph.initializer if t.name == "embed_tokens.weight"}
        for graph in (encoder, decoder)
    }
    assert places["encoder"] == places["decoder"]  # the embedding, and the head that is tied to it, lie there once
    weights = sum(parameter.numel() for parameter in hf.load(model).parameters())
    assert (folder / "model.onnx.data").stat().st_size < 4 * weights + 4096 * 80


@pytest.mark.filterwarnings("ignore")
def test_optimum_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greedy and its beam search are transformers'."""
    optimum = pytest.importorskip(
        "optimum.onnxruntime", reason="needs optimum-onnx, which (0.1) takes transformers 4", exc_type=ImportError
    )
    kind, options = families.SEQ2SEQ["t5"]
    monkeypatch.setitem(families.EVERY, "even", (kind, options | {"num_decoder_layers": 2}))
    theirs = families.reference("even")
    model = families.saved(theirs, tmp_path / "model")
    for profile in PROFILES:
        ours = optimum.ORTModelForSeq2SeqLM.from_pretrained(exported(model, profile))
        for beams in (1, 3):
            asked = {"input_ids": SOURCE, "attention_mask": MASK, "max_new_tokens": 20, "num_beams": beams}
            assert ours.generate(**asked).tolist() == theirs.generate(**asked).tolist()


@pytest.fixture
def t5(publish: Callable[..., Artifact], tokenizer: Tokenizer) -> Artifact:
    """A tiny random T5 with sharp opinions."""
    section = ModelSection(family="t5", num_hidden_layers=2, hidden_size=64, max_seq_length=64)
    model = hf.random(shapes.derive(section, len(tokenizer))[0], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return publish("pretrain", "model", lambda folder: hf.save(model, tokenizer, folder))


def job_of(model: Artifact, root: Path, **section: Any) -> Job:
    recipe = Recipe.model_validate({"name": "test", "export": section, "root": root, "file": root / "r.toml"})
    return make_job(root, f"export/{model.place}/onnx-ort", "export", {"model": model}, recipe)


@pytest.mark.parametrize("form", [("ort", "fp32"), ("portable", "fp32"), ("portable", "fp16")], ids="-".join)
def test_the_stage_publishes_what_passes(form: tuple[str, str], t5: Artifact, tmp_path: Path) -> None:
    made = stage.export(job_of(t5, tmp_path, profile=form[0], dtype=form[1]))
    report = json.loads((made.path / "parity.json").read_text())
    assert report["passed"]
    assert report["greedy"]["tokens"] == 63
    assert {"past 0", "past 1", "past N", "padded sources"} <= {found["case"] for found in report["logits"]}
    assert made.metrics["parity_error"] < (1e-5 if form[1] == "fp32" else 3e-2)


def test_nothing_is_published_that_is_not_the_model(
    t5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias that takes what is ahead for what is behind."""
    right = trunk.buckets
    monkeypatch.setattr(
        trunk,
        "buckets",
        lambda c, distance, causal: right(c, -distance if len(distance) > 99 else distance, causal=causal),
    )
    with pytest.raises(GateError, match="the exported graph is not the model"):
        stage.export(job_of(t5, tmp_path))
    assert not list(tmp_path.rglob("export/**/artifact.json"))
