"""A GGUF file holds the model: read back by llmctl and, independently, by transformers; refused where it could not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, GateError
from llmctl.export import gguf, stage
from llmctl.model import gguf as reader
from llmctl.model import hf
from llmctl.model.config import Config, RopeScaling
from llmctl.model.families import FAMILIES
from llmctl.model.families.stated import config_from_json
from llmctl.model.transformer import Decoder
from llmctl.text import builtin
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer
from tests.project import Project

transformers = pytest.importorskip("transformers")

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸。\n" * 8
# Shapes that transformers reads out of a GGUF file without loss: it takes Qwen 3's and Gemma 3's size of a head, the
# length of GPT-2's table, Gemma's query scale and Gemma 2's caps for granted.
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied, wide heads": {"tie_word_embeddings": False, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 256, "sliding_window": 24, "num_key_value_heads": 1, **CAPS},
    "gemma3": {"head_dim": 256, "num_hidden_layers": 6, "sliding_window": 24, "num_key_value_heads": 1},
    "gpt2": {"max_position_embeddings": 1024, "num_key_value_heads": 3, "intermediate_size": 384},
}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A vocabulary of llmctl's own, of English, Chinese and code."""
    library = [text for text, _, _ in builtin.texts(builtin.STDLIB)]
    return tokenizers.train([*library[::40], TEXT], "bpe", 900)


@pytest.fixture
def tiny(bpe: Tokenizer, tmp_path: Path) -> Callable[..., tuple[Decoder, Path]]:
    """A random model whose weights fp16 holds exactly, and its folder."""

    def make(name: str, **changes: Any) -> tuple[Decoder, Path]:
        family = FAMILIES[name.partition(",")[0]]
        sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}
        heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 160}
        ids = {"vocab_size": len(bpe) + 3, "bos_token_id": 1, "eos_token_id": (6, 2), "pad_token_id": 3}
        shape = Config(name.partition(",")[0], **{**family.switches, **sizes, **heads, **ids, **SHAPES.get(name, {})})
        config = dataclasses.replace(shape, **family.fresh(shape))
        config = dataclasses.replace(config, **{**SHAPES.get(name, {}), **changes})
        if name == "gemma3":
            types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(6)]
            config = dataclasses.replace(config, layer_types=tuple(types))
        model = hf.random(config, 0)
        assert isinstance(model, Decoder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in model.parameters():
                low, spread = (0.5, 1.0) if tensor.ndim == 1 else (-0.15, 0.3)
                tensor.copy_((low + spread * torch.rand(tensor.shape, generator=generator)).half().float())
                if tensor.ndim == 1 and config.norm_offset:
                    tensor.copy_(tensor.bfloat16().float())  # so that 1 + w is exact
        folder = tmp_path / name
        folder.mkdir()
        hf.save(model.eval(), bpe, folder)
        return model, folder

    return make


def written(model: Decoder, folder: Path, kind: str = "f16", name: str = "model.gguf") -> Path:
    (folder / "gguf").mkdir(exist_ok=True)
    gguf.write(model, folder, folder / "gguf" / name, kind, {"general.name": "tiny"})
    return folder / "gguf" / name


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found = model(ids)
        return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_transformers_gives_the_logits_of_the_source(name: str, tiny: Callable[..., Any], bpe: Tokenizer) -> None:
    model, folder = tiny(name)
    ids = torch.tensor([bpe.encode(TEXT)[:72]])
    source = logits(model, ids)
    for kind in ("f16", "bf16", "q8_0", "q4_0"):
        path = written(model, folder, kind)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        found = logits(theirs, ids)
        ours, errors = gguf.restored(reader.read(path), model)
        assert (found - logits(ours, ids)).abs().max() < 1e-5 * found.abs().max(), kind
        if kind == "f16":
            assert (found - source).abs().max() < 1e-5 * source.abs().max(), kind
        assert max(errors.values()) <= gguf.KINDS[kind][1] + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_and_the_config_come_back(name: str, tiny: Callable[..., Any], bpe: Tokenizer) -> None:
    model, folder = tiny(name)
    tokens = np.array(bpe.encode(TEXT)[:120])
    for kind in gguf.KINDS:
        report = gguf.check(model, folder, written(model, folder, kind), kind, tokens, "text")
        assert report["passed"], report["worst"]
        exact = report["weights"]["exact"] == report["weights"]["tensors"]
        assert exact == (kind in ("f16", "f32")), kind
        assert (report["error"] < 1e-6) == exact
    family = "llama" if name == "mistral" else name.partition(",")[0]
    assert reader.read(folder / "gguf" / "model.gguf").architecture.name == family


def test_transformers_takes_the_tokenizer_beside_the_file(tiny: Callable[..., Any], bpe: Tokenizer) -> None:
    model, folder = tiny("llama")
    path = written(model, folder)
    bpe.save(path.parent)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in gguf.PROBES:
        assert theirs.encode(text, add_special_tokens=False) == bpe.encode(text)
    assert theirs.encode("a") == [bpe.bos_id, *bpe.encode("a")]


def test_the_bytes_follow_from_the_model(tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama")
    one, two = (written(model, folder, "q4_0", name).read_bytes() for name in ("one.gguf", "two.gguf"))
    assert one == two


@pytest.mark.parametrize(
    ("scaling", "kept"),
    [
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 20), "rope_freqs.weight"),
        (RopeScaling("linear", 2.0), "rope.scaling.type"),
        (RopeScaling("yarn", 4.0, original_max_position_embeddings=40), "rope.scaling.original_context_length"),
    ],
)
def test_stretched_rotary_embeddings_come_back(scaling: RopeScaling, kept: str, tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama", rope_scaling=scaling)
    path = written(model, folder)
    found = reader.read(path)
    config = config_from_json(found.config, path)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == (scaling.kind, scaling.factor)
    if scaling.kind != "linear":
        assert config.rope_scaling.original_max_position_embeddings == scaling.original_max_position_embeddings
    assert kept in found.file.tensors or f"llama.{kept}" in found.file.metadata
    assert "rope_freqs.weight" not in dict(found.tensors())


def test_rows_that_make_no_blocks_stay_plain(tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama", intermediate_size=150)
    types = {stored.name: stored.type for stored in reader.read(written(model, folder, "q4_0")).file.tensors.values()}
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 150
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_a_conversation_ends_where_the_model_ends_it(tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = reader.read(written(model, folder))
    assert found.generation_config == {"bos_token_id": 1, "eos_token_id": [6, 2], "pad_token_id": 3}
    assert found.tokenizer_files()["chat_template.jinja"] == b"{{ messages[0]['content'] }}"
    assert found.name == "tiny"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_scaling": RopeScaling("dynamic", 2.0)}, "rope_type is 'dynamic'"),
        ("mistral", {"sliding_window": 8, "layer_types": ("sliding_attention",) * 2}, "sliding_window is 8"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gemma3", {"attention_scale": 0.1}, "query_pre_attn_scalar is not 256"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(
    name: str, changes: dict[str, Any], said: str, tiny: Callable[..., Any]
) -> None:
    model, folder = tiny(name, **changes)
    with pytest.raises(DataError, match=said):
        written(model, folder)


def test_weights_beyond_fp16_are_refused(tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e5
    with pytest.raises(DataError, match="beyond F16's range"):
        written(model, folder)
    assert written(model, folder, "bf16").is_file()


def test_a_byte_vocabulary_is_refused(tiny: Callable[..., Any]) -> None:
    model, folder = tiny("llama")
    tokenizers.train([], "byte").save(folder)
    with pytest.raises(DataError, match="cannot hold"):
        written(model, folder)


def test_a_changed_file_does_not_pass(tiny: Callable[..., Any], bpe: Tokenizer) -> None:
    model, folder = tiny("llama")
    path, tokens = written(model, folder), np.array(bpe.encode(TEXT)[:120])
    stored = reader.read(path).file.tensors["blk.1.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(stored.start)
        file.write(np.full(stored.bytes // 2, 0.25, np.float16).tobytes())
    report = gguf.check(model, folder, path, "f16", tokens, "text")
    assert not report["passed"]
    assert report["worst"]["figure"] == "weights, model.layers.1.mlp.up_proj.weight"
    other = dataclasses.replace(model.config, rope_theta=500.0)
    with pytest.raises(GateError, match="rope_theta"):
        gguf.compare_configs(other, config_from_json(reader.read(path).config, path))


def test_the_stage_publishes_the_file(
    tiny: Callable[..., Any], publish: Callable[..., Artifact], job: Callable[..., Job], tmp_path: Path
) -> None:
    _, folder = tiny("llama")
    (tmp_path / "text.txt").write_text(TEXT)
    model = publish("pretrain", "model", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))
    made = stage.export(job(model, "gguf-f16", "text.txt"))
    files = {path.name for path in made.path.iterdir()}
    assert {"model.gguf", "parity.json", "tokenizer.json", "config.json", "artifact.json"} <= files
    report = json.loads((made.path / "parity.json").read_text())
    assert report["weights"]["exact"] == report["weights"]["tensors"] == 20
    assert made.metrics["perplexity_change"] == 0
    assert report["text"]["tokens"] > 50
    metadata = reader.read(made.path / "model.gguf").file.metadata
    assert metadata["general.name"] == "test"
    assert metadata["llmctl.model"] == model.identity


def test_from_the_command_line_and_back(finished: Project) -> None:
    done = finished.llmctl("export", "--gguf-type", "q8_0", "--json")
    assert done.code == 0, done.err
    folder = finished.run / "export" / "finetune" / "gguf-q8_0"
    assert Path(done.json["artifact"]).name == folder.name
    assert 0 < done.json["metrics"]["weight_error"] < 0.005
    finished.edit('formats = ["onnx"]', 'formats = ["onnx", "gguf"]\ngguf_type = "q4_0"')
    states = finished.llmctl("status", "--json").json["stages"]
    assert states["export/finetune/onnx-ort"]["state"] == "up to date"  # gguf_type is nothing to it
    assert states["export/finetune/gguf-q4_0"]["state"] == "missing"
    back = finished.llmctl("import", folder / "model.gguf", "--as", "back")
    assert back.code == 0, back.err
    imported = finished.path / "runs" / "back" / "import"
    before, after = (Tokenizer.load(place) for place in (finished.run / "finetune", imported))
    assert after.encode(TEXT) == before.encode(TEXT)
    assert (imported / "chat_template.jinja").read_text() == (
        finished.run / "finetune" / "chat_template.jinja"
    ).read_text()
    assert hf.read_config(imported).eos_ids == hf.read_config(finished.run / "finetune").eos_ids
    assert finished.llmctl("export", "--gguf-type", "q3").code == 2
