"""Tiny models to export, as Hugging Face folders and as artifacts of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.artifact import Artifact, Job, Run, Settings
from llmctl.device import Device
from llmctl.export import genai, graph, hf
from llmctl.export.form import Form
from llmctl.model import hf as models
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.model.transformer import Decoder
from llmctl.recipe import Recipe
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer

CPU = Device("cpu", "test", 1, frozenset())
PLAIN = Form()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tokenizers.train([], type="byte")


@pytest.fixture
def shaped(tokenizer: Tokenizer) -> Callable[..., Config]:
    """A tiny config; grouped heads, so that a mix-up of heads shows."""

    def make(family: str, **changes: Any) -> Config:
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "head_dim": 16,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 320}
        ids = {"bos_token_id": 1, "eos_token_id": (6, 2), "pad_token_id": 3}
        switches = {**FAMILIES[family].switches, **sizes, **heads, **ids, **changes}
        return Config(family, **switches)

    return make


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Saves a random model whose norms are far from one and whose logits are far from even."""

    def save(config: Config, name: str = "model", dtype: str = "fp32") -> Path:
        model = Decoder.random(config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in model.parameters():
                low, spread = (0.5, 1.0) if tensor.ndim == 1 else (-0.2, 0.4)
                tensor.copy_(low + spread * torch.rand(tensor.shape, generator=generator))
        folder = tmp_path / name
        folder.mkdir()
        models.save(model, tokenizer, folder, dtype)
        return folder

    return save


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Writes the ONNX folder of a model, without the gate."""

    def export(model: Path, form: Form = PLAIN) -> Path:
        folder = tmp_path / f"{model.name}-{form.profile}-{form.dtype}"
        folder.mkdir()
        config = models.read_config(model)
        graph.write(model, folder, config, {"llmctl.model": "test"}, form)
        hf.copy_companions(model, folder)
        genai.write(folder, config)
        return folder

    return export


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Artifact]:
    """Publishes files as an artifact of the run at `tmp_path`/runs/test."""

    def make(
        place: str, kind: str, fill: Callable[[Path], object], inputs: Mapping[str, Artifact] | None = None
    ) -> Artifact:
        job = make_job(tmp_path, place, kind, inputs or {})
        with job.publishing() as staging:
            fill(staging.path)
            return staging.seal({"val_bits_per_byte": 1.366, "tokens": 2_900_000})

    return make


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """The job of an export of `model`."""

    def make(model: Artifact, variant: str = "onnx-ort", text: str = "", **export: Any) -> Job:
        recipe = Recipe.model_validate(
            {"name": "test", "export": {"text": text, **export}, "root": tmp_path, "file": tmp_path / "r.toml"}
        )
        return make_job(tmp_path, f"export/{model.place}/{variant}", "export", {"model": model}, recipe)

    return make


def make_job(root: Path, place: str, kind: str, inputs: Mapping[str, Artifact], recipe: Recipe | None = None) -> Job:
    made = recipe or Recipe.model_validate({"name": "test", "root": root, "file": root / "r.toml"})
    identities = {role: artifact.identity for role, artifact in inputs.items()}
    settings = Settings(kind, place.split("/")[0], 1, 0, {}, identities)
    return Job(made, Run(root / "runs" / "test"), place, settings, inputs, CPU)
