"""Generation against transformers' `generate`: greedy and beams, decoders and encoder-decoders, ids equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.inference import beam
from llmctl.inference.generate import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import hf

transformers = pytest.importorskip("transformers")

from tests.parity.families import DECODERS, SEQ2SEQ, ids_of, reference, saved  # noqa: E402


def theirs(model: Any, ids: torch.Tensor, new: int, **options: Any) -> Any:
    """What `generate` returns, the prompt or start token cut off."""
    prompt = 1 if model.config.is_encoder_decoder else ids.shape[1]
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options,
            return_dict_in_generate=True, output_scores=True,
            use_cache=not model.config.is_encoder_decoder,  # its cache counts T5's encoder layers
        )  # fmt: skip
    return found, found.sequences[:, prompt:].tolist()


def ours(model: Any, folder: Path) -> TorchRunner:
    saved(model, folder)
    return TorchRunner.of(hf.load(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    model, ids = reference(name), ids_of(1, 9)
    _, (expected,) = theirs(model, ids, 24, eos_token_id=-1, forced_eos_token_id=None)
    runner = ours(model, tmp_path)
    found = generate(runner, ids[0].tolist(), Sampling(0.0, max_tokens=24, ignore_eos=True))
    assert [token.id for token in found] == expected


BEAMS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 2, "length_penalty": 0.5, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 1.5, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 1.5},
]
ENDS = [2, *range(7, 97, 5)]  # so many that these random models end a text now and then


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", *SEQ2SEQ])
def test_beams(name: str, tmp_path: Path) -> None:
    model = reference(name)
    runner = ours(model, tmp_path)
    runner.eos_ids = tuple(ENDS)
    ended = set()
    for seed, options in enumerate(BEAMS):
        ids = ids_of(1, 7, seed)
        more = {"eos_token_id": ENDS, "pad_token_id": 3, "num_return_sequences": options["num_beams"]}
        result, expected = theirs(model, ids, 20, **options, **more)
        found = beam.search(runner, ids[0].tolist(), max_tokens=20, **options)
        assert [hypothesis.ids for hypothesis in found] == [trimmed(row) for row in expected], options
        scores = torch.tensor([hypothesis.score for hypothesis in found])
        torch.testing.assert_close(scores, result.sequences_scores, atol=1e-4, rtol=1e-4)
        ended |= {hypothesis.ids[-1] in ENDS for hypothesis in found}
    assert True in ended  # else nothing of how texts end was seen


def test_one_beam_is_greedy(tmp_path: Path) -> None:
    runner = ours(reference("llama"), tmp_path)
    prompt = ids_of(1, 7)[0].tolist()
    (found,) = beam.search(runner, prompt, num_beams=1, max_tokens=20, early_stopping=True)
    tokens = list(generate(runner, prompt, Sampling(0.0, max_tokens=20)))
    assert list(found.ids) == [token.id for token in tokens]
    assert found.score == pytest.approx(sum(token.logprob for token in tokens) / len(tokens))


def trimmed(ids: list[int]) -> tuple[int, ...]:
    """`generate` fills rows up behind their end."""
    return tuple(ids[: next((at + 1 for at, id in enumerate(ids) if id in ENDS), len(ids))])


def test_beams_on_a_published_checkpoint(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    runner = TorchRunner.of(hf.load(folder))  # type: ignore[arg-type]
    for prompt, options in zip(([1], [1, 403, 407]), BEAMS, strict=False):
        result, expected = theirs(model, torch.tensor([prompt]), 60, **options, num_return_sequences=2)
        found = beam.search(runner, prompt, max_tokens=60, **options)[:2]
        assert [list(hypothesis.ids) for hypothesis in found] == expected
        scores = torch.tensor([hypothesis.score for hypothesis in found])
        torch.testing.assert_close(scores, result.sequences_scores, atol=1e-4, rtol=1e-4)
