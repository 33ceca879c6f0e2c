"""The portable profile: the standard's operators alone, the model's numbers however tokens arrive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from llmctl.device import Device
from llmctl.export import parity
from llmctl.export.form import Form
from llmctl.inference import exported as runners
from llmctl.inference.onnx_portable import PortableRunner
from llmctl.model import hf
from llmctl.model.config import FULL, SLIDING, Config, RopeScaling

PORTABLE = Form("portable")
CPU = Device("cpu", "test", 1, frozenset())
WINDOWS = {"sliding_window": 8, "layer_types": (SLIDING, FULL), "rope_local_theta": 500.0}
GEMMA = WINDOWS | {"attention_scale": 10**-0.5, "embedding_scale": 48**0.5, "rope_theta": 1e6}
CAPPED = GEMMA | {"rope_local_theta": None, "attn_logit_softcapping": 2.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, untied, biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "llama, heads of 12": ("llama", {"head_dim": 12}),
    "llama with YaRN": ("llama", {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=80)}),
    "mistral": ("mistral", {"sliding_window": 5, "layer_types": (SLIDING, SLIDING)}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", CAPPED | {"final_logit_softcapping": 3.0}),
    "gemma2, a key head for each": ("gemma2", CAPPED | {"num_key_value_heads": 4}),
    "gemma3": ("gemma3", GEMMA),
    "gpt2": ("gpt2", {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "num_attention_heads": 6, "head_dim": 8}),
}

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[..., Path]


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_passes_the_gate(name: str, shaped: Shaped, saved: Saved, exported: Exported) -> None:
    family, changes = SHAPES[name]
    config = shaped(family, max_position_embeddings=160, **changes)
    model = saved(config)
    folder = exported(model, PORTABLE)
    runner = runners.load(folder, CPU)
    assert isinstance(runner, PortableRunner)
    text = np.random.default_rng(0).integers(0, config.vocab_size, 300)
    report = parity.measure(hf.load_causal(model), runner, text, "noise")
    assert report["passed"], report["worst"]
    assert report["error"] < 2e-5
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 24)]


def test_a_plain_session_serves_it(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """Past in, present out, at one length: two rows that hold different numbers of tokens get different numbers."""
    config = shaped("qwen3")
    model = saved(config)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        exported(model, PORTABLE) / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    assert names == [
        "input_ids",
        "position_ids",
        *(f"past_key_values.{i}.{kv}" for i in range(2) for kv in ("key", "value")),
    ]
    past = {name: np.full((2, 2, 32, 16), np.float32(9)) for name in names[2:]}  # what lies there is never read
    texts = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    with torch.inference_mode():
        expected = hf.load(model)(torch.from_numpy(texts)).numpy()
    at = np.zeros(2, int)
    for new in ((3, 9), (8, 1), (1, 1)):
        ids, places = np.zeros((2, max(new)), np.int64), at[:, None] + np.arange(max(new))
        for b in range(2):
            ids[b, : new[b]] = texts[b, at[b] : at[b] + new[b]]
        logits, *present = session.run(None, {"input_ids": ids, "position_ids": places, **past})
        past = dict(zip(past, present, strict=True))
        for b in range(2):
            np.testing.assert_allclose(logits[b, : new[b]], expected[b, at[b] : at[b] + new[b]], atol=2e-5)
        at += new
