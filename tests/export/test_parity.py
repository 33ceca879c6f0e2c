"""The gate lets a faithful graph through, names what is wrong with a broken one, and counts partings rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from llmctl.errors import GateError
from llmctl.export import parity
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from tests.export.conftest import CPU

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[[Path], Path]


def text(config: Config, tokens: int = 1500) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_faithful_graph_passes(family: str, shaped: Shaped, saved: Saved, exported: Exported) -> None:
    model = saved(shaped(family))
    reference = hf.load(model)
    report = parity.measure(reference, OnnxRunner(exported(model), CPU), text(reference.config), "noise")
    assert report["passed"]
    assert report["error"] < 1e-5  # measured 6e-7
    assert {check["case"] for check in report["logits"]} == parity.CASES.keys()
    assert report["greedy"] == {"tokens": 256, "equal": 256, "partings": []}
    assert report["text"]["name"] == "noise"
    assert report["text"]["tokens"] == 1499
    assert abs(report["text"]["change"]) < 1e-6
    json.dumps(report, allow_nan=False)


def test_perplexity_is_that_of_torch(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """Against torch's own cross entropy, over the same windows."""
    model = saved(shaped("llama"))
    reference, tokens = hf.load(model), text(shaped("llama"), 700)
    read = parity.on_text(reference, OnnxRunner(exported(model), CPU), tokens, "noise")
    nats = 0.0
    for start in (0, 320, 640):
        part = torch.from_numpy(tokens[start : start + 321])
        with torch.inference_mode():
            nats += float(torch.nn.functional.cross_entropy(reference(part[None, :-1])[0], part[1:], reduction="sum"))
    assert read["torch_perplexity"] == pytest.approx(np.exp(nats / 699), rel=1e-6)


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    """Breaks one weight of an export: what a transposed or misplaced tensor would do, only smaller."""

    def edit(folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        entry = {item.key: item.value for item in tensor.external_data}
        values = np.memmap(
            folder / "model.onnx.data", np.float32, "r+", int(entry["offset"]), int(entry["length"]) // 4
        )
        values *= factor

    return edit


def forgotten_positions(folder: Path) -> None:
    """Breaks the rotation behind position 300, beyond every prompt and the greedy run: only long text meets it."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    entry = {
        item.key: item.value
        for tensor in graph.initializer
        if tensor.name == "rotary.cos"
        for item in tensor.external_data
    }
    table = np.memmap(folder / "model.onnx.data", np.float32, "r+", int(entry["offset"]), (320, 8))
    table[300:] = 1.0


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """Breaks the graph: every reader of a value reads another one."""

    def edit(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
        onnx.save(model, folder / "model.onnx")

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        scaled("model.layers.1.self_attn.o_proj.weight", 1.01),
        scaled("model.norm.weight", 1.001),
        scaled("rotary.sin", -1.0),
        forgotten_positions,
        renamed("model.layers.0.mlp.gate", "model.layers.0.mlp.up"),
        renamed("past_key_values.1.key", "past_key_values.0.key"),
    ],
    ids=["a weight", "a norm", "the rotation", "far positions", "the gate", "the cache"],
)
def test_a_broken_graph_fails(
    damage: Callable[[Path], None], tmp_path: Path, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    model = saved(shaped("llama"))
    folder = exported(model)
    damage(folder)
    report = parity.measure(hf.load(model), OnnxRunner(folder, CPU), text(shaped("llama"), 400), "noise")
    assert not report["passed"]
    with pytest.raises(GateError, match="is not the model: ") as caught:
        parity.gate(report, tmp_path / "parity.json")
    assert caught.value.exit_code == 5
    assert str(tmp_path / "parity.json") in caught.value.hint
    assert json.loads((tmp_path / "parity.json").read_text())["worst"] == report["worst"]


class Noisy:
    """A runner over the reference itself, with something added to its logits."""

    def __init__(self, reference: Decoder, add: np.ndarray) -> None:
        self.reference, self.add = reference, add
        self.max_length = 64
        self.ids: list[int] = []

    def new_cache(self, batch: int, max_length: int) -> None:
        self.ids = []

    def forward(self, ids: np.ndarray, cache: None) -> np.ndarray:
        self.ids += ids[0].tolist()
        return parity.torch_logits(self.reference, np.array(self.ids))[None, -1:] + self.add


def test_greedy_paths_may_part_only_at_a_tie(shaped: Shaped, saved: Saved) -> None:
    reference = hf.load(saved(shaped("llama")))
    prompt, size = np.array([5, 6, 7]), reference.config.vocab_size
    add = np.random.default_rng(0).normal(size=size).astype(np.float32)

    same: Any = Noisy(reference, np.zeros(size, np.float32))
    assert parity.greedy(reference, same, prompt, 1e-4) == {"tokens": 61, "equal": 61, "partings": []}

    wrong: Any = Noisy(reference, add)
    run = parity.greedy(reference, wrong, prompt, 1e-4)
    assert run["equal"] + len(run["partings"]) == 61
    first = run["partings"][0]
    logits = np.sort(parity.torch_logits(reference, np.array([*prompt, *wrong.ids[3 : 3 + first["token"]]]))[-1])
    assert first["gap"] >= logits[-1] - logits[-2]  # it took the second best, or a worse one
    assert first["gap"] > first["limit"]


def test_cases_shrink_to_a_short_context_or_text(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    assert parity.shortened((33, 1, 1), 40) == (33, 1, 1)
    assert parity.shortened((33, 1, 1), 34) == (33, 1)
    assert parity.shortened((257,), 8) == (8,)
    model = saved(shaped("qwen3", max_position_embeddings=8))
    runner = OnnxRunner(exported(model), CPU)
    assert parity.measure(hf.load(model), runner, text(shaped("qwen3"), 100), "noise")["passed"]
    assert parity.measure(hf.load(model), runner, text(shaped("qwen3"), 2), "two tokens")["passed"]
