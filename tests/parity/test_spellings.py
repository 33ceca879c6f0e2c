"""Folders as hubs have them: old names, prefixes left out, heads of other tasks, a head beside the embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import hf, storage
from tests.parity.families import BERT, ids_of, reference, saved

Tensors = dict[str, Tensor]


def respell(folder: Path, change: Callable[[Tensors], Tensors], **stated: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **stated}))


def test_gpt2_as_openai_published_it(tmp_path: Path) -> None:
    """No prefix before the trunk's names, and the causal mask stored as a buffer."""
    theirs = reference("gpt2")

    def change(tensors: Tensors) -> Tensors:
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return plain | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}

    respell(saved(theirs, tmp_path), change)
    ids = ids_of(2, 9)
    torch.testing.assert_close(hf.load(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_bert_as_google_published_it(tmp_path: Path) -> None:
    """Heads for pretraining, of which the pairs' one is left aside; norms' tensors called gamma and beta."""
    torch.manual_seed(1)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()

    def change(tensors: Tensors) -> Tensors:
        spelled = {}
        for name, tensor in tensors.items():
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            spelled[old] = tensor
        return spelled

    respell(saved(theirs, tmp_path), change)
    ids = ids_of(2, 9)
    expected = theirs(ids).prediction_logits
    torch.testing.assert_close(hf.load(tmp_path)(ids), expected, atol=1e-4, rtol=1e-4)


def test_a_base_model_read_for_its_own_sake_keeps_its_pooler(tmp_path: Path) -> None:
    theirs = reference("bert base")
    saved(theirs, tmp_path)
    ours = hf.load(tmp_path)
    assert "head.dense.weight" in ours.state_dict()
    (tmp_path / "again").mkdir()
    hf.save(ours, tmp_path, tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )


@pytest.mark.parametrize("name", ["t5 v1.1", "llama, tied, llama3 rope"])
def test_a_head_stored_beside_its_embedding(name: str, tmp_path: Path) -> None:
    """config.json says tied; the file has both. With equal values that is a copy; with others a head of its own, as in
    Flan-T5 under transformers 5."""
    theirs = reference(name)
    saved(theirs, tmp_path)
    embedding = next(
        n for n in ("shared.weight", "model.embed_tokens.weight") if n in load_file(tmp_path / "model.safetensors")
    )
    respell(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()})
    assert hf.load(tmp_path).config.tie_word_embeddings
    other = torch.randn(hf.read_config(tmp_path).vocab_size, hf.read_config(tmp_path).hidden_size)
    respell(tmp_path, lambda tensors: tensors | {"lm_head.weight": other})
    ours = hf.load(tmp_path)
    assert not ours.config.tie_word_embeddings
    assert torch.equal(ours.head_weight(), other)


def test_shards_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above `SHARD` bytes there are several files and an index; transformers reads them too."""
    theirs = reference("qwen3")
    ours = hf.load(saved(theirs, tmp_path))
    for stale in ("model.safetensors",):
        assert (tmp_path / stale).is_file()
    monkeypatch.setattr(storage, "SHARD", 40_000)
    hf.save(ours, tmp_path, tmp_path)
    files = hf.tensor_files(tmp_path)
    assert len(files) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert all(path.stat().st_size < 60_000 for path in files)
    again = hf.load(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), theirs.parameters(), strict=True))
    monkeypatch.undo()
    hf.save(ours, tmp_path, tmp_path)
    assert [path.name for path in hf.tensor_files(tmp_path)] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_what_is_missing_and_what_is_too_much_is_listed_under_the_files_own_names(tmp_path: Path) -> None:
    saved(reference("bert"), tmp_path)

    def change(tensors: Tensors) -> Tensors:
        del tensors["bert.encoder.layer.1.attention.self.query.bias"]
        return tensors | {"bert.extra.weight": torch.ones(2), "bert.encoder.layer.0.output.dense.bias": torch.ones(3)}

    respell(tmp_path, change)
    with pytest.raises(DataError) as caught:
        hf.load(tmp_path)
    message = str(caught.value)
    assert "missing bert.encoder.layer.1.attention.self.query.bias [48]" in message
    assert "unexpected bert.extra.weight [2]" in message
    assert "bert.encoder.layer.0.output.dense.bias is [3], not [48]" in message


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gpt2", {"n_layer": 4}, "missing transformer.h.3"),
        ("gpt2", {"n_embd": 52}, "is \\[97, 48\\], not \\[97, 52\\]"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("bert", {"num_hidden_layers": 1}, "unexpected bert.encoder.layer.1"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"vocab_size": 10**12}, "not \\[1000000000000, 48\\]"),
        ("t5", {"num_decoder_layers": 2}, "unexpected decoder.block.2"),
        ("t5", {"d_model": "wide"}, "d_model is 'wide'"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "config.json"),
        ("modernbert", {"local_attention": "far"}, "config.json"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_a_config_that_lies_is_named(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    respell(saved(reference(name), tmp_path), lambda tensors: tensors, **changes)
    with pytest.raises(DataError, match=named):
        hf.load(tmp_path)
