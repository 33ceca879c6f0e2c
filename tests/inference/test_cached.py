"""Decoding with a cache gives what a whole pass gives, token for token: every family, any pieces, any batch."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.inference.generate import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import hf, packed
from llmctl.model.config import Config
from llmctl.model.sublayers import Block, RMSNorm
from llmctl.model.transformer import EncoderDecoder

pytest.importorskip("transformers")

from tests.parity.families import DECODERS, SEQ2SEQ, reference, saved

LSTM = Config("lstm", 97, 24, 24, 2, 1, 1, 24, 160, kind="recurrent", positions="none", eos_token_id=2)
WRITERS = [*DECODERS, *SEQ2SEQ, "lstm"]


@functools.cache
def model_of(name: str, packs: bool = False) -> Any:
    """A tiny random model, with its matrices as training holds them, or packed as a runner packs them."""
    if name == "lstm":
        return hf.random(LSTM, 0).eval()
    with TemporaryDirectory() as folder:
        model = hf.load(saved(reference(name), Path(folder)))
    if packs:
        packed.pack(model)
    return model


def whole(model: Any, prompt: list[list[int]], said: list[list[int]]) -> np.ndarray:
    """(B, T, V) logits of all that is `said` (behind the prompt, of a decoder), without a cache."""
    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            return model(torch.tensor(prompt), torch.tensor(said)).numpy()
        return model(torch.tensor(said)).numpy()


@pytest.mark.parametrize("packs", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", WRITERS)
def test_greedy_tokens(name: str, packs: bool) -> None:
    model, prompt = model_of(name, packs), [5, 17, 44, 9, 23, 31]
    runner = TorchRunner.of(model)
    said = list(runner.start_ids) or list(prompt)
    for token in generate(runner, prompt, Sampling(0.0, max_tokens=40, ignore_eos=True)):
        assert token.id == whole(model, [prompt], [said])[0, -1].argmax()
        said.append(token.id)
    assert len(said) == len(runner.start_ids or prompt) + 40


@settings(deadline=None, max_examples=12)
@given(data=st.data())
@pytest.mark.parametrize("name", WRITERS)
def test_logits_of_any_pieces_and_any_rows(name: str, data: st.DataObject) -> None:
    """Rows of a batch are moved about between the pieces, as beams are."""
    model = model_of(name, data.draw(st.booleans()))
    runner = TorchRunner.of(model)
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    draws = np.random.default_rng(data.draw(st.integers(0, 99)))
    prompt = draws.integers(5, 97, 11).tolist()
    cache, _ = runner.begin(prompt, sum(sizes))
    said = np.zeros((1, 0), np.int64)
    for size in sizes:
        rows = data.draw(st.lists(st.integers(0, len(said) - 1), min_size=1, max_size=3))
        ids = draws.integers(5, 97, (len(rows), size))
        cache, said = runner.select(cache, rows), np.concatenate((said[rows], ids), 1)
        found = runner.forward(ids, cache, last_only=False)
        expected = whole(model, [prompt] * len(said), said.tolist())[:, -size:]
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama, biases, untied", "gemma3", "qwen3", "gpt2", "t5", "t5 v1.1"])
def test_packing_bf16_changes_no_bit(name: str) -> None:
    """Joined and laid out otherwise, each product adds up the same numbers."""
    plain = copy.deepcopy(model_of(name)).to(torch.bfloat16)
    if not packed.packable(next(plain.parameters())):
        pytest.skip("this CPU has no bfloat16 products")
    changed = copy.deepcopy(plain)
    packed.pack(changed)
    assert not any(
        type(part) is torch.nn.Linear
        for block in changed.modules()
        if isinstance(block, Block)
        for part in block.modules()
    )
    said = [[5, 17, 44, 9, 23, 31]]
    np.testing.assert_array_equal(whole(changed, said, said), whole(plain, said, said))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_norm_is_the_norm(dtype: torch.dtype, offset: bool) -> None:
    plain = RMSNorm(96, 1e-5, offset).to(dtype)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 1e3):
        x = (torch.randn(1, 1, 96, generator=torch.Generator().manual_seed(1)) * scale + 0.3 * scale).to(dtype)
        precision = 1e-6 if dtype == torch.float32 else 1e-2  # a bfloat16 has 8 bits
        torch.testing.assert_close(packed.PackedNorm(plain)(x), plain(x), atol=1e-6, rtol=precision)


def test_a_cache_is_no_longer_than_it_was_asked_for() -> None:
    runner = TorchRunner.of(model_of("llama"))
    cache, first = runner.begin([5, 6, 7], 2)
    runner.forward(np.array([first]), cache)
    with pytest.raises(ValueError, match="do not fit in 5"):
        runner.forward(np.array([[1, 2, 3]]), cache)


def test_a_broken_cache_is_noticed() -> None:
    """The comparison above can fail: a decoder that forgets its cache says something else."""
    model = model_of("llama")
    runner = TorchRunner.of(model)
    cache, first = runner.begin([5, 17, 44, 9], 4)
    runner.forward(np.array([first]), cache)
    with torch.inference_mode():
        cache.keys.zero_()
    logits = runner.forward(np.array([[8]]), cache)
    assert np.abs(logits[0, -1] - whole(model, [], [[*first, 8]])[0, -1]).max() > 1e-2
