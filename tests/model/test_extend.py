"""Models that grow with their vocabulary: what they knew stays, new pieces begin as what they were spelled with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmctl.errors import DataError
from llmctl.model import extend, hf
from llmctl.text import extension, tokenizer
from llmctl.text.tokenizer import Tokenizer
from tests.shapes import SHAPES
from tests.text.kinds import chinese, english


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    return tokenizer.train(english(), "bpe", 700)


@pytest.fixture(scope="module")
def extended(base: Tokenizer) -> Tokenizer:
    return extension.extend(base, chinese(), 80)


@pytest.mark.parametrize("shape", ["llama", "llama untied, biased", "qwen3"])
@pytest.mark.parametrize("padding", [0, 30, 200])
def test_what_the_model_knew_stays(shape: str, padding: int, base: Tokenizer, extended: Tokenizer) -> None:
    config = replace(SHAPES[shape], vocab_size=len(base) + padding)
    model = hf.random(config, 1)
    grown = extend.grow(model, base, extended)
    assert grown.config == replace(config, vocab_size=len(base) + max(80, padding))
    english_ids = torch.tensor([base.encode("The quick brown fox jumps over it.")])
    before, after = model(english_ids), grown(english_ids)
    torch.testing.assert_close(after[..., : len(base)], before[..., : len(base)], rtol=0, atol=1e-6)
    made_of = extension.parts(base, extended)
    assert made_of is not None
    weights, old = grown.head_weight(), model.head_weight()
    for index, ids in enumerate(made_of, len(base)):
        torch.testing.assert_close(weights[index], old[ids].mean(0))
    # A new piece's logit is the mean of its parts' logits; what a text says first is nearly as likely as before.
    first = after[0, -1, len(base)]
    torch.testing.assert_close(first, before[0, -1, made_of[0]].mean(), rtol=1e-4, atol=1e-5)


def test_a_masked_language_model_grows_too(base: Tokenizer, extended: Tokenizer) -> None:
    encoder = {"kind": "encoder", "family": "modernbert", "task": "masked-lm", "head_transform": "norm"}
    config = replace(SHAPES["llama"], **encoder, norm="layer", vocab_size=len(base))  # type: ignore[arg-type]
    model = hf.random(config, 1)
    model.head.bias.data.normal_()  # type: ignore[union-attr]
    grown = extend.grow(model, base, extended)
    ids = torch.tensor([base.encode("The quick brown fox.")])
    torch.testing.assert_close(grown(ids)[..., : len(base)], model(ids), rtol=0, atol=1e-5)
    made_of = extension.parts(base, extended)
    assert made_of is not None
    torch.testing.assert_close(grown.head.bias[-1], model.head.bias[made_of[-1]].mean())  # type: ignore[union-attr]


def test_the_grown_model_loads_in_transformers(base: Tokenizer, extended: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = hf.random(replace(SHAPES["qwen3"], vocab_size=len(base)), 1)
    grown = extend.grow(model, base, extended)
    hf.save(grown, extended, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n".join(chinese()[:8])
    ids = theirs(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :300]
    assert ids[0].tolist() == extended.encode(text)[:300]
    assert int(ids.max()) >= len(base)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(found, grown(ids), rtol=1e-4, atol=1e-4)


def test_another_tokenizer_is_refused(base: Tokenizer, extended: Tokenizer) -> None:
    model = hf.random(replace(SHAPES["llama"], vocab_size=len(extended)), 1)
    with pytest.raises(DataError, match="no extension"):
        extend.grow(model, extended, base)
