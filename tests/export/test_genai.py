"""onnxruntime-genai, given the same prompt ids, gives the same greedy ids from the exported folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.export import genai, kv_cache
from llmctl.export.form import Form
from llmctl.inference.generate import generate
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import hf, quant
from llmctl.model.config import Config
from llmctl.model.quant import Scheme
from llmctl.model.transformer import Decoder
from tests.export.conftest import CPU

PROGRAM = """
    import json, sys
    import onnxruntime_genai as og

    model = og.Model(sys.argv[1])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=int(sys.argv[3]), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(json.loads(sys.argv[2]))
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(id) for id in generator.get_sequence(0)]))
"""


needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="needs the package onnxruntime-genai (make dev)"
)
WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ("sliding_attention", "full_attention")}


@needs_genai
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen2", {}),
        ("gemma3", WINDOWS),
        ("gpt2", {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}),
    ],
)
def test_genai_gives_the_same_greedy_ids(
    family: str,
    changes: dict[str, Any],
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    exported: Callable[[Path], Path],
) -> None:
    model = saved(shaped(family, eos_token_id=(), **changes))
    prompt = np.random.default_rng(3).integers(10, 290, 7).tolist()
    expected = greedy(model, prompt, 120, ends=())
    assert run(exported(model), prompt, 120) == expected

    stop = expected[40]  # a chat model has several ends of a turn: any of them ends this one
    ended = saved(shaped(family, eos_token_id=(2, stop), **changes), "chat")
    expected = greedy(ended, prompt, 120, ends=(2, stop))
    assert run(exported(ended), prompt, 120) == expected[:-1]  # genai keeps the end to itself
    assert len(expected) < 120


@needs_genai
@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [
        ("llama", Scheme(4, 32, False), "fp32"),
        ("qwen3", Scheme(4, 16, True), "fp32"),
        ("gemma3", Scheme(4, 16, False), "fp32"),
        ("qwen2", Scheme(8, 32, False), "fp32"),
        ("llama", Scheme(8, 0, True, dynamic=True), "fp32"),
        ("llama", None, "fp16"),
    ],
    ids=("int4", "int4-symmetric", "int4-windows", "int8", "int8-dynamic", "fp16"),
)
def test_genai_runs_the_smaller_variants_to_the_ids_of_llmctl(
    family: str,
    scheme: Scheme | None,
    dtype: str,
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    exported: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Their weights are rounded, so what counts is what llmctl's own runner makes of the same folder."""
    changes = WINDOWS if family == "gemma3" else {}
    model = saved(shaped(family, eos_token_id=(), **changes))
    made = model if scheme is None else quantized(model, scheme, tmp_path / "hf-int")
    gives_the_ids_of_llmctl(exported(made, Form(dtype=dtype)))


@needs_genai
def test_genai_runs_a_cache_in_int8(
    shaped: Callable[..., Config], saved: Callable[..., Path], exported: Callable[..., Path]
) -> None:
    model = saved(shaped("llama", eos_token_id=()))
    decoder = hf.load(model)
    assert isinstance(decoder, Decoder)
    gives_the_ids_of_llmctl(exported(model, Form(cache=kv_cache.scales(decoder, np.arange(10, 290)))))


def gives_the_ids_of_llmctl(folder: Path) -> None:
    prompt = np.random.default_rng(3).integers(10, 290, 7).tolist()
    runner = OnnxRunner(folder, CPU)
    tokens = generate(runner, prompt, Sampling(0.0, max_tokens=113, ignore_eos=True))
    expected = [*prompt, *(token.id for token in tokens)]
    found = run(folder, prompt, 120)
    if found != expected:  # only where llmctl itself is undecided
        at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        best = np.sort(runner.forward(np.array([expected[:at]]))[0, -1])
        assert best[-1] - best[-2] < 1e-4, f"token {at} differs, {best[-1] - best[-2]} apart"
    assert len(set(expected[7:])) > 2  # it says something


def quantized(model: Path, scheme: Scheme, folder: Path) -> Path:
    """The model with every matrix rounded to nearest."""
    shutil.copytree(model, folder)
    held = hf.load(model)
    values = held.state_dict()
    chosen = {name: quant.fitted(scheme, values[name].shape[1]) for name in quant.matrices(held)}
    quant.write(held, {name: quant.nearest(values[name], each) for name, each in chosen.items()}, folder)
    return folder


def run(folder: Path, prompt: list[int], length: int) -> list[int]:
    """In a process of its own: the package brings an onnxruntime of its own."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), json.dumps(prompt), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "logits_to_keep" not in done.stderr  # the default of that input is meant: no warning
    return [int(id) for id in json.loads(done.stdout)]


def greedy(model: Path, prompt: list[int], length: int, ends: tuple[int, ...]) -> list[int]:
    """The slow way, without a cache; no two best logits may be near a tie."""
    decoder, ids = hf.load(model), list(prompt)
    while len(ids) < length and (len(ids) == len(prompt) or ids[-1] not in ends):
        with torch.inference_mode():
            best = decoder(torch.tensor([ids]), last_only=True)[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-4
        ids.append(int(best.indices[0]))
    return ids


def test_the_generation_config_names_the_ends(shaped: Callable[..., Config]) -> None:
    config = shaped("qwen3", eos_token_id=2)
    assert genai.config(config, {})["model"]["eos_token_id"] == [2]
    made = genai.config(config, {"eos_token_id": [6, 2], "bos_token_id": 1})
    assert made["model"]["eos_token_id"] == [6, 2]
    assert made["model"]["type"] == "decoder"
    assert made["model"]["decoder"]["num_key_value_heads"] == 2
    assert made["search"]["past_present_share_buffer"] is True
    assert genai.config(shaped("llama", eos_token_id=None, pad_token_id=None), {})["model"]["pad_token_id"] == 0
