"""Every family against transformers, on tiny random models: logits, gradients, padding, caches, and the way back.

fp32, 1e-4; measured 1e-6 to 2e-5 on 2026-11-22.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from llmctl.model import hf
from llmctl.model.transformer import Decoder, Encoder, EncoderDecoder
from tests.parity.families import BASES, DECODERS, EVERY, HEADS, MASKED, SEQ2SEQ, ids_of, reference, saved

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
torch.set_num_threads(1)


def both(name: str, folder: Path) -> tuple[Any, Any]:
    theirs = reference(name)
    return hf.load(saved(theirs, folder)), theirs


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_decoders(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    assert isinstance(ours, Decoder)
    for length in (1, 7, 30, 150):
        ids = ids_of(2, length)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_decoders(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids = ids_of(2, 30)
    loss(ours(ids), ids).backward()
    loss(theirs(ids).logits, ids).backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_either_side(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:], mask[2, :6] = False, False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(ours(ids, mask=mask)[mask], expected[mask], **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_equals_uncached(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids = ids_of(2, 40)
    expected, cache = theirs(ids).logits, ours.new_cache(2, 64)
    parts = [
        ours(ids[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 20), *((i, i + 1) for i in range(20, 40)))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_padded_batches_with_a_cache(name: str, tmp_path: Path) -> None:
    """What batched decoding does: prompts padded on the left, then a token at a time."""
    ours, theirs = both(name, tmp_path)
    ids, mask = ids_of(2, 24), torch.ones(2, 24, dtype=torch.bool)
    mask[1, :9] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    cache = ours.new_cache(2, 64)
    parts = [ours(ids[:, a:b], cache, mask=mask[:, :b]) for a, b in ((0, 12), *((i, i + 1) for i in range(12, 24)))]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    ours, _ = both(name, tmp_path)
    one, two = ids_of(1, 11, 1), ids_of(1, 14, 2)
    packed = torch.cat([one, two], 1)
    documents = torch.tensor([[0] * 11 + [1] * 14])
    positions = torch.tensor([[*range(11), *range(14)]])
    found = ours.logits(ours.hidden(packed, positions=positions, documents=documents))
    torch.testing.assert_close(found, torch.cat([ours(one), ours(two)], 1), **CLOSE)


@pytest.mark.parametrize("name", MASKED)
def test_masked_language_models(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    assert isinstance(ours, Encoder)
    ids, mask = ids_of(3, 40), torch.ones(3, 40, dtype=torch.bool)
    mask[1, 25:] = False
    ids[~mask] = 3
    theirs_logits, ours_logits = theirs(ids, attention_mask=mask.long()).logits, ours(ids, mask=mask)
    torch.testing.assert_close(ours_logits[mask], theirs_logits[mask], **CLOSE)
    torch.testing.assert_close(ours(ids[:1]), theirs(ids[:1]).logits, **CLOSE)
    loss(ours_logits[mask][None], ids[mask][None]).backward()
    loss(theirs_logits[mask][None], ids[mask][None]).backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    ids, mask = ids_of(3, 20), torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:] = False
    ids[~mask] = 3
    found, expected = ours(ids, mask=mask), theirs(ids, attention_mask=mask.long())
    if "QuestionAnswering" in name:
        wanted = torch.stack([expected.start_logits, expected.end_logits], -1)
    else:
        wanted = expected.logits
    whole = "Sequence" in name
    torch.testing.assert_close(found if whole else found[mask], wanted if whole else wanted[mask], **CLOSE)
    (found if whole else found[mask]).square().sum().backward()
    (wanted if whole else wanted[mask]).square().sum().backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("name", BASES)
def test_sentence_embeddings(name: str, pooling: str, tmp_path: Path) -> None:
    theirs = reference(f"{name} base")
    folder = saved(theirs, tmp_path)
    (folder / "1_Pooling").mkdir()
    key = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}[pooling]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{key}": True}))
    ours = hf.load(folder)
    ids, mask = ids_of(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    ids[~mask] = 3
    states = theirs(ids, attention_mask=mask.long()).last_hidden_state
    rows = {"cls": states[:, 0], "last": torch.stack([states[0, 19], states[1, 12]])}
    rows["mean"] = torch.stack([states[0].mean(0), states[1, :13].mean(0)])
    expected = torch.nn.functional.normalize(rows[pooling], dim=-1)
    torch.testing.assert_close(ours(ids, mask=mask), expected, **CLOSE)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoders(name: str, tmp_path: Path) -> None:
    ours, theirs = both(name, tmp_path)
    assert isinstance(ours, EncoderDecoder)
    ids, answer = ids_of(2, 60), ids_of(2, 50, 1)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, 33:] = False
    found = ours(ids, answer, mask=mask)
    expected = theirs(ids, attention_mask=mask.long(), decoder_input_ids=answer).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    loss(found, answer).backward()
    loss(expected, answer).backward()
    same_gradients(ours, theirs)
    cache, memory = ours.new_cache(2, 64), ours.encode(ids, mask)
    steps = [ours.decode(answer[:, :4], memory, mask=mask, cache=cache)]
    steps += [ours.decode(answer[:, i : i + 1], cache=cache) for i in range(4, 50)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Saved by llmctl: bit-equal weights under transformers' names, an equivalent config.json, and it loads there."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    ours, theirs = both(name, tmp_path / "theirs")
    hf.save(ours, tmp_path / "theirs", tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / side).to_dict() for side in ("theirs", "ours")]
    for stated in configs:
        for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
            stated.pop(key, None)
    # what transformers 5 does not read is there for older readers
    extra = configs[1].keys() - configs[0].keys()
    assert extra <= {
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "head_dim",
        "num_key_value_heads",
        "max_window_layers",
        "n_positions",
        "global_rope_theta",
        "local_rope_theta",
        "bos_token_id",
    }
    differing = {key: (configs[1].get(key), value) for key, value in configs[0].items() if configs[1].get(key) != value}
    assert not differing
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def same_gradients(ours: hf.Model, theirs: Any) -> None:
    """Every parameter's gradient, ours laid out as theirs are stored."""
    native = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = {
        name: hf.joined(entry, {p: native[p] for p in entry.parts})
        for name, entry in hf.layout(ours).items()
        if all(native[p] is not None for p in entry.parts)
    }
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) > 5
    assert found.keys() >= expected.keys() - {
        "cls.predictions.decoder.bias",
        "lm_head.decoder.bias",
        "lm_head.decoder.weight",
    }
    for name, gradient in expected.items():
        if name in found:
            torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
