"""llama.cpp itself (its build in the package xllamacpp) on files that llmctl wrote: equal ids, equal next tokens."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.export import gguf
from llmctl.model import hf
from llmctl.model.config import Config, RopeScaling
from llmctl.model.families import FAMILIES
from llmctl.text import builtin
from llmctl.text import tokenizer as tokenizers
from llmctl.text.tokenizer import Tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
pytestmark = pytest.mark.slow

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope": ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 20)}),
    "llama, linear rope, biases": (
        "llama",
        {"rope_scaling": RopeScaling("linear", 2.0), "attention_bias": True, "attention_output_bias": True},
    ),
    "llama, yarn": ("llama", {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=40)}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3, untied": ("qwen3", {"head_dim": 64, "tie_word_embeddings": False}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 24, "num_key_value_heads": 1, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3", {"num_hidden_layers": 6, "sliding_window": 24, "num_key_value_heads": 1}),
    "gpt2": ("gpt2", {"intermediate_size": 384}),
}
TOKENS = 12


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    library = [text for text, _, _ in builtin.texts(builtin.STDLIB)]
    return tokenizers.train([*library[::40], *gguf.PROBES], "bpe", 900)


def random_model(family: str, changes: dict[str, Any], pieces: int) -> Any:
    """Weights that bf16 holds exactly, spread so that no two next tokens are close."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": pieces}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 512}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    shape = Config(family, **{**FAMILIES[family].switches, **sizes, **heads, **ids, **changes})
    config = dataclasses.replace(dataclasses.replace(shape, **FAMILIES[family].fresh(shape)), **changes)
    model = hf.random(config, 0).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in model.parameters():
        low, spread = (
            (-0.3, 0.6) if tensor.ndim == 1 and config.norm_offset else (0.5, 1.0) if tensor.ndim == 1 else (-0.15, 0.3)
        )
        tensor.data.copy_((low + spread * torch.rand(tensor.shape, generator=generator)).bfloat16())
    return model


@pytest.fixture
def llama_cpp() -> Callable[[Path], Callable[[str, dict[str, Any]], Any]]:
    """A llama.cpp server on a file; what it gives posts a request."""
    kept = []

    def serve(path: Path) -> Callable[[str, dict[str, Any]], Any]:
        wanted = xllamacpp.CommonParams()
        wanted.model.path = str(path)
        wanted.n_ctx, wanted.n_parallel, wanted.warmup, wanted.port = 512, 1, False, 0
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(wanted)
        kept.append(server)

        def post(place: str, body: dict[str, Any]) -> Any:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(server.listening_address + place, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read())

        return post

    return serve


@pytest.mark.parametrize("name", SHAPES)
def test_next_tokens(name: str, llama_cpp: Any, bpe: Tokenizer, tmp_path: Path) -> None:
    family, changes = SHAPES[name]
    model = random_model(family, changes, len(bpe))
    hf.save(model, bpe, tmp_path)
    gguf.write(model, tmp_path, tmp_path / "model.gguf", "f32", {})
    post = llama_cpp(tmp_path / "model.gguf")
    prompt = bpe.encode(gguf.PROBES[3])[:90]
    asked = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    drawn = post("/completion", asked)["tokens"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + drawn[:-1]]))[0, len(prompt) - 1 :]
    gaps = logits.max(-1).values - logits[torch.arange(TOKENS), torch.tensor(drawn)]
    # its cache is fp16: two tokens closer than that may change places
    assert gaps.max() < 2e-3 * logits.abs().max(), gaps


@pytest.mark.parametrize("type", ["bpe", "char"])
def test_ids(type: Any, llama_cpp: Any, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if type == "bpe" else tokenizers.train(gguf.PROBES, "char", 600)
    model = random_model("llama", {}, len(tokenizer))
    hf.save(model, tokenizer, tmp_path)
    gguf.write(model, tmp_path, tmp_path / "model.gguf", "f16", {})
    post = llama_cpp(tmp_path / "model.gguf")
    for text in (*gguf.PROBES, Path(__file__).read_text()[:3000], " ", "<s> and </s> spelled"):
        asked = {"content": text, "add_special": False, "parse_special": False}
        assert post("/tokenize", asked)["tokens"] == tokenizer.encode(text)
    assert post("/tokenize", {"content": "a", "add_special": True})["tokens"] == tokenizer.prompt("a")
