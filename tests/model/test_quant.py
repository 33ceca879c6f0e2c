"""Quantised folders: written, read back, read by compressed-tensors, and lying."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmctl.errors import DataError
from llmctl.inference.runners import TorchRunner
from llmctl.model import compressed, hf, quant
from llmctl.model.dynamic import DynamicHead, DynamicLinear
from llmctl.model.families import FAMILIES
from llmctl.model.quant import Quantized, Scheme
from tests import folders
from tests.shapes import LLAMA, SHAPES

INT4, SYMMETRIC = Scheme(4, 16, False), Scheme(4, 16, True)
SCHEMES = [INT4, SYMMETRIC, Scheme(4, 32, False), Scheme(8, 16, False), Scheme(8, 0, True), Scheme(8, 0, True, True)]
GPT2 = replace(LLAMA, **{"family": "gpt2", **FAMILIES["gpt2"].switches})
SHAPED = {**SHAPES, "gpt2, transposed and fused": GPT2}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def quantised(folder: Path, out: Path, scheme: Scheme) -> tuple[hf.Model, dict[str, Quantized]]:
    """Writes the model in `folder` quantised, every matrix alike, beside its other files."""
    model = hf.load(folder)
    native = model.state_dict()
    found = {name: quant.nearest(native[name], scheme) for name in quant.matrices(model)}
    shutil.copytree(folder, out)
    quant.write(model, found, out)
    return model, found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    quantised(folders.write(tmp_path / "plain"), tmp_path / "int4", INT4)
    return tmp_path / "int4"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "name", ["llama untied, biased", "qwen3 grouped, wide heads, untied", "gpt2, transposed and fused"]
)
def test_written_and_read_back(name: str, scheme: Scheme, tmp_path: Path) -> None:
    model, found = quantised(folders.write(tmp_path / "plain", SHAPED[name]), tmp_path / "small", scheme)
    again, loaded = quant.read(tmp_path / "small"), hf.load(tmp_path / "small")
    assert again.keys() == found.keys()
    for weight, matrix in found.items():
        assert again[weight].scheme == scheme
        assert torch.equal(again[weight].codes, matrix.codes)
        assert torch.equal(again[weight].scales, matrix.scales)
        assert (again[weight].zeros is None) == (matrix.zeros is None) == scheme.symmetric
        assert torch.equal(again[weight].values(), matrix.values())
    plain = model.state_dict()
    for weight, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, found[weight].values() if weight in found else plain[weight])
    assert loaded.config == model.config
    assert "quantization_config" not in loaded.config.carried  # what is finetuned from it is plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_reads_the_same_values(scheme: Scheme, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    _, found = quantised(
        folders.write(tmp_path / "plain", replace(LLAMA, hidden_size=64, intermediate_size=96, head_dim=16)),
        tmp_path / "q",
        scheme,
    )
    stated = quantization.QuantizationConfig.model_validate(
        json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    )
    stored, seen = load_file(tmp_path / "q/model.safetensors"), set()
    for group in stated.config_groups.values():
        decompressor = compressors.BaseCompressor.get_value_from_registry(group.format)
        for module in group.targets:
            parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.")}
            values = decompressor.decompress(parts, group)["weight"]
            assert torch.equal(values, found[f"{module}.weight"].values()), module
            seen.add(f"{module}.weight")
    assert seen == found.keys()


@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC, Scheme(8, 0, True)], ids=str)
def test_transformers_loads_the_folder(scheme: Scheme, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install --no-deps compressed-tensors loguru")
    transformers = pytest.importorskip("transformers")
    quantised(folders.write(tmp_path / "plain"), tmp_path / "small", scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    ours, ids = hf.load_causal(tmp_path / "small"), torch.arange(5, 25)[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=0)


def test_int8_products_round_what_they_read(tmp_path: Path) -> None:
    quantised(folders.write(tmp_path / "plain"), tmp_path / "small", Scheme(8, 0, True, True))
    model = hf.load_causal(tmp_path / "small")
    layer = model.get_submodule(Q_PROJ)
    assert isinstance(layer, DynamicLinear)
    assert isinstance(model.get_submodule("head_proj"), DynamicHead)  # the embedding is tied: its product rounds too
    x = torch.randn(3, layer.in_features)
    codes = (x / (x.abs().amax(-1, keepdim=True) / 127)).round()
    assert codes.abs().max() == 127
    product = (codes.int() @ quant.read(tmp_path / "small")[f"{Q_PROJ}.weight"].codes.int().sub(128).t()).float()
    scales = quant.read(tmp_path / "small")[f"{Q_PROJ}.weight"].scales.t() * (x.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(layer(x), product * scales, atol=1e-5, rtol=1e-4)
    ids = torch.arange(5, 25)[None]
    runner = TorchRunner(tmp_path / "small", _cpu())  # packs matrices, but not these
    torch.testing.assert_close(torch.from_numpy(runner.forward(ids.numpy(), None, False)), model(ids).detach())


def _cpu() -> Any:
    from llmctl.device import Device

    return Device("cpu", "test", 1, frozenset())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 75),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.integers(0, 99),
)
def test_nearest_is_within_half_a_step(
    rows: int, columns: int, bits: int, block: int, symmetric: bool, seed: int
) -> None:
    scheme = Scheme(bits, block, symmetric)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) ** 8
    matrix[0] = 0.0
    found = quant.nearest(matrix, scheme)
    assert found.codes.shape == matrix.shape
    assert found.scales.shape == (rows, scheme.blocks(columns))
    assert int(found.codes.max()) < 1 << bits
    steps = found.scales.repeat_interleave(scheme.width(columns), 1)[:, :columns]
    assert bool(((found.values() - matrix).abs() <= 0.5001 * steps).all())
    assert not found.values()[0].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 75), st.sampled_from([4, 8]), st.integers(0, 99))
def test_words_hold_their_codes(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    words = compressed.to_words(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(compressed.from_words(words, bits, columns), codes)


def test_the_block_that_a_row_takes() -> None:
    assert [quant.fitted(Scheme(4, 128, False), columns).block for columns in (704, 576, 48, 172)] == [64, 64, 16, 128]
    assert quant.fitted(Scheme(4, 32, True), 704) == Scheme(4, 32, True)


Tensors = dict[str, Tensor]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, f"{Q_PROJ}.{name}": change(tensors[f"{Q_PROJ}.{name}"]).contiguous()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != f"{Q_PROJ}.{name}"}


LIES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "too few codes": (changed("weight_packed", lambda t: t[:, 1:]), "weight_packed is I32"),
    "codes of another dtype": (changed("weight_packed", lambda t: t.float()), "weight_packed is F32"),
    "no codes": (without("weight_packed"), f"{Q_PROJ} does not fit its scheme: it has"),
    "no scales": (without("weight_scale"), f"{Q_PROJ} is quantised, but it has no scales"),
    "no zero points": (
        without("weight_zero_point"),
        "not weight_packed, weight_scale, weight_shape, weight_zero_point",
    ),
    "zero points not packed": (changed("weight_zero_point", lambda t: t.repeat(8, 1)), "weight_zero_point is I32"),
    "too many scales": (changed("weight_scale", lambda t: t.repeat(1, 2)), "weight_scale is F32 [48, 6]"),
    "a scale of zero": (changed("weight_scale", lambda t: t * (t != t[3, 1])), "a scale is not a positive number"),
    "a scale below zero": (changed("weight_scale", lambda t: -t), "a scale is not a positive number"),
    "a scale that is no number": (changed("weight_scale", lambda t: t * torch.nan), "a scale is not a positive number"),
    "an endless scale": (changed("weight_scale", lambda t: t / 0.0), "a scale is not a positive number"),
    "a huge shape": (changed("weight_shape", lambda t: torch.tensor([1 << 30, 1 << 30])), "shape [1,073,741,824,"),
    "a shape below zero": (changed("weight_shape", lambda t: -t), "shape [18,446,744"),
    "a shape of no rows": (changed("weight_shape", lambda t: 0 * t), "shape [0, 0]"),
    "another shape": (
        changed("weight_shape", lambda t: torch.tensor([64, 48])),
        "weight_packed is I32 [48, 6], not I32 [64",
    ),
    "a shape of three": (changed("weight_shape", lambda t: torch.tensor([48, 48, 1])), "weight_shape is no pair"),
    "scales of nothing": (
        lambda t: {**t, "model.norm.weight_scale": torch.ones(48, 1)},
        "no group of quantization_config",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_tensors_that_lie(lie: str, folder: Path) -> None:
    change, said = LIES[lie]
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    tracemalloc.start()
    try:
        for read in (hf.load, quant.read):
            with pytest.raises(DataError) as caught:
                read(folder)
            assert said in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


STATED: dict[str, tuple[Any, str]] = {
    "another method": ({"quant_method": "gptq", "bits": 4}, "is of 'gptq', which llmctl does not read"),
    "no object": (7, "quantization_config is of 7"),
    "no groups": ({"config_groups": {}}, "has no config_groups"),
    "a group that is no object": ({"config_groups": {"g": []}}, "has no config_groups"),
    "huge groups": ({"weights": {"group_size": 1 << 60}}, "in blocks of 1,152,921,504,606,846,976"),
    "groups of nothing": ({"weights": {"group_size": 0}}, "with group_size 0"),
    "groups that are no number": ({"weights": {"group_size": "16"}}, "with group_size '16'"),
    "three bits": ({"weights": {"num_bits": 3}}, "the weights {"),
    "floats": ({"weights": {"type": "float"}}, "the weights {"),
    "a regular expression": ({"targets": ["re:(a+)+b"]}, "a regular expression as a target"),
    "targets of numbers": ({"targets": [1]}, "targets that are no list of names"),
    "another layout": ({"format": "marlin-24"}, "the format 'marlin-24'"),
    "static inputs": ({"input_activations": {"num_bits": 8, "dynamic": False}}, "the input_activations"),
    "rounded outputs": ({"output_activations": {"num_bits": 8}}, "output_activations"),
    "a quantised cache": ({"kv_cache_scheme": {"num_bits": 8}}, "quantises the KV cache"),
}


@pytest.mark.parametrize("lie", STATED)
def test_configs_that_llmctl_does_not_read(lie: str, folder: Path) -> None:
    change, said = STATED[lie]
    plain = json.loads((folder / "config.json").read_text())["quantization_config"]
    if isinstance(change, Mapping) and not change.keys() & {"quant_method", "config_groups", "kv_cache_scheme"}:
        name, group = next(iter(plain["config_groups"].items()))
        change = {
            "config_groups": {name: {**group, **change, "weights": {**group["weights"], **change.get("weights", {})}}}
        }
    folders.edit(folder, quantization_config={**plain, **change} if isinstance(change, Mapping) else change)
    with pytest.raises(DataError) as caught:
        hf.load(folder)
    assert said in str(caught.value)


def test_codes_beyond_their_bits(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    native = quant.read(folder)
    for name, matrix in native.items():
        module = name.removesuffix(".weight")
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith(f"{module}.")}
        codes = matrix.codes.to(torch.int8) - 8
        codes[0, 0] = 8
        assert matrix.zeros is not None
        zeros = matrix.zeros.to(torch.int8) - 8
        stored |= {
            f"{module}.weight": codes,
            f"{module}.weight_scale": matrix.scales,
            f"{module}.weight_zero_point": zeros,
        }
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        group["format"] = "int-quantized"
    folders.edit(folder, quantization_config=config)
    with pytest.raises(DataError, match="a code lies beyond 4 bits"):
        hf.load(folder)
