"""A cache in int8: its scales hold what the text shows, and the runner over it is the model within int8's tolerance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError

from llmctl import chain
from llmctl.errors import UsageError
from llmctl.export import kv_cache
from llmctl.export.form import Form
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.sublayers import Cache
from llmctl.model.transformer import Decoder
from llmctl.recipe import ExportSection
from tests.export.conftest import CPU


def decoder(folder: Path) -> Decoder:
    model = hf.load(folder)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_an_int8_cache_keeps_the_model(
    family: str,
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    exported: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it gives is what torch gives with keys and values rounded as they enter its cache."""
    folder = saved(shaped(family))
    model, tokens = decoder(folder), np.random.default_rng(0).integers(10, 290, 400)
    scales = kv_cache.scales(model, tokens)
    runner = OnnxRunner(exported(folder, Form(cache=scales)), CPU)
    cache = runner.new_cache(3, 40)
    assert next(iter(cache.buffers.values())).numpy().dtype == np.int8
    rows = np.stack([tokens[:30], tokens[50:80], tokens[100:130]])
    found = np.concatenate([runner.forward(rows[:, :20], cache), runner.forward(rows[:, 20:21], cache)], axis=1)
    with torch.inference_mode():
        plain = model(torch.from_numpy(rows[:, :21])).numpy()[:, 19:]

    def rounded(name: str, layer: int, values: torch.Tensor) -> torch.Tensor:
        scale = torch.from_numpy(scales[f"{layer}.{name}"])[None, :, None]
        return (values / scale).round().clamp(-128, 127) * scale

    append = Cache.append
    monkeypatch.setattr(
        Cache, "append", lambda self, i, k, v: append(self, i, rounded("key", i, k), rounded("value", i, v))
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(rows[:, :21]), cache=model.new_cache(3, 40)).numpy()[:, 19:]
    apart = np.abs(found - expected).max()
    assert (
        apart < 1e-3 * np.abs(expected).max() or apart < 0.2 * np.abs(plain - expected).max()
    )  # a tie rounds either way
    assert np.abs(plain - expected).max() > 1e-3
    copy = runner.select(cache, [2, 0])
    again = runner.forward(rows[[2, 0], 21:22], copy)
    straight = runner.forward(rows[:, 21:22], cache)
    np.testing.assert_allclose(again, straight[[2, 0]], atol=1e-5)


def test_the_scales_hold_the_largest_of_all_windows(
    shaped: Callable[..., Config], saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(saved(shaped("llama")))
    tokens = np.random.default_rng(1).integers(10, 290, 100)
    cache = model.new_cache(1, 100)
    with torch.inference_mode():
        model(torch.from_numpy(tokens[None]), cache=cache)
    values = cache.values[1, 0].abs().amax(1).numpy()  # (K, D), which no position turns
    found = kv_cache.scales(model, tokens)
    assert set(found) == {f"{layer}.{name}" for layer in (0, 1) for name in ("key", "value")}
    np.testing.assert_allclose(127 * found["1.value"], kv_cache.ROOM * values, rtol=1e-5)
    monkeypatch.setattr(kv_cache, "WINDOW", 30)
    first = kv_cache.scales(model, tokens[:30])["0.value"]
    whole = kv_cache.scales(model, tokens)["0.value"]
    assert (whole >= first).all()
    assert (whole > first).any()


def test_the_graph_is_clean_and_says_int8(
    shaped: Callable[..., Config], saved: Callable[..., Path], exported: Callable[..., Path]
) -> None:
    folder = saved(shaped("llama"))
    scales = kv_cache.scales(decoder(folder), np.arange(10, 200))
    path = exported(folder, Form(cache=scales)) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    kinds = {value.type.tensor_type.elem_type for value in onnx.load(path, load_external_data=False).graph.input[2:-1]}
    assert kinds == {onnx.TensorProto.INT8}


def test_where_there_is_none() -> None:
    section = ExportSection.model_validate({"kv_cache": "int8"})
    assert chain.variant("onnx", section) == "onnx-ort-kv8"
    quantised = ExportSection.model_validate({"kv_cache": "int8", "quantize": "int4"})
    assert chain.variant("onnx", quantised) == "onnx-ort-int4-kv8"
    assert chain.variant("hf", quantised) == "hf-int4"
    for more in ({"profile": "portable"}, {"formats": ["tensorrt"]}, {"formats": ["hf", "onnx"]}):
        with pytest.raises(ValidationError, match="no quantised cache"):
            ExportSection.model_validate({"kv_cache": "int8", **more})


def test_only_a_decoder_has_one(
    shaped: Callable[..., Config], tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "load", lambda folder, device: hf.build(shaped("bert", kind="encoder", task="masked-lm")))
    with pytest.raises(UsageError, match="only a decoder"):
        kv_cache.calibrated(tmp_path, np.arange(10), torch.device("cpu"))
