"""`llmctl eval` of what was exported to ONNX: models that fill in what is hidden score what they do in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.recipe import ModelSection
from llmctl.text import tokenizer as tokenizers
from tests.warm import Warm

TEXT = "The quick brown fox jumps over the lazy dog, and the dog jumps after it. " * 40


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_the_export_scores_what_the_model_does(family: str, warm: Warm, tmp_path: Path) -> None:
    tokenizer = tokenizers.train([TEXT], "bpe", 340)
    section = ModelSection(family=family, num_hidden_layers=2, hidden_size=64, max_seq_length=48)
    model = hf.random(shapes.derive(section, len(tokenizer))[0], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    (tmp_path / "model").mkdir()
    hf.save(model, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    assert warm.run("import", tmp_path / "model", "--as", "it", cwd=tmp_path).code == 0
    done = warm.run("export", "runs/it", "--onnx", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    scores = []
    for subject in ("runs/it", "runs/it/export/import/onnx-ort"):
        done = warm.run("eval", subject, "--set", f'eval.text=["{tmp_path}/text.txt"]', "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        scores.append(done.json["metrics"])
    assert scores[1]["val_loss"] == pytest.approx(scores[0]["val_loss"], rel=1e-6)
    assert scores[1]["val_accuracy"] == scores[0]["val_accuracy"]
    assert scores[1]["weights_sha256"] != scores[0]["weights_sha256"]
