"""What an import keeps, bit for bit, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl import chain, target
from llmctl.artifact import Artifact
from llmctl.errors import DataError, LlmctlError
from llmctl.model import hf
from llmctl.text import builtin
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer
from tests import folders
from tests.shapes import LLAMA, SHAPES

FAMILIES = ["llama, tied, llama3 rope", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "bert", "roberta", "modernbert"]
FAMILIES += ["t5", "t5 v1.1", "bert base", "BertForSequenceClassification"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bring_in(folder: Path, **options: Any) -> Artifact:
    """`llmctl import FOLDER`, in this process."""
    found = target.bring_in(str(folder), **options)
    ((_, made, fresh),) = chain.make(
        found.recipe, found.run, chain.import_steps(found.recipe, found.run), chain.Options()
    )
    assert fresh
    made.verify()
    return made


def refused(folder: Path, **options: Any) -> LlmctlError:
    with pytest.raises(LlmctlError) as caught:
        bring_in(folder, **options)
    assert not list(Path().glob("runs/*/import"))
    assert not list(Path().rglob(".staging*"))
    return caught.value


def pieces(folder: Path) -> None:
    """A tokenizer of fewer pieces than any tiny model has rows."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {piece: index for index, piece in enumerate([*special, *"abcdefghij"])}
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **off} for i, name in enumerate(special)],
        **dict.fromkeys(("normalizer", "post_processor", "truncation", "padding")),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {**model, "max_input_chars_per_word": 100},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}'
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_kept_as_transformers_stores_it(name: str, tmp_path: Path) -> None:
    families = pytest.importorskip("tests.parity.families")
    folder = families.saved(families.reference(name).to(torch.bfloat16), tmp_path / "source")
    pieces(folder)
    made = bring_in(folder)
    assert (made.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (made.path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    theirs, ours = hf.load(folder), hf.load(made.path)
    assert made.metrics["parameters"] == sum(tensor.numel() for tensor in theirs.state_dict().values())
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_files_are_kept_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "My-Model-0.5B", dtype=dtype)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    made = bring_in(folder)
    assert made.path == Path("runs/My-Model-0.5B/import")
    kept = {path.relative_to(made.path) for path in made.path.rglob("*") if path.is_file()} - {Path("artifact.json")}
    assert kept == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} - {Path("README.md")}
    assert all((made.path / name).read_bytes() == (folder / name).read_bytes() for name in kept)
    (source,) = made.manifest["sources"].values()
    assert source["licence"] == "apache-2.0"
    assert set(made.metrics) == {"parameters", "bytes"}


def test_shards_stay_shards(tmp_path: Path) -> None:
    whole = folders.weights(folder := folders.write(tmp_path / "source"))
    folders.shard(folder)
    made = bring_in(folder)
    assert len(hf.tensor_files(made.path)) == 3
    found = folders.weights(made.path)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in whole.items())
    assert hf.load(made.path).state_dict().keys() == hf.load(folder).state_dict().keys()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_tied_weight_is_stored_once(parts: int, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    state = folders.weights(folder)
    extra = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    save_file({**state, **extra}, folder / "model.safetensors")
    if parts > 1:
        folders.shard(folder, parts)
    made = bring_in(folder)
    found = folders.weights(made.path)
    assert found.keys() == {*state, "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert torch.equal(hf.load(made.path).head_weight(), hf.load(folder).head_weight())


def test_a_second_head_of_other_values_is_a_head_of_its_own(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    state = folders.weights(folder)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    made = bring_in(folder)
    assert (made.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert hf.read_config(made.path).tie_word_embeddings is False


def test_a_run_and_an_artifact_are_sources_too(tmp_path: Path) -> None:
    first = bring_in(folders.write(tmp_path / "source"), name="one")
    for source, name in ((Path("runs/one"), "two"), (Path("runs/one/import"), "")):
        made = bring_in(source, name=name)
        assert made.path == Path("runs") / (name or "one-import") / "import"
        assert (made.path / "model.safetensors").read_bytes() == (first.path / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------ what is refused


CODE = {"AutoModelForCausalLM": "modeling_x.X"}
WANTS = "auto_map.AutoModelForCausalLM asks for code of the model's own (modeling_x.X)"


@pytest.mark.parametrize(
    ("file", "changes", "message", "hint"),
    [
        ("config.json", {"auto_map": CODE}, WANTS, "never runs it"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["t.X", None]}},
            "auto_map.AutoTokenizer asks",
            "never",
        ),
        ("config.json", {"model_type": "mixtral"}, "model_type is 'mixtral'", "; the nearest is mistral"),
        ("config.json", {"model_type": None}, "model_type is None, which llmctl does not build", "it builds bert, "),
        ("config.json", {"hidden_act": "xielu"}, "hidden_act is 'xielu'", ""),
        ("config.json", {"vocab_size": 330}, "model.embed_tokens.weight is [298, 48], not [330, 48]", ""),
        ("config.json", {"num_hidden_layers": 4}, "missing model.layers.3", ""),
        ("config.json", {"num_hidden_layers": 2}, "unexpected model.layers.2", ""),
    ],
)
def test_what_differs_is_named(file: str, changes: dict[str, Any], message: str, hint: str, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    folders.edit(folder, file, **changes)
    problem = refused(folder)
    assert problem.exit_code == 3
    assert message in problem.message
    assert hint in problem.hint
    assert str(folder) in (problem.file or "")


def test_modules_that_change_the_embedding_are_named(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    kinds = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps([{"type": kind} for kind in kinds]))
    assert (bring_in(folder).path / "modules.json").is_file()
    for extra in ("sentence_transformers.models.Dense", "my_code.Transformer"):
        (folder / "modules.json").write_text(json.dumps([{"type": kind} for kind in (*kinds, extra)]))
        with pytest.raises(DataError, match=f"asks for the module {extra}"):
            bring_in(folder, name="other")
    (folder / "modules.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        bring_in(folder, name="other")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder, other = folders.write(tmp_path / "source"), folders.write(tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    rows = state["model.embed_tokens.weight"].shape[0]
    for more, fits in ((-1, False), (0, True), (512, True), (513, False)):
        folders.edit(other, vocab_size=rows + more)
        table = torch.zeros(rows + more, 48, dtype=torch.bfloat16)
        save_file({**state, "model.embed_tokens.weight": table}, other / "model.safetensors")
        if fits:
            assert hf.read_config(bring_in(other, name=f"fits{more}").path).vocab_size == rows + more
        else:
            with pytest.raises(
                DataError, match=f"the tokenizer has {rows} pieces, but the model's embedding has {rows + more}"
            ):
                bring_in(other, name="misfit")
    assert not Path("runs/misfit/import").exists()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(folder).message


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refused(folder).message
    assert "holds no model.safetensors" in refused(folder, convert_pickle=True).message


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    folders.shard(folder)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    name = next(name for name, file in good.items() if file == first)
    for wrong in ({**good, name: second}, {**good, "ghost": first}):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert "but it is in" in refused(folder).message


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("parts", [1, 3])
def test_pickles_become_safetensors_when_asked(parts: int, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    state = folders.weights(folder)
    folders.pickle(folder, parts)
    problem = refused(folder)
    assert "pickled" in problem.message
    assert "--convert-pickle" in problem.hint
    made = bring_in(folder, convert_pickle=True)
    found = folders.weights(made.path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert not list(made.path.glob("*.bin"))


def test_what_a_pickle_stores_oddly_comes_out_right(tmp_path: Path) -> None:
    """Views of one storage, a transposed matrix, the tied head again, a parameter, the format before torch 1.6."""
    folder = folders.write(tmp_path / "source", replace(LLAMA, num_hidden_layers=1))
    state = folders.weights(folder)
    folders.pickle(folder)
    odd: dict[str, torch.Tensor] = dict(state)
    query = "model.layers.0.self_attn.q_proj.weight"
    odd[query] = state[query].t().contiguous().t()
    keys = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv"]
    both = torch.stack([state[key] for key in keys])
    odd |= {key: both[index] for index, key in enumerate(keys)}
    odd["lm_head.weight"] = odd["model.embed_tokens.weight"]
    odd["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    for legacy in (False, True):
        torch.save(odd, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        found = folders.weights(bring_in(folder, name=f"legacy-{legacy}", convert_pickle=True).path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


class Payload:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch hacked",))


class Hidden(dict[str, torch.Tensor]):
    """Weights that bring a payload along."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch hacked",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("payload", [Payload(), Hidden(), {"model.norm.weight": Payload()}, [Payload()]])
def test_a_payload_is_never_run(payload: object, legacy: bool, tmp_path: Path) -> None:
    """Fault 13, with the flag that opens pickles."""
    folder = folders.write(tmp_path / "source")
    folders.pickle(folder)
    torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    problem = refused(folder, convert_pickle=True)
    assert "nothing else is unpickled" in problem.message
    assert "pytorch_model.bin" in (problem.file or "")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload))
    assert "nothing else is unpickled" in refused(folder, convert_pickle=True).message
    assert not list(tmp_path.rglob("hacked"))
    torch.load(folder.parent / _trap(tmp_path), weights_only=False)  # the trap itself works
    assert (tmp_path / "hacked").exists()


def _trap(folder: Path) -> str:
    torch.save(Payload(), folder / "trap.bin")
    return "trap.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, not tensors by name"),
        ([torch.ones(3)], "holds a list"),
        ({"model.norm.weight": 3}, "which is no plain tensor"),
        ({3: torch.ones(3)}, "which is no plain tensor"),
        ({"x": torch.ones(3).to_sparse()}, "which is no plain tensor"),
        ({"x": torch.ones(1).expand(1 << 40)}, "holds fewer values"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, "is stored as torch.complex64"),
        ({}, "missing"),
    ],
)
def test_a_pickle_that_is_no_model(content: object, message: str, tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    folders.pickle(folder)
    torch.save(content, folder / "pytorch_model.bin")
    assert message in refused(folder, convert_pickle=True).message


def test_a_tensor_in_two_pickles(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    folders.pickle(folder, 2)
    state = torch.load(folder / "pytorch_model-0.bin", weights_only=True)
    torch.save({**state, "lm_head.weight": torch.ones(2, 2)}, folder / "pytorch_model-1.bin")
    assert "is also in another file" in refused(folder, convert_pickle=True).message


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "source")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    made = bring_in(folder, convert_pickle=True)
    assert (made.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("hacked"))


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights fp16 holds, and whose tokenizer a GGUF file can carry."""
    folder = folders.write(tmp_path_factory.mktemp("spoken") / "source", dtype="fp16")
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}
    pieces = tokenizers.train([*(text for text, _, _ in list(builtin.texts(builtin.STDLIB))[::60])], "bpe", 600)
    model = hf.random(replace(LLAMA, **shape, head_dim=32, vocab_size=len(pieces)), 0)
    hf.save(model, pieces, folder, "fp16")
    return folder


def as_gguf(folder: Path, path: Path, kind: str) -> Path:
    writer = pytest.importorskip("llmctl.export.gguf")
    writer.write(hf.load_causal(folder), folder, path, kind, {"general.license": "mit", "general.name": "Tiny"})
    return path


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "q8_0", "q4_0"])
def test_a_gguf_file(kind: str, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_gguf(spoken, tmp_path / "Tiny-0.1B.gguf", kind)
    made = bring_in(path)
    assert made.path == Path("runs/Tiny-0.1B/import")
    assert [entry["licence"] for entry in made.manifest["sources"].values()] == ["mit"]
    said = {"f16": "in fp16 and fp32 ", "bf16": "in bf16 and fp32 ", "f32": "in fp32 "}
    assert (
        said.get(kind, f"in fp32 of {kind.upper()}" if kind == "q8_0" else "in fp32 of Q4_0") in capsys.readouterr().out
    )
    theirs, ours = hf.load(spoken).state_dict(), hf.load(made.path).state_dict()
    assert ours.keys() == theirs.keys()
    step = {"f16": 0.0, "f32": 0.0, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}[kind]
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= step * tensor.abs().max(), name
    stored = folders.weights(made.path)
    kept = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == kept
    assert stored["model.norm.weight"].dtype == torch.float32
    assert json.loads((made.path / "config.json").read_text())["dtype"] == str(kept).removeprefix("torch.")
    source, copy = Tokenizer.load(spoken), Tokenizer.load(made.path)
    text = "def f(x):\n    return 'ünï' * 2\n"
    assert copy.encode(text) == source.encode(text)
    assert (made.path / "chat_template.jinja").read_text() == (spoken / "chat_template.jinja").read_text()
    assert hf.read_config(made.path).eos_ids == hf.read_config(spoken).eos_ids


def test_the_same_gguf_file_again_and_another_one(spoken: Path, tmp_path: Path) -> None:
    path = as_gguf(spoken, tmp_path / "x.gguf", "f16")
    first = bring_in(path, name="x")
    found = target.bring_in(str(path), "x")
    state = chain.states(found.recipe, found.run)["import"][1]
    assert state.word == "up to date"
    as_gguf(spoken, path, "q8_0")
    assert chain.states(found.recipe, found.run)["import"][1].reasons == (f"{path} changed (x.gguf)",)
    assert bring_in(path, name="x").identity != first.identity


def test_a_gguf_file_is_a_target(spoken: Path, tmp_path: Path) -> None:
    as_gguf(spoken, tmp_path / "x.gguf", "q8_0")
    found = target.resolve("x.gguf")
    assert found.artifact is not None
    assert found.artifact.path == Path("runs/x/import")
    assert "imported as runs/x" in found.said
    with pytest.raises(LlmctlError, match="would be imported into a run first"):
        target.resolve("x.gguf", dry_run=True)


def test_a_file_that_is_called_gguf_and_is_none(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"\x80\x04pickle", b"GGUF" + b"\xff" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        problem = refused(tmp_path / "x.gguf")
        assert problem.exit_code == 3
        assert "x.gguf" in str(problem)


# -------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
from llmctl import chain, target
from llmctl.importing import pickled, stage
from llmctl.model import hf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
found = target.bring_in("small", convert_pickle=True)
chain.make(found.recipe, found.run, chain.import_steps(found.recipe, found.run), chain.Options())
before = peak()
found = target.bring_in("large", convert_pickle=True)
chain.make(found.recipe, found.run, chain.import_steps(found.recipe, found.run), chain.Options())
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from Linux")
@pytest.mark.parametrize("kind", ["files", "tied"])
def test_the_peak_is_far_below_the_models_size(kind: str, tmp_path: Path) -> None:
    large = replace(SHAPES["llama"], hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    for name, config in (("small", LLAMA), ("large", replace(large, intermediate_size=8192, num_hidden_layers=8))):
        folder = folders.write(tmp_path / name, config)
        if kind == "tied":  # rewritten tensor by tensor
            state = folders.weights(folder)
            save_file(
                {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
            )
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 200e6
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < size / 8
