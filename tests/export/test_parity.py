"""The gate lets a faithful graph through, names what is wrong with a broken one, and counts partings rightly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl import console
from llmctl.errors import GateError
from llmctl.export import parity, reports, tolerance
from llmctl.export.form import Form
from llmctl.inference import exported as runners
from llmctl.inference.onnx_runner import OnnxRunner
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf, quant
from llmctl.model.compressed import Scheme
from llmctl.model.config import Config
from llmctl.recipe import ExportSection
from tests.export import sabotage
from tests.export.conftest import CPU

Shaped = Callable[..., Config]
Saved = Callable[..., Path]
Exported = Callable[..., Path]


def text(config: Config, tokens: int = 1500) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_faithful_graph_passes(family: str, shaped: Shaped, saved: Saved, exported: Exported) -> None:
    model = saved(shaped(family))
    reference = hf.load_causal(model)
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
    reference, tokens = hf.load_causal(model), text(shaped("llama"), 700)
    read = parity.on_text(reference, OnnxRunner(exported(model), CPU), tokens, "noise")
    nats = 0.0
    for start in (0, 320, 640):
        part = torch.from_numpy(tokens[start : start + 321])
        with torch.inference_mode():
            nats += float(torch.nn.functional.cross_entropy(reference(part[None, :-1])[0], part[1:], reduction="sum"))
    assert read["torch_perplexity"] == pytest.approx(np.exp(nats / 699), rel=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        sabotage.scaled("model.layers.1.self_attn.o_proj.weight", 1.01),
        sabotage.scaled("model.norm.weight", 1.001),
        sabotage.scaled("rotary.sin", -1.0),
        sabotage.put("rotary.cos", slice(300, None), 1.0),  # beyond every prompt: only long text meets it
        sabotage.renamed("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        sabotage.renamed("past_key_values.1.key", "past_key_values.0.key"),
    ],
    ids=["a weight", "a norm", "the rotation", "far positions", "the gate", "the cache"],
)
def test_a_broken_graph_fails(
    damage: sabotage.Damage, tmp_path: Path, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    model = saved(shaped("llama"))
    folder = exported(model)
    damage(folder)
    report = parity.measure(hf.load_causal(model), OnnxRunner(folder, CPU), text(shaped("llama"), 400), "noise")
    assert not report["passed"]
    with pytest.raises(GateError, match="is not the model: ") as caught:
        parity.gate(report, tmp_path / "parity.json")
    assert caught.value.exit_code == 5
    assert str(tmp_path / "parity.json") in caught.value.hint
    assert json.loads((tmp_path / "parity.json").read_text())["worst"] == report["worst"]


class Noisy:
    """A runner over the reference itself, with something added to its logits."""

    def __init__(self, reference: hf.Causal, add: np.ndarray) -> None:
        self.reference, self.add = reference, add
        self.max_length = 64
        self.ids: list[int] = []

    def new_cache(self, batch: int, max_length: int) -> None:
        self.ids = []

    def forward(self, ids: np.ndarray, cache: None) -> np.ndarray:
        self.ids += ids[0].tolist()
        found: np.ndarray = parity.torch_logits(self.reference, np.array(self.ids))[None, -1:] + self.add
        return found


def test_greedy_paths_may_part_only_at_a_tie(shaped: Shaped, saved: Saved) -> None:
    reference = hf.load_causal(saved(shaped("llama")))
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
    assert parity.measure(hf.load_causal(model), runner, text(shaped("qwen3"), 100), "noise")["passed"]
    assert parity.measure(hf.load_causal(model), runner, text(shaped("qwen3"), 2), "two tokens")["passed"]


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_half_precision_is_held_against_its_natural_error(
    profile: Any, shaped: Shaped, saved: Saved, exported: Exported
) -> None:
    model = saved(shaped("llama"))
    folder = exported(model, Form(profile, "fp16"))
    reference, tokens = hf.load_causal(model), text(shaped("llama"), 400)
    report = parity.measure(reference, runners.load(folder, CPU), tokens, "noise", "fp16")
    assert report["passed"]
    natural, limits = report["natural"], report["limits"]
    assert 1e-4 < natural["error"] < 0.01  # measured 3e-3
    assert limits["logits"] == pytest.approx(3 * natural["error"])
    assert 1e-4 < report["error"] < limits["logits"]  # beyond what fp32 is allowed

    sabotage.scaled("model.layers.1.self_attn.o_proj.weight", 1.2)(folder)
    assert not parity.measure(reference, runners.load(folder, CPU), tokens, "noise", "fp16")["passed"]


def test_limits_by_dtype() -> None:
    assert tolerance.limits("fp32", (0.0, 0.0), 8192) == (1e-4, 1e-5, 1e-4)
    logits, kl, perplexity = tolerance.limits("bf16", (0.02, 1e-3), 8192)
    assert (logits, kl) == pytest.approx((0.06, 4e-3))
    assert perplexity == pytest.approx(4e-3 + 4 * math.sqrt(8e-3 / 8192))
    assert tolerance.limits("fp16", (0.5, 1.0), 8192).logits == 0.03  # the dtype is not for such a model
    assert tolerance.limits("fp16", (0.0, 0.0), 8192) == pytest.approx((1e-4, 1e-5, 2e-4), abs=2e-5)  # no tighter
    assert tolerance.limits("fp16", (math.nan, math.nan), 8192).logits == 1e-4  # it overflows: no graph of it passes


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_rounding_leaves_the_model_as_it_was(dtype: str, shaped: Shaped, saved: Saved) -> None:
    model = hf.load_causal(saved(shaped("qwen3")))
    ids, before = text(model.config, 64), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = parity.torch_logits(model, ids)
    with tolerance.rounding(model, dtype) as twin:
        found = parity.torch_logits(twin, ids)
    assert 1e-4 < parity.check("", [found], [expected])["error"] < 0.1
    assert np.array_equal(parity.torch_logits(model, ids), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rounding_to_int8_is_by_block() -> None:
    x = torch.tensor([[*[1.0] * 31, 127.0, *[0.01] * 32]])
    rounded = tolerance.to_int8(x)
    assert torch.equal(rounded[:, :32], x[:, :32])  # a step of one
    assert torch.allclose(rounded[:, 32:], x[:, 32:])  # the other block has its own
    assert torch.equal(tolerance.to_int8(torch.zeros(2, 3, 64)), torch.zeros(2, 3, 64))
    assert float((tolerance.to_int8(torch.rand(4, 24)) - torch.rand(4, 24)).abs().max()) < 1.0


# ------------------------------------------------------------------------------------------------------ quantised


@pytest.fixture
def quantised(tmp_path: Path) -> Callable[..., Path]:
    """A folder whose matrices are rounded to nearest."""

    def make(model: Path, scheme: Scheme) -> Path:
        folder, plain = tmp_path / f"hf-{scheme.bits}-{scheme.block}", hf.load_causal(model)
        shutil.copytree(model, folder)
        state = plain.state_dict()
        matrices = quant.matrices(plain)
        quant.write(
            plain,
            {
                n: quant.nearest(state[n], quant.fitted(scheme, state[n].shape[1]) if scheme.block else scheme)
                for n in matrices
            },
            folder,
        )
        return folder

    return make


INT4, INT8, DYNAMIC = Scheme(4, 16, False), Scheme(8, 16, False), Scheme(8, 0, True, True)


def test_rounding_of_a_model_that_rounds_by_itself(
    shaped: Shaped, saved: Saved, exported: Exported, quantised: Callable[..., Path]
) -> None:
    """The natural error is what its own rounding does; without it, another rounding to the same grid would be none."""
    folder = quantised(saved(shaped("llama")), DYNAMIC)
    reference, ids = hf.load_causal(folder), text(shaped("llama"), 300)
    expected = parity.torch_logits(reference, ids)
    with tolerance.rounding(reference, "int8") as twin:
        found = parity.torch_logits(twin, ids)
    error = parity.check("", [found], [expected])["error"]
    assert 1e-3 < error < 0.1
    assert np.array_equal(parity.torch_logits(reference, ids), expected)
    report = parity.measure(reference, OnnxRunner(exported(folder), CPU), ids, "noise", "int8")
    assert report["passed"]
    assert report["text"]["mean_kl"] < report["natural"]["mean_kl"]  # both round alike: less than the rounding does


@pytest.mark.parametrize(("scheme", "increase"), [(INT4, 0.05), (INT8, 0.005)], ids=["int4", "int8"])
def test_a_quantised_graph_is_the_quantised_model_and_nearly_the_original(
    scheme: Scheme, increase: float, shaped: Shaped, saved: Saved, exported: Exported, quantised: Callable[..., Path]
) -> None:
    model = saved(shaped("llama"))
    folder = quantised(model, scheme)
    original, reference, tokens = hf.load_causal(model), hf.load_causal(folder), text(shaped("llama"), 600)
    runner = OnnxRunner(exported(folder), CPU)
    told: dict[str, Any] = {"original": original, "max_increase": increase}
    report = parity.measure(reference, runner, tokens, "noise", "int8", **told)
    assert report["passed"], report["worst"]
    kept = report["original"]
    assert kept["change"] <= increase == kept["limits"]["increase"]
    assert 0 < report["text"]["mean_kl"] < kept["mean_kl"] < kept["limits"]["kl"] or scheme == INT8
    assert kept["perplexity"] == pytest.approx(report["text"]["onnx_perplexity"])
    assert kept["original_perplexity"] == pytest.approx(kept["perplexity"] / (1 + kept["change"]))
    assert reports.metrics(report)["perplexity_change"] == kept["change"]
    assert "of best tokens" in reports.summary(report)

    wrong = parity.measure(original, runner, tokens, "noise", "fp32")  # it is not the original
    assert not wrong["passed"]
    sabotage.put("model.layers.0.mlp.down_proj.weight.scales", slice(None), 0.1)(runner.folder)
    broken = OnnxRunner(runner.folder, CPU)
    report = parity.measure(reference, broken, tokens, "noise", "int8", **told)
    assert not report["passed"]


def test_a_model_that_quantising_ruined_is_not_the_original(
    tmp_path: Path, shaped: Shaped, saved: Saved, quantised: Callable[..., Path]
) -> None:
    """One scale for a whole row of four bits, the values far apart: a sound graph of it would still be refused."""
    model = saved(shaped("llama"))
    original = hf.load_causal(model)
    ruined = hf.load_causal(quantised(model, Scheme(4, 16, True)))
    with torch.no_grad():
        for tensor in ruined.parameters():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
            tensor.add_(noise, alpha=0.3 if tensor.ndim > 1 else 0.0)
    tokens = text(original.config, 300)
    report = parity.quality(original, TorchRunner.of(ruined), tokens, "noise", 0.05)
    assert not report["passed"]
    with pytest.raises(GateError, match="the quantised model is not the original any more: ") as caught:
        parity.gate(report, tmp_path / "parity.json")
    assert "max_ppl_increase" in caught.value.hint

    same = parity.quality(original, TorchRunner.of(original), tokens, "noise", 0.0)
    assert same["passed"]
    assert (same["original"]["change"], same["original"]["mean_kl"], same["original"]["top1_agreement"]) == (0, 0, 1)


def test_what_quantising_may_cost() -> None:
    stated = {"quantize": "int4", "max_ppl_increase": "2.5%"}
    assert parity.allowed_increase(ExportSection.model_validate(stated)) == 0.025
    for variant, allowed in (("int4", 0.25), ("int8", 0.005), ("int8-dynamic", 0.05)):
        assert parity.allowed_increase(ExportSection.model_validate({"quantize": variant})) == allowed
    assert parity.allowed_increase(ExportSection.model_validate({"target_bits": 4.5})) == 0.25
    increase, kl, lost = tolerance.quality(0.05)
    assert (increase, round(kl, 3), round(lost, 2)) == (0.05, 0.195, 0.62)


# --------------------------------------------------------------------------------------------------------- figures


def test_divergence_is_that_of_torch() -> None:
    drawn = np.random.default_rng(0)
    ours, theirs = drawn.normal(size=(2, 40, 300)).astype(np.float32) * 3
    targets = drawn.integers(0, 300, 40)
    sums = parity.beside(ours, theirs, targets)
    logs = [torch.log_softmax(torch.from_numpy(each).double(), -1) for each in (ours, theirs)]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], reduction="sum", log_target=True)
    assert sums[2] == pytest.approx(float(kl), rel=1e-5)
    nats = [-float(each[np.arange(40), targets].sum()) for each in logs]
    assert sums[:2] == pytest.approx(nats, rel=1e-6)
    assert sums[3] == (ours.argmax(-1) == theirs.argmax(-1)).sum()


def test_numbers_that_are_none_fail_and_are_written_as_json(tmp_path: Path) -> None:
    expected = [np.zeros((2, 3), np.float32)]
    broken = [np.array([[0.0, np.nan, 0.0], [0.0, 0.0, 0.0]], np.float32)]
    report = parity.judge("fp32", [parity.check("fine", expected, expected), parity.check("off", broken, expected)])
    assert not report["passed"]
    assert report["worst"]["figure"] == "logits, off"
    with pytest.raises(GateError):
        parity.gate(report, tmp_path / "parity.json")
    assert json.loads((tmp_path / "parity.json").read_text())["error"] is None


def test_verbose_prints_every_figure(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shaped: Shaped,
    saved: Saved,
    exported: Exported,
) -> None:
    model = saved(shaped("llama"))
    reference = hf.load_causal(model)
    report = parity.measure(reference, OnnxRunner(exported(model), CPU), text(shaped("llama"), 300), "noise")
    report = parity.both(
        report, parity.quality(reference, TorchRunner.of(reference), text(shaped("llama"), 300), "noise", 0.05)
    )
    parity.gate(report, tmp_path / "parity.json")
    assert capsys.readouterr().out == ""
    console.configure(verbose=True)
    try:
        parity.gate(report, tmp_path / "parity.json")
    finally:
        console.configure()
    shown = capsys.readouterr().out
    assert all(f"logits, {case}" in shown for case in parity.CASES)
    for row in ("allowed", "logits on 299 tokens of noise", "greedy, 256 of 256", "divergence from the original"):
        assert row in shown
