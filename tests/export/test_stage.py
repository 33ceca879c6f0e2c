"""The stage as the chain runs it: what is published, and that nothing is when the numbers are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, GateError, RunError
from llmctl.export import builder, hf, stage, sublayers, texts
from llmctl.export.builder import Graph
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.model import rotary
from llmctl.model.config import Config
from llmctl.text.shards import Writer
from llmctl.text.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸。\n" * 20

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Publish = Callable[..., Artifact]
MakeJob = Callable[..., Job]


@pytest.fixture
def data(publish: Publish, tokenizer: Tokenizer) -> Artifact:
    """A prep artifact with a validation split."""

    def fill(folder: Path) -> None:
        writer = Writer(folder, len(tokenizer), tokenizer.bos_id, tokenizer.eos_id or 0)
        for split in ("train", "val"):
            writer.add(split, tokenizer.encode(TEXT), len(TEXT.encode()))
        writer.close()

    return publish("prep", "tokens", fill)


@pytest.fixture
def model(publish: Publish, data: Artifact, shaped: Shaped, saved: Saved) -> Artifact:
    """A chat model two steps away from its data, as after pretrain and finetune."""
    folder = saved(shaped("qwen3"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("Apache License 2.0")

    def fill(to: Path) -> None:
        shutil.copytree(folder, to, dirs_exist_ok=True)

    base = publish("pretrain", "model", fill, {"data": data})
    return publish("finetune", "model", fill, {"model": base})


def test_an_export_holds_all_that_serving_needs(
    model: Artifact, data: Artifact, job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    made = job(model)
    artifact = stage.export(made)
    assert artifact.path == made.run.path / "export/finetune/onnx-ort"
    names = {path.name for path in artifact.path.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "parity.json", "config.json"}
    assert names >= {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
    }

    report = json.loads((artifact.path / "parity.json").read_text())
    assert report["text"]["name"] == f"the validation split of prep {data.short}"
    assert report["text"]["tokens"] > 500
    assert artifact.metrics["parity_error"] == report["error"] < 1e-5
    assert artifact.metrics["greedy_equal"] == artifact.metrics["greedy_tokens"] == 256
    assert artifact.metrics["bytes"] == sum(
        (artifact.path / name).stat().st_size for name in (builder.GRAPH, builder.WEIGHTS)
    )
    assert artifact.manifest["files"]["parity.json"]["log"]  # two equal runs make one identity
    properties = {item.key: item.value for item in onnx.load(artifact.path / "model.onnx").metadata_props}
    assert properties["llmctl.model"] == model.identity
    assert properties["llmctl.sha256.model.safetensors"] == model.manifest["files"]["model.safetensors"]["sha256"]

    printed = capsys.readouterr().out
    assert " export     onnx-ort " in printed
    assert "greedy 256/256 equal · perplexity +0.00 %" in printed
    runner = OnnxRunner(artifact.path, made.device)
    assert runner.eos_ids == (6, 2)
    assert runner.forward(np.array([[1, 50, 51]])).shape == (1, 1, runner.vocab_size)


def test_the_text_is_the_one_asked_for_or_a_built_in_one(
    model: Artifact, data: Artifact, job: MakeJob, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "mine.txt").write_text("ab" * 30)
    tokens, name = texts.gate_text(job(model, text="mine.txt"), model, tokenizer)
    assert (len(tokens), name) == (62, "mine.txt")  # <s>, 60 characters, </s>

    shutil.rmtree(data.path)  # as when runs/ was copied without it
    tokens, name = texts.gate_text(job(model), model, tokenizer)
    assert name == "builtin:python-stdlib"
    assert len(tokens) == texts.ENOUGH
    assert tokens[0] == tokenizer.bos_id

    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt"):
        texts.gate_text(job(model, text="empty.txt"), model, tokenizer)


def test_data_that_was_made_anew_is_not_the_lineage(model: Artifact, data: Artifact, publish: Publish) -> None:
    assert texts.training_data(model) == data
    publish("prep", "tokens", lambda folder: (folder / "other").write_text("other"))
    assert texts.training_data(model) is None


def test_a_wrong_graph_is_not_published(model: Artifact, job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage.export(job(model))

    def wrong(g: Graph, name: str, dtype: str = "", *, local: bool) -> tuple[str, str]:
        config = replace(g.config, rope_theta=1.2 * g.config.rope_theta)  # a little off: fluent, and wrong
        cos, sin = rotary.table(config, config.max_position_embeddings, local=local)
        return g.table(f"{name}.cos", cos.numpy()), g.table(f"{name}.sin", sin.numpy())

    monkeypatch.setattr(sublayers, "rotation", wrong)
    failing = job(model)
    with pytest.raises(GateError, match="the exported graph is not the model") as caught:
        stage.export(failing)
    assert "the first node that is: model.layers.0.self_attn.attended (GroupQueryAttention)" in caught.value.message
    kept = failing.work / "parity.json"
    assert str(kept) in caught.value.hint
    assert not json.loads(kept.read_text())["passed"]
    assert "rotary.cos" in json.loads(kept.read_text())["nodes"]["first"]["reads"]
    assert Artifact.open(before.path).identity == before.identity  # the last good one is whole
    before.verify()
    assert [path.name for path in before.path.parent.iterdir()] == ["onnx-ort"]


WINDOWS = {"sliding_window": 8, "layer_types": ("sliding_attention", "full_attention"), "rope_local_theta": 500.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("mistral", {"sliding_window": 5, "layer_types": ("sliding_attention",) * 2}),
        ("gemma3", WINDOWS | {"attention_scale": 10**-0.5, "embedding_scale": 48**0.5}),
        ("gpt2", {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}),
    ],
)
def test_every_decoder_passes_the_gate(
    family: str, changes: dict[str, Any], publish: Publish, shaped: Shaped, saved: Saved, job: MakeJob
) -> None:
    """However tokens arrive: chunks behind a past longer than a window, rows padded by different amounts."""
    folder = saved(shaped(family, **changes))
    model = publish("pretrain", "model", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))
    artifact = stage.export(job(model))
    report = json.loads((artifact.path / "parity.json").read_text())
    assert report["error"] < 2e-5
    assert report["greedy"]["equal"] == report["greedy"]["tokens"]


def test_two_exports_of_one_model_are_one_identity(model: Artifact, job: MakeJob) -> None:
    assert stage.export(job(model)).identity == stage.export(job(model)).identity


def test_a_config_that_llmctl_does_not_build_is_refused_by_name(
    publish: Publish, shaped: Shaped, saved: Saved, job: MakeJob
) -> None:
    folder = saved(shaped("qwen3"))
    stated = json.loads((folder / "config.json").read_text())

    def fill(to: Path) -> None:
        shutil.copytree(folder, to, dirs_exist_ok=True)

    for key, value in (("hidden_act", "mish"), ("quantization_config", {"bits": 4})):
        (folder / "config.json").write_text(json.dumps({**stated, key: value}))
        artifact = publish("import", "model", fill)
        for variant in ("onnx-ort", "hf"):
            with pytest.raises(DataError, match=key):
                stage.export(job(artifact, variant))


def test_hf_publishes_a_folder_that_transformers_loads(
    model: Artifact, data: Artifact, job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Artifact(model.path, {**model.manifest, "sources": {"hub/base": {"sha256": "", "licence": "mit"}}})
    artifact = stage.export(job(model, "hf"))
    assert artifact.place == "export/finetune/hf"
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        theirs, ours = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (model.path, artifact.path))
    assert torch.equal(theirs, ours)
    assert AutoTokenizer.from_pretrained(artifact.path).chat_template == "{{ messages[0].content }}"
    assert "loaded back, bit for bit the model" in capsys.readouterr().out

    card = (artifact.path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\n")
    lines = [
        f"- finetune `{model.short}`",
        "- pretrain `",
        f"- prep `{data.short}`",
        "| validation bits per byte | 1.366 |",
    ]
    assert all(line in card for line in lines)
    assert (artifact.path / "LICENSE").exists()


def test_a_copy_that_differs_is_not_published(model: Artifact, job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def flip(source: Path, target: Path) -> None:
        copy(source, target)
        if target.suffix == ".safetensors":
            with target.open("r+b") as file:
                file.seek(-4, 2)
                file.write(np.float32(3.0).tobytes())

    monkeypatch.setattr(hf.shutil, "copyfile", flip)
    made = job(model, "hf")
    with pytest.raises(RunError, match=r"is not the model: model\.\S+ differs"):
        stage.export(made)
    assert not (made.run.path / "export" / "finetune" / "hf").exists()
