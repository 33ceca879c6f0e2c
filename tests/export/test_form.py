"""fp16 and bf16: what the weights become, what flows between the nodes, and what ONNX Runtime's CPU runs of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from llmctl.device import Device
from llmctl.errors import DataError, UnavailableError
from llmctl.export import parity
from llmctl.export.form import TYPES, Form, Profile
from llmctl.inference import exported as runners
from llmctl.model import hf
from llmctl.model.config import Config

CPU = Device("cpu", "test", 1, frozenset())
CAPPED: dict[str, Any] = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 8}
CAPPED |= {"layer_types": ("sliding_attention", "full_attention"), "attention_scale": 0.25}
Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[..., Path]


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("gemma2", CAPPED)], ids=["qwen3", "gemma2"])
def test_fp16_passes_the_gate(
    family: str, changes: dict[str, object], profile: Profile, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    model = saved(shaped(family, max_position_embeddings=160, **changes))
    runner = runners.load(exported(model, Form(profile, "fp16")), CPU)
    text = np.random.default_rng(0).integers(0, runner.vocab_size, 300)
    report = parity.measure(hf.load_causal(model), runner, text, "noise", "fp16")
    assert report["passed"], report["worst"]
    assert 1e-5 < report["error"] < 0.02
    logits = runner.forward(text[None, :9], last_only=False)
    assert logits.dtype == np.float32


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_all_that_flows_is_of_the_dtype(
    dtype: str, profile: Profile, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    """The writer has the whole graph checked, types and shapes included; the cache and the weights take half."""
    form = Form(profile, dtype)
    graph = onnx.load(exported(saved(shaped("gemma3")), form) / "model.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds["logits"] == TensorProto.FLOAT
    assert {kinds[name] for name in kinds if "key" in name} == {TYPES[dtype]}
    large = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    tables = {name for name in large if name.startswith("rotary")}
    assert {large[name] for name in large if name not in tables} == {TYPES[dtype]}
    # an angle's cosine in bf16 is off by 4e-3: portable rotates in fp32; GroupQueryAttention takes its own dtype alone
    assert {large[name] for name in tables} == {TensorProto.FLOAT if profile == "portable" else TYPES[dtype]}


@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_a_dtype_without_kernels_is_said_to_be_so(
    profile: Profile, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    folder = exported(saved(shaped("llama")), Form(profile, "bf16"))
    with pytest.raises(UnavailableError, match=r"can't run .* on the cpu") as caught:
        runners.load(folder, CPU)
    assert "--device cuda" in caught.value.hint


def test_bf16_weights_stay_what_they_are(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    model = saved(shaped("llama"), dtype="bf16")
    proto = onnx.load(exported(model, Form("portable", "bf16")) / "model.onnx")
    held = {tensor.name: tensor.raw_data for tensor in proto.graph.initializer}
    state = load_file(model / "model.safetensors")
    down = state["model.layers.1.mlp.down_proj.weight"].T.contiguous().view(torch.int16).numpy().tobytes()
    assert held["model.layers.1.mlp.down_proj.weight"] == down  # (in, out) here
    whole = state["model.embed_tokens.weight"].view(torch.int16).numpy().tobytes()
    assert held["model.embed_tokens.weight"] == whole


def test_a_weight_that_fp16_does_not_hold_is_refused(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    model = saved(shaped("llama"))
    state = load_file(model / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="beyond fp16's 65504"):
        exported(model, Form("portable", "fp16"))
    exported(model, Form("portable", "bf16"))
