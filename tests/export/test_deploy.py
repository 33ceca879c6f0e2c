"""The programs of docs/deploy.md: a Triton repository from a graph, and an export under onnxruntime-web."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch

from llmctl.export.form import Form
from llmctl.model import hf
from llmctl.model.config import Config

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHOWN = {"tensor(float)": "FP32", "tensor(float16)": "FP16", "tensor(int64)": "INT64"}

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_repository", DOCS / "triton.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", [Form(), Form("portable"), Form(dtype="fp16")], ids=str)
def test_tritons_config_says_what_the_session_says(
    form: Form, triton: ModuleType, shaped: Shaped, saved: Saved, exported: Exported, tmp_path: Path
) -> None:
    folder = triton.place(exported(saved(shaped("llama")), form), tmp_path / "repository", "tiny")
    text = (folder / "config.pbtxt").read_text()
    assert text.startswith('name: "tiny"\nbackend: "onnxruntime"\nmax_batch_size: 0\n')
    line = r'^(input|output) \{ name: "(\S+)" data_type: TYPE_(\S+) dims: \[ (.+) \] \}$'
    found = {name: (kind, dtype, dims) for kind, name, dtype, dims in re.findall(line, text, re.MULTILINE)}
    session = ort.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    values = [("input", value) for value in session.get_inputs()] + [
        ("output", value) for value in session.get_outputs()
    ]
    expected = {
        value.name: (
            kind,
            SHOWN[value.type],
            ", ".join(str(dim if isinstance(dim, int) else -1) for dim in value.shape),
        )
        for kind, value in values
    }
    assert found == expected
    assert "logits_to_keep" not in found


@functools.cache
def onnxruntime_web() -> bool:
    """Whether node finds the package: npm install onnxruntime-web, and NODE_PATH where it is not beside the project."""
    node = shutil.which("node")
    command = ["node", "-e", "require.resolve('onnxruntime-web')"]
    return node is not None and subprocess.run(command, capture_output=True, check=False, cwd=DOCS).returncode == 0


def test_the_export_runs_under_onnxruntime_web(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """In WebAssembly, as a browser runs it: the same greedy ids."""
    if not onnxruntime_web():
        pytest.skip("needs node and the npm package onnxruntime-web")
    model = saved(shaped("qwen3"))
    decoder, ids = hf.load(model), [1, 50, 51]
    for _ in range(24):
        with torch.inference_mode():
            best = decoder(torch.tensor([ids]), last_only=True)[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-4  # no tie
        ids.append(int(best.indices[0]))
    assert len(np.unique(ids[3:])) > 8
    command = ["node", str(DOCS / "web.cjs"), str(exported(model)), "24", "1", "50", "51"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ids[3:]
