"""An encoder-decoder behind the same API: the encoder reads the prompt, the decoder writes the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmctl import device
from llmctl.inference.generate import complete
from llmctl.inference.sampling import Sampling
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.serve.model import Model, load
from llmctl.text import tokenizer as tokenizers
from tests.serve.conftest import TEXTS, Running, running

CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder, tokenizer = tmp_path_factory.mktemp("t5"), tokenizers.train(TEXTS * 20, "bpe", 380)
    shape = Config("t5", len(tokenizer), 32, 64, 2, 2, 2, 16, CONTEXT, positions="relative", attention_scale=1.0)
    whole = {"kind": "encoder-decoder", "task": "seq2seq-lm", "num_decoder_layers": 2, "decoder_start_token_id": 0}
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.special("<pad>")}
    hf.save(hf.random(replace(shape, **whole, **ends), 0), tokenizer, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    known = {"</s>": {"id": "</s>", "ids": [tokenizer.eos_id], "tokens": ["</s>"]}}
    framing = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, end, text], "special_tokens": known}
    (folder / "tokenizer.json").write_text(json.dumps({**described, "post_processor": framing}))
    return load(folder, device.pick("cpu"), dtype="fp32")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with running(model) as made:
        yield made


def test_completions(server: Running, model: Model) -> None:
    body = {"prompt": TEXTS[0], "max_tokens": 9, "temperature": 1.0, "seed": 3, "ignore_eos": True, "logprobs": 1}
    answer = server.post("/v1/completions", body).json()
    ids = model.continuation(TEXTS[0])
    assert ids == [*model.tokenizer.encode(TEXTS[0]), model.tokenizer.eos_id]  # as T5 frames what its encoder reads
    expected = complete(model.writer, model.tokenizer, ids, Sampling(seed=3, max_tokens=9, ignore_eos=True))
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs)
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 9, "total_tokens": len(ids) + 9}


def test_the_prompt_takes_no_room_from_the_answer(server: Running) -> None:
    body = {"prompt": [40] * CONTEXT, "max_tokens": CONTEXT - 1, "ignore_eos": True}
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == CONTEXT - 1
    refused = server.post("/v1/completions", {**body, "prompt": [40] * (CONTEXT + 1)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_prompt_that_is_not_written_is_not_scored(server: Running) -> None:
    refused = server.post("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


def test_what_torch_computes_in(model: Model, folders: dict[str, Path]) -> None:
    cpu = device.pick("cpu")
    assert model.runtime == "torch in fp32"
    assert load(folders["base"], cpu).runtime == f"torch in {cpu.dtype('auto')[0]}"
