"""Our decoder is transformers' LlamaForCausalLM and Qwen3ForCausalLM: the same numbers from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmctl.inference.generate import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import History, Sampling, adjusted, truncated
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from tests.shapes import LLAMA, SHAPES

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> Config:
    return SHAPES[request.param]


@pytest.fixture
def folder(config: Config, tmp_path: Path) -> Path:
    """A model as llmctl writes it. Weights are spread wide, so that attention is far from uniform."""
    model = Decoder.random(config, seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8.0) if weight.dim() > 1 else weight.add_(torch.linspace(-0.3, 0.3, len(weight)))
            assert weight.isfinite().all(), name
    hf.save(model, tmp_path, tmp_path)
    return tmp_path


def theirs_of(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def ids_of(config: Config, rows: int, length: int) -> Tensor:
    """Random ids without the special ones: transformers gives the padding's embedding no gradient."""
    return torch.randint(4, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows + length))


@pytest.mark.parametrize("length", [1, 2, 127, 300])  # 300 spans three blocks of the blockwise attention
def test_logits_equal(config: Config, folder: Path, length: int) -> None:
    ids = ids_of(config, 2, length)
    with torch.no_grad():
        expected, found = theirs_of(folder)(ids).logits, hf.load(folder)(ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.5  # else a tolerance of 1e-4 says little


def test_gradients_equal(config: Config, folder: Path) -> None:
    ids = ids_of(config, 2, 150)
    ours, theirs = hf.load(folder).train(), theirs_of(folder).train()
    theirs(ids, labels=ids).loss.backward()
    logits = ours(ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=f"the gradient of {name}")


def test_what_transformers_writes_is_read(config: Config, folder: Path, tmp_path: Path) -> None:
    theirs = theirs_of(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert hf.read_config(tmp_path / "theirs") == config
    ids = ids_of(config, 1, 9)
    with torch.no_grad():
        torch.testing.assert_close(hf.load(tmp_path / "theirs")(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_config_means_the_same(config: Config, folder: Path) -> None:
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == (config.rope_scaling.kind if config.rope_scaling else "default")
    assert theirs.eos_token_id == config.eos_ids[0]
    assert theirs.num_key_value_heads == config.num_key_value_heads
    generation = transformers.GenerationConfig.from_pretrained(folder)
    eos = generation.eos_token_id
    assert tuple(eos if isinstance(eos, list) else [eos]) == config.eos_ids


def test_bf16_weights_load_as_bf16(tmp_path: Path) -> None:
    hf.save(Decoder.random(LLAMA, 0), tmp_path, tmp_path, dtype="bf16")
    theirs = theirs_of(tmp_path, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    ids = ids_of(LLAMA, 1, 40)
    with torch.no_grad():
        expected, found = theirs(ids).logits.float(), hf.load(tmp_path, dtype="bf16")(ids)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_greedy_ids_equal(config: Config, folder: Path) -> None:
    prompt = ids_of(config, 1, 5)
    expected = theirs_of(folder).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, eos_token_id=-1
    )
    runner = TorchRunner.of(hf.load(folder))
    sampling = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    found = [token.id for token in generate(runner, prompt[0].tolist(), sampling)]
    assert found == expected[0, 5:].tolist()


def test_sampling_leaves_the_same_tokens() -> None:
    """Our truncations against transformers' logits processors, in the order in which its `generate` applies them."""
    processors = transformers.generation.logits_process
    draws = np.random.default_rng(5)
    for _ in range(50):
        logits = draws.normal(0, 3, 60).astype(np.float32)
        history = History(draws.integers(0, 60, 9).tolist(), draws.integers(0, 60, 9).tolist())
        top_k, top_p, min_p = int(draws.integers(1, 60)), float(draws.uniform(0.05, 1)), float(draws.uniform(0, 0.5))
        temperature, penalty = float(draws.uniform(0.2, 2)), float(draws.uniform(0.8, 1.5))
        scores = torch.from_numpy(logits)[None].double()
        seen = torch.tensor([[*history.prompt, *history.output]])
        for processor in (
            processors.RepetitionPenaltyLogitsProcessor(penalty),
            processors.TemperatureLogitsWarper(temperature),
            processors.TopKLogitsWarper(top_k),
            processors.TopPLogitsWarper(top_p),
            processors.MinPLogitsWarper(min_p),
        ):
            scores = processor(seen, scores)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty=penalty)
        found = truncated(adjusted(logits, sampling, history) / temperature, sampling)
        np.testing.assert_allclose(found / found.sum(), scores.softmax(-1)[0].numpy(), atol=1e-12)
