"""A broken graph fails the gate, and the node that was broken is the one that is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.export import bisect, parity
from llmctl.export.form import Form
from llmctl.inference import exported as runners
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from tests.export import sabotage
from tests.export.conftest import CPU
from tests.export.sabotage import Damage
from tests.project import Project

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[..., Path]

LAYER = "model.layers.1"


def judged(model: Path, folder: Path, dtype: str = "fp32") -> dict[str, Any]:
    """The gate's report with the node to blame."""
    reference, runner = hf.load_causal(model), runners.load(folder, CPU)
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, 600)
    report = parity.measure(reference, runner, tokens, "noise", dtype)
    session = runner.session
    bisect.blame(report, reference, runner, tokens)
    assert runner.session is session  # the runner is as it was
    json.dumps(report, allow_nan=False)
    return report


# family, changes, damage, the node that is to be named in the ort profile
BROKEN: dict[str, tuple[str, dict[str, Any], Damage, str]] = {
    "the embedding": (
        "llama",
        {"tie_word_embeddings": False},
        sabotage.scaled("model.embed_tokens.weight", 1.01),
        "model.embed_tokens",
    ),
    "a norm's epsilon": (
        "llama",
        {},
        sabotage.attribute(f"{LAYER}.post_attention_layernorm.out", "epsilon", 1e-3),
        f"{LAYER}.post_attention_layernorm.out",
    ),
    "the scale of scores": (
        "llama",
        {},
        sabotage.attribute(f"{LAYER}.self_attn.attended", "scale", 0.26),
        f"{LAYER}.self_attn.attended",
    ),
    "a window": (
        "mistral",
        {"sliding_window": 9, "layer_types": ("sliding_attention",) * 2},
        sabotage.attribute(f"{LAYER}.self_attn.attended", "local_window_size", 8),
        f"{LAYER}.self_attn.attended",
    ),
    "the rotation": ("llama", {}, sabotage.scaled("rotary.sin", -1.0), "model.layers.0.self_attn.attended"),
    "far positions": (  # beyond every prompt and the greedy run: only long text meets it
        "llama",
        {},
        sabotage.put("rotary.cos", slice(300, None), 1.0),
        "model.layers.0.self_attn.attended",
    ),
    "a bias": ("qwen2", {}, sabotage.passed_on(f"{LAYER}.self_attn.qkv"), f"{LAYER}.self_attn.qkv.product"),
    "one weight of a product": (
        "llama",
        {},
        sabotage.put(f"{LAYER}.mlp.down_proj.weight", (3, 5), 0.9),
        f"{LAYER}.mlp.down_proj",
    ),
    "the gate": (
        "llama",
        {},
        sabotage.renamed("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        "model.layers.0.mlp.inner",
    ),
    "the cache": (
        "llama",
        {},
        sabotage.renamed("past_key_values.1.key", "past_key_values.0.key"),
        f"{LAYER}.self_attn.attended",
    ),
    "a norm of heads": (
        "qwen3",
        {},
        sabotage.scaled(f"{LAYER}.self_attn.q_norm.weight", 1.05),
        f"{LAYER}.self_attn.q_norm.normed",
    ),
    "the last norm": ("llama", {}, sabotage.scaled("model.norm.weight", 1.001), "model.norm.out"),
    "the head": ("llama", {"tie_word_embeddings": False}, sabotage.upside_down("lm_head.weight"), "logits"),
    "learned positions": (
        "gpt2",
        {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8},
        sabotage.put("model.embed_positions.weight", 7, 0.3),
        "model.embed_positions",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_node_that_was_broken_is_named(broken: str, shaped: Shaped, saved: Saved, exported: Exported) -> None:
    family, changes, damage, name = BROKEN[broken]
    model = saved(shaped(family, **changes))
    folder = exported(model)
    damage(folder)
    report = judged(model, folder)
    assert not report["passed"]
    first = report["nodes"]["first"]
    assert first["name"] == name
    assert first["error"] > first["limit"] == 1e-4
    assert first["suspects"]
    assert report["nodes"]["worst"]["error"] >= first["error"]


PORTABLE = {
    "a norm's epsilon": f"{LAYER}.post_attention_layernorm.out",
    "the rotation": "model.layers.0.self_attn.mixed",
    "a bias": f"{LAYER}.self_attn.qkv.product",
    "the cache": f"{LAYER}.self_attn.mixed",
    "the gate": "model.layers.0.mlp.inner",
    "the head": "logits.flat_product",
}


@pytest.mark.parametrize("broken", PORTABLE)
def test_and_in_the_portable_profile(broken: str, shaped: Shaped, saved: Saved, exported: Exported) -> None:
    family, changes, damage, _ = BROKEN[broken]
    model = saved(shaped(family, **changes))
    folder = exported(model, Form("portable"))
    damage(folder)
    report = judged(model, folder)
    assert not report["passed"]
    assert report["nodes"]["first"]["name"] == PORTABLE[broken]


def test_what_cannot_be_compared_is_suspected_too(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """The sigmoid's value is no module's: the product behind it is the first that is off."""
    model = saved(shaped("llama"))
    folder = exported(model)
    sabotage.renamed("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")(folder)
    first = judged(model, folder)["nodes"]["first"]
    assert first["op"] == "Mul"
    assert first["suspects"] == [f"model.layers.0.mlp.{name}" for name in ("inner", "activated", "sigmoid")]


def test_a_graph_that_passes_has_a_worst_node_and_no_first(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    model = saved(shaped("qwen3"))
    report = judged(model, exported(model))
    assert report["passed"]
    assert "first" not in report["nodes"]
    assert report["nodes"]["worst"]["error"] < 1e-5  # measured 4e-6
    assert report["nodes"]["compared"] > 15


def test_half_precision_is_allowed_what_it_rounds(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """Limits are of each value; what rounding does not explain is still found."""
    model = saved(shaped("llama"))
    folder = exported(model, Form("ort", "fp16"))
    report = judged(model, folder, "fp16")
    assert report["passed"]
    assert "first" not in report["nodes"]
    sabotage.attribute(f"{LAYER}.self_attn.attended", "scale", 0.3)(folder)
    report = judged(model, folder, "fp16")
    assert not report["passed"]
    first = report["nodes"]["first"]
    assert first["name"] == f"{LAYER}.self_attn.attended"
    assert 1e-4 < first["limit"] < 0.05


def test_a_long_text_is_replayed_in_pieces(
    shaped: Shaped, saved: Saved, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bisect, "LONGEST", 64)
    model = saved(shaped("llama"))
    folder = exported(model)
    BROKEN["far positions"][2](folder)
    assert judged(model, folder)["nodes"]["first"]["name"] == "model.layers.0.self_attn.attended"


def test_layers_are_not_given_out_all_at_once(shaped: Shaped, saved: Saved, exported: Exported) -> None:
    """Memory: a run gives out the end of each layer, another all of one layer."""
    model = saved(shaped("llama", num_hidden_layers=6))
    folder = exported(model)
    sabotage.scaled("model.layers.4.mlp.down_proj.weight", 1.1)(folder)
    shown: list[list[str]] = []
    given = bisect.Replay.given

    def watched(self: bisect.Replay, names: list[str]) -> Any:
        shown.append(list(names))
        return given(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bisect.Replay, "given", watched)
        report = judged(model, folder)
    assert report["nodes"]["first"]["name"] == "model.layers.4.mlp.down_proj"
    outline, inside = shown
    assert len(outline) <= 6 + 3
    assert {bisect.layer(name) for name in inside} == {"model.layers.4"}


def test_modules_that_a_value_is_named_after(shaped: Shaped) -> None:
    names = {name for name, _ in Decoder(shaped("qwen3")).named_modules()}
    sources = {
        "model.embed_tokens": ("model.embed_tokens",),
        f"{LAYER}.out": (LAYER,),
        f"{LAYER}.attended": (f"<{LAYER}.post_attention_layernorm",),
        f"{LAYER}.self_attn.attended": (f"<{LAYER}.self_attn.o_proj",),
        f"{LAYER}.self_attn.qkv": tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv"),
        f"{LAYER}.mlp.inner": (f"<{LAYER}.mlp.down_proj",),
        f"{LAYER}.mlp.sigmoid": (),
        "seqlens_k": (),
        "logits": ("",),
    }
    assert {name: bisect.sources_of(name, names) for name in sources} == sources


BREAKS = """
from llmctl.export import graph
from tests.export import sabotage
write = graph.write
def broken(model, folder, *rest):
    size = write(model, folder, *rest)
    sabotage.scaled("model.layers.0.mlp.down_proj.weight", 1.1)(folder)
    return size
graph.write = broken
"""


def test_from_the_command_line(finished: Project) -> None:
    """Exit code 5, the node's name, and nothing published; a graph that passes tells its worst node when asked."""
    shutil.rmtree(finished.run / "export")
    done = finished.llmctl("export", "--onnx", "--json", before=BREAKS)
    assert done.code == 5, done.err
    assert "the first node that is: model.layers.0.mlp.down_proj (FusedMatMul), by 0.1" in done.json["error"]["message"]
    assert not list((finished.run / "export").rglob("artifact.json"))
    assert not list(finished.run.rglob(".staging*"))

    done = finished.llmctl("export", "--onnx", "--debug-parity", "-v")
    assert done.code == 0, done.err
    assert "the worst node: model." in done.out
    (parity_json,) = (finished.run / "export").rglob("parity.json")
    assert json.loads(parity_json.read_text())["nodes"]["worst"]["name"].startswith("model.")
