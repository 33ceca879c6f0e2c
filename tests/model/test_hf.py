"""Model folders: written and read bit for bit, and refused with a name where something is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmctl.errors import DataError
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from tests.shapes import LLAMA, SHAPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.save(Decoder.random(LLAMA, 0), tmp_path, tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_saved_and_loaded_bit_for_bit(config: Config, tmp_path: Path) -> None:
    model = Decoder.random(config, 0)
    hf.save(model, tmp_path, tmp_path)
    loaded = hf.load(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    first = (tmp_path / "model.safetensors").read_bytes()
    hf.save(loaded, tmp_path, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_tied_weights_are_stored_once(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_stored_copy_of_the_tied_head_is_passed_over(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(state, folder / "model.safetensors")
    assert "lm_head.weight" not in hf.load(folder).state_dict()


@pytest.mark.parametrize(("dtype", "stated"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_half_precision(dtype: str, stated: str, tmp_path: Path) -> None:
    model = Decoder.random(LLAMA, 0)
    hf.save(model, tmp_path, tmp_path, dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == stated
    loaded = hf.load(tmp_path, dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(hf.DTYPES[dtype]))
    assert hf.load(tmp_path).head_weight().dtype == torch.float32


def test_tokenizer_files_are_copied_or_saved(folder: Path, tmp_path: Path) -> None:
    class Tokenizer:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("mine")

    model = hf.load(folder)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    hf.save(model, Tokenizer(), one)
    (one / "chat_template.jinja").write_text("template")
    (one / "artifact.json").write_text("{}")
    hf.save(model, one, two)
    assert sorted(path.name for path in two.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_shards_are_read(folder: Path) -> None:
    expected = hf.load(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    found = hf.load(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    extra = {**files, "model.norm.weight again": "model-00003-of-00002.safetensors"}
    save_file({"model.norm.weight": torch.zeros(48)}, folder / extra["model.norm.weight again"])
    index.write_text(json.dumps({"weight_map": extra}))
    with pytest.raises(DataError, match=r"model\.norm\.weight is stored twice"):
        hf.load(folder)

    shutil.copy(folder / files["model.norm.weight"], folder.parent / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {**files, "model.norm.weight": "../outside.safetensors"}}))
    with pytest.raises(DataError, match=r"\.\./outside"):
        hf.load(folder)


def test_loaded_weights_do_not_hang_on_the_file(folder: Path) -> None:
    model = hf.load(folder)
    before = model.head_weight().clone()
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.head_weight(), before)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 3)
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError) as caught:
        hf.load(folder)
    message = str(caught.value)
    assert "missing model.norm.weight [48]" in message
    assert "unexpected model.layers.9.mlp.up_proj.weight [2, 3]" in message
    assert "model.layers.0.self_attn.q_proj.weight is [4, 4], not [48, 48]" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:200],
        lambda data: data[:-100],
        lambda data: struct.pack("<Q", 1 << 60) + data[8:],
        lambda data: data[:9] + b"\xff" + data[10:],
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
    ],
    ids=["empty", "cut in the length", "cut in the header", "cut in the data", "huge header", "no JSON", "no dtype"],
)
def test_a_damaged_file_is_named(folder: Path, damage: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"model\.safetensors: "):
        hf.load(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no model\.safetensors") as caught:
        hf.load(folder)
    assert "pickle" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"architectures": ["LlamaForMusic"]}, "architectures names LlamaForMusic"),
        ({"auto_map": {"AutoModel": "model.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is None"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_what_is_not_built_is_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", **changes)
    with pytest.raises(DataError, match=named) as caught:
        hf.load(folder)
    assert caught.value.file == str(folder / "config.json")


def test_older_configs_are_read(folder: Path) -> None:
    """transformers 4 wrote the rotary parameters at the top, under other names."""
    path = folder / "config.json"
    stated = json.loads(path.read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "attention_bias"):
        del stated[key]
    scaling = {"type": "linear", "factor": 4}
    path.write_text(json.dumps({**stated, "rope_theta": 5e5, "rope_scaling": scaling}))
    config = hf.read_config(folder)
    assert (config.rope_theta, config.head_dim) == (5e5, 12)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 4.0)


def test_config_that_is_no_json_names_the_line(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(DataError, match="not JSON") as caught:
        hf.read_config(folder)
    assert caught.value.line == 2


@pytest.mark.parametrize(("pieces", "fits"), [(97, True), (96, True), (98, False), (1, True)])
def test_vocabulary_small(pieces: int, fits: bool, tmp_path: Path) -> None:
    check(LLAMA, pieces, fits, tmp_path)


@pytest.mark.parametrize(("pieces", "fits"), [(151_669, True), (4_096, False)])
def test_vocabulary_of_qwen(pieces: int, fits: bool, tmp_path: Path) -> None:
    """Qwen3's embedding has 151,936 rows for 151,669 pieces; another vocabulary is another matter."""
    check(Config(**{**fields(LLAMA), "vocab_size": 151_936}), pieces, fits, tmp_path)


def test_a_special_piece_for_images_needs_no_row(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has 262,145 pieces, the last for images; its text models have 262,144 rows."""
    gemma = replace(LLAMA, vocab_size=262_144)
    hf.check_vocabulary(gemma, 262_145, tmp_path, frozenset({262_144}))
    for pieces, special in ((262_145, frozenset[int]()), (262_160, frozenset(range(262_144, 262_160)))):
        with pytest.raises(DataError, match="262,144 rows"):
            hf.check_vocabulary(gemma, pieces, tmp_path, special)


def check(config: Config, pieces: int, fits: bool, folder: Path) -> None:
    if fits:
        hf.check_vocabulary(config, pieces, folder)
    else:
        with pytest.raises(DataError, match=f"{pieces:,} pieces.*{config.vocab_size:,} rows"):
            hf.check_vocabulary(config, pieces, folder)


def fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
