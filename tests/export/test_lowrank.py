"""A LoRA adapter beside the base model's graph: together the merged model, alone the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, UsageError
from llmctl.export import stage
from llmctl.inference import exported
from llmctl.inference.onnx_runner import ADAPTER
from llmctl.model import hf, lora
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from llmctl.text.tokenizer import Tokenizer

Publish = Callable[..., Artifact]
IDS = np.random.default_rng(0).integers(0, 250, (1, 40))


@pytest.fixture
def finetuned(
    publish: Publish, shaped: Callable[..., Config], saved: Callable[..., Path], tokenizer: Tokenizer
) -> Callable[..., Artifact]:
    """A model with an adapter on some of its projections, two runs away from nothing."""

    def make(targets: tuple[str, ...], **changes: Any) -> Artifact:
        folder = saved(shaped("llama", max_position_embeddings=96, **changes))
        base = publish("pretrain", "model", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))
        model = hf.load(folder)
        assert isinstance(model, Decoder)
        lora.apply(model, 4, 8.0, targets, seed=0)
        with torch.no_grad():
            for layer in lora.layers(model).values():
                layer.lora_B.weight.uniform_(-0.3, 0.3)

        def fill(to: Path) -> None:
            lora.save_adapter(model, to / "adapter")
            hf.save(lora.merge(model), tokenizer, to)

        return publish("finetune", "model", fill, {"model": base})

    return make


def logits(model: Path) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = hf.load_causal(model)(torch.from_numpy(IDS)).numpy()
    return found


@pytest.mark.parametrize(
    ("profile", "targets", "changes"),
    [
        ("ort", ("q_proj", "v_proj"), {}),
        ("portable", ("all-linear",), {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}),
    ],
)
def test_the_graph_is_the_merged_model_with_it_and_the_base_without(
    profile: str, targets: tuple[str, ...], changes: dict[str, Any], finetuned: Any, job: Callable[..., Job]
) -> None:
    model = finetuned(targets, **changes)
    artifact = stage.export(job(model, f"onnx-{profile}", adapter="apart", profile=profile))
    assert json.loads((artifact.path / "parity.json").read_text())["error"] < 1e-4
    merged, base = logits(model.path), logits(model.input("model").path)
    assert np.abs(merged - base).max() > 0.1
    runner: Any = exported.load(artifact.path, job(model).device)
    np.testing.assert_allclose(runner.forward(IDS, last_only=False), merged, atol=1e-4)

    held = ort.LoraAdapter()
    held.Load(str(artifact.path / ADAPTER))
    active = ort.RunOptions()
    active.add_active_adapter(held)
    given: dict[str, np.ndarray] = {
        value.name: np.zeros((1, 2, 40, 16), np.float32) for value in runner.session.get_inputs()[2:]
    }
    second = runner.session.get_inputs()[1].name
    place = np.arange(40)[None] if second == "position_ids" else np.ones((1, 40), np.int64)
    if profile == "ort":
        given = {name: values[:, :, :0] for name, values in given.items()}
    given |= {"input_ids": IDS, second: place}
    for options, expected in ((active, merged), (None, base)):
        np.testing.assert_allclose(runner.session.run(["logits"], given, options)[0], expected, atol=1e-4)


def test_what_can_not_be_kept_apart_is_refused(finetuned: Any, publish: Publish, job: Callable[..., Job]) -> None:
    model = finetuned(("q_proj",))
    plain = model.input("model")
    with pytest.raises(UsageError, match="has no adapter/"):
        stage.export(job(plain, adapter="apart"))
    artifact = stage.export(job(model, adapter="apart"))
    (artifact.path / ADAPTER).write_bytes(b"no adapter" * 20)
    with pytest.raises(DataError, match="is no adapter"):
        exported.load(artifact.path, job(model).device)
    other = ort.AdapterFormat()
    other.set_parameters({"elsewhere": ort.OrtValue.ortvalue_from_numpy(np.zeros((2, 2), np.float32))})
    other.export_adapter(str(artifact.path / ADAPTER))
    with pytest.raises(DataError, match="has no place in the graph"):
        exported.load(artifact.path, job(model).device)
    shutil.rmtree(plain.path)
    with pytest.raises(UsageError, match="is not here"):
        stage.export(job(model, adapter="apart"))
