"""Quantising: the methods on a small trained model, and the stage as the chain runs it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmctl.artifact import Artifact, Job
from llmctl.errors import GateError, UsageError
from llmctl.export import quantize, texts
from llmctl.export.quantizing import awq, calibration, mixed
from llmctl.export.quantizing.methods import rounded
from llmctl.export.quantizing.rounding import cost, gptq, searched
from llmctl.model import hf, quant
from llmctl.model.config import Config
from llmctl.model.quant import Scheme, nearest
from llmctl.model.transformer import Decoder
from llmctl.recipe import ExportSection
from llmctl.text import sources
from llmctl.text.shards import Writer
from llmctl.text.tokenizer import Tokenizer
from tests.shapes import SHAPES

INT4 = Scheme(4, 32, False)
FIRST = "model.layers.0.input_layernorm.weight"
MakeJob = Callable[..., Job]
Publish = Callable[..., Artifact]
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
}


# ------------------------------------------------------------------------------------------------------- one matrix


def correlated(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix and an H of activations that are far from alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.rand(columns, generator=generator) ** 3
    return torch.randn(rows, columns, generator=generator), x.t() @ x / len(x)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 24),
    st.integers(2, 90),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.integers(0, 99),
)
def test_each_method_is_no_worse_than_the_last(
    rows: int, columns: int, bits: int, block: int, symmetric: bool, seed: int
) -> None:
    scheme = Scheme(bits, block, symmetric)
    matrix, hessian = correlated(rows, columns, seed)
    plain, fitted = nearest(matrix, scheme).values(), searched(matrix, scheme).values()
    assert float((fitted - matrix).square().sum()) <= float((plain - matrix).square().sum()) * 1.0001
    made_good = gptq(matrix, scheme, hessian).values()
    assert cost(matrix, made_good, hessian) <= cost(matrix, plain, hessian) * 1.0001


def test_gptq_makes_errors_good() -> None:
    matrix, hessian = correlated(64, 128, 0)
    plain, weighted, better = (
        cost(matrix, found.values(), hessian)
        for found in (nearest(matrix, INT4), searched(matrix, INT4, hessian.diag()), gptq(matrix, INT4, hessian))
    )
    assert better < 0.7 * weighted < 0.7 * plain


def test_what_was_never_read_is_rounded_all_the_same() -> None:
    matrix, hessian = correlated(8, 64, 0)
    hessian[3:40] = 0.0
    hessian[:, 3:40] = 0.0
    for found in (
        gptq(matrix, INT4, hessian),
        gptq(matrix, INT4, 0 * hessian),
        searched(matrix, INT4, 0 * hessian.diag()),
    ):
        assert float((found.values() - matrix).abs().max()) < 1.3


# -------------------------------------------------------------------------------------------------------- one model


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer) -> tuple[Decoder, Tensor, Tensor]:
    """A byte model that has learnt something of Python, windows to calibrate on, and windows to score."""
    ids: list[int] = []
    for document in sources.documents("builtin:python-stdlib", Path(), tally=sources.Tally()):
        ids += tokenizer.encode(document.text)
        if len(ids) > 150_000:
            break
    windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    text, windows = windows[:48], windows[48:]
    config = replace(
        SHAPES["qwen3"], vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=128, **WIDE
    )
    model = Decoder.random(config, seed=0)
    losses: list[float] = []
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(120):
        rows = windows[(8 * step) % (len(windows) - 8) :][:8]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 10 * 2.7  # of 5.7
    return model.eval().requires_grad_(False), windows[:64], text


def divergence(model: Decoder, other: Decoder, text: Tensor) -> float:
    with torch.inference_mode():
        theirs, ours = (each(text).log_softmax(-1) for each in (model, other))
        return float(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean())


def schemes(model: Decoder, scheme: Scheme) -> dict[str, Scheme]:
    return {name: quant.fitted(scheme, model.get_parameter(name).shape[1]) for name in quant.matrices(model)}


def replaced(model: Decoder, change: Callable[[Tensor], Tensor]) -> Decoder:
    """Every matrix through a rounding of another tool."""
    made = copy.deepcopy(model)
    for name in quant.matrices(made):
        made.get_parameter(name).data = change(made.get_parameter(name).data)
    return made


def q4_1(matrix: Tensor) -> Tensor:
    """llama.cpp's: blocks of 32, fp16 scale and minimum: 5 bits a weight."""
    kind = gguf.GGMLQuantizationType.Q4_1
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.numpy(), kind), kind).copy())


def matmul_nbits(matrix: Tensor) -> Tensor:
    """onnxruntime's default: blocks of 32, the value of the largest magnitude at code 0, fp32 scale: 5 bits a weight
    (MatMulNBitsQuantizer, symmetric)."""
    blocks = matrix.view(len(matrix), -1, 32)
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(most != 0, most / -8, 1.0)
    return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(matrix)


def test_int4_is_nearer_to_the_model_than_others_in_no_more_bits(trained: tuple[Decoder, Tensor, Tensor]) -> None:
    model, ids, text = trained
    found = {}
    for method in ("rtn", "k-quant", "gptq", "awq"):
        made = copy.deepcopy(model)
        rounded(made, schemes(model, Scheme(4, 32, True)), method, ids)
        found[method] = divergence(model, made, text)
    made = copy.deepcopy(model)
    plan = schemes(model, Scheme(4, 64, False))
    rounded(made, plan, "gptq", ids)
    smaller = divergence(model, made, text)
    theirs = {"Q4_1": divergence(model, replaced(model, q4_1), text)}
    theirs["MatMulNBits"] = divergence(model, replaced(model, matmul_nbits), text)
    assert quantize.bits_per_weight(model, plan) < 5  # the others' bits, norms left out
    assert found["k-quant"] < found["rtn"]
    assert found["gptq"] < min(theirs.values())
    assert smaller < min(theirs.values())
    assert found["awq"] < found["rtn"]


def test_awq_leaves_the_model_what_it_is(trained: tuple[Decoder, Tensor, Tensor]) -> None:
    model, ids, text = trained
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.get_parameter(FIRST)[3] = 20.0  # a channel that carries much
        made.get_parameter("model.layers.1.mlp.up_proj.weight")[7] *= 20.0
    scaled = copy.deepcopy(made)
    calibration.blockwise(
        scaled, ids, lambda index, block, hessians: awq.scale_block(block, hessians, lambda name, columns: INT4)
    )
    moved = (scaled.get_parameter(FIRST) / made.get_parameter(FIRST)).log().abs()
    assert float(moved.max()) > 0.1
    assert divergence(made, scaled, text) < 1e-9


def test_the_second_moments_are_those_of_what_is_read(trained: tuple[Decoder, Tensor, Tensor]) -> None:
    model, ids, _ = trained
    seen: list[Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    with torch.inference_mode():
        head = model.hidden(ids)
    handle.remove()
    found: dict[int, dict[str, Tensor]] = {}
    last = calibration.blockwise(model, ids, lambda index, block, hessians: found.update({index: dict(hessians)}))
    torch.testing.assert_close(last, calibration.second_moment(head), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1]["mlp.down_proj"], calibration.second_moment(seen[0]), rtol=1e-3, atol=1e-4)
    assert found[0].keys() == {f"self_attn.{n}_proj" for n in "qkvo"} | {
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    }


def test_mixed_spends_bits_where_they_count(trained: tuple[Decoder, Tensor, Tensor]) -> None:
    model, ids, text = trained
    plans, errors = {}, {}
    for bits in (4.7, 5.2, 7.0):
        section = ExportSection.model_validate({"target_bits": bits})
        plans[bits] = mixed.chosen(model, section, "gptq", ids, 0.0)
        size = quantize.bits_per_weight(model, plans[bits])
        assert bits - 0.5 < size <= bits
        made = copy.deepcopy(model)
        rounded(made, plans[bits], "k-quant")
        errors[bits] = divergence(model, made, text)
        layer = "model.layers.0.self_attn.{}_proj.weight".format
        assert plans[bits][layer("q")] == plans[bits][layer("k")] == plans[bits][layer("v")]  # multiplied at once
    assert errors[7.0] < 0.7 * min(errors[4.7], errors[5.2])
    assert {scheme.bits for scheme in plans[7.0].values()} == {4, 8}
    alike = copy.deepcopy(model)
    rounded(alike, schemes(model, Scheme(4, 32, False)), "k-quant")
    assert quantize.bits_per_weight(model, schemes(model, Scheme(4, 32, False))) > 5.2
    assert errors[5.2] < 1.3 * divergence(model, alike, text)
    with pytest.raises(UsageError, match=r"target_bits = 4, but this model takes 4\.\d+ at the least"):
        mixed.chosen(model, ExportSection.model_validate({"target_bits": 4}), "gptq", ids, 0.0)


def test_mixed_takes_the_fewest_bits_that_a_budget_allows(trained: tuple[Decoder, Tensor, Tensor]) -> None:
    model, ids, _ = trained
    sizes = []
    for share in ("0.02%", "5%"):
        section = ExportSection.model_validate({"max_ppl_increase": share})
        plan = mixed.chosen(model, section, "k-quant", ids, float(share[:-1]) / 100)
        sizes.append(quantize.bits_per_weight(model, plan))
    assert sizes[0] > sizes[1] + 0.1


# --------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def model(
    trained: tuple[Decoder, Tensor, Tensor], tokenizer: Tokenizer, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> Artifact:
    """The trained model as an artifact, with its text."""
    monkeypatch.setattr(quantize, "TOKENS", 2048)
    monkeypatch.setattr(quantize, "LEAST", 2048)
    model, ids, text = trained

    def save(folder: Path) -> None:
        hf.save(model, tokenizer, folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")

    def write(folder: Path) -> None:
        writer = Writer(folder, len(tokenizer), tokenizer.bos_id, tokenizer.eos_id or 0)
        for split, windows in (("train", ids), ("val", text)):
            writer.add(split, windows.flatten().tolist(), windows.numel())
        writer.close()

    return publish("pretrain", "model", save, {"data": publish("prep", "tokens", write)})


@pytest.mark.parametrize(
    ("variant", "keys", "bits", "name"),
    [
        ("int4", {"quantize": "int4"}, 5.3, "4 bits, blocks of 64"),
        ("int4", {"quantize": "int4", "symmetric": True, "quantize_method": "awq"}, 5.2, "4 bits, blocks of 64"),
        ("int8", {"quantize": "int8"}, 9.5, "8 bits, blocks of 64"),
        ("int8-dynamic", {"quantize": "int8-dynamic"}, 8.7, "8 bits, rows, dynamic"),
        ("mixed", {"target_bits": 6.0}, 6.0, "8 bits, blocks of 64"),
    ],
)
def test_what_is_published(
    variant: str, keys: dict[str, Any], bits: float, name: str, model: Artifact, job: MakeJob
) -> None:
    made = quantize.quantize(job(model, f"hf-{variant}", **keys))
    assert (made.path / "tokenizer.json").read_bytes() == (model.path / "tokenizer.json").read_bytes()
    assert (made.path / "chat_template.jinja").is_file()
    assert (made.path / "generation_config.json").is_file()
    report = json.loads((made.path / "parity.json").read_text())
    assert report["passed"]
    assert report["original"]["change"] == made.metrics["perplexity_change"] < (0.005 if "int8" in variant else 0.05)
    assert made.metrics["bytes"] == (made.path / "model.safetensors").stat().st_size
    assert made.metrics["bits_per_weight"] <= bits
    stored = 8 * made.metrics["bytes"] / sum(t.numel() for t in hf.load(model.path).state_dict().values())
    assert made.metrics["bits_per_weight"] == pytest.approx(stored, rel=0.2)  # beside its header the file holds no more
    assert name in made.metrics["matrices"]
    loaded = hf.load_causal(made.path)
    assert isinstance(loaded, Decoder)
    assert quant.read(made.path).keys() == set(quant.matrices(loaded))


def test_a_worse_model_is_not_published(model: Artifact, job: MakeJob) -> None:
    made = job(model, "hf-int4", quantize="int4", quantize_method="rtn", block_size=128, max_ppl_increase="0.0001%")
    with pytest.raises(GateError, match="not the original any more"):
        quantize.quantize(made)
    assert not (made.run.path / made.place).exists()
    assert json.loads((made.work / "parity.json").read_text())["passed"] is False


def test_the_same_seed_gives_the_same_bytes(model: Artifact, job: MakeJob) -> None:
    made = [quantize.quantize(job(model, place, quantize="int4")) for place in ("hf-int4", "hf-int4-again")]
    first, second = ((each.path / "model.safetensors").read_bytes() for each in made)
    assert first == second


def test_only_decoders_are_quantised(
    shaped: Callable[..., Config], tokenizer: Tokenizer, publish: Publish, job: MakeJob
) -> None:
    encoder = shaped("qwen3", task="sequence-classification", num_labels=2)
    made = publish("pretrain", "model", lambda folder: hf.save(hf.random(encoder, 0), tokenizer, folder))
    with pytest.raises(UsageError, match="quantising is of decoders so far"):
        quantize.quantize(job(made, "hf-int4", quantize="int4"))


# ---------------------------------------------------------------------------------------------------------- the text


def test_never_calibrated_on_what_the_gate_reads(
    trained: tuple[Decoder, Tensor, Tensor], tokenizer: Tokenizer, publish: Publish, job: MakeJob, tmp_path: Path
) -> None:
    model = publish("pretrain", "model", lambda folder: hf.save(trained[0], tokenizer, folder))
    read, _ = texts.gate_text(job(model), model, tokenizer)
    found, name = texts.calibration_text(job(model), model, tokenizer, 4, 64)
    assert (found.shape, name) == ((4, 64), texts.BUILTIN)
    assert not within(found, read)

    (tmp_path / "mine.txt").write_text("The quick brown fox. " * 20)
    asked = job(model, text="mine.txt")
    found, name = texts.calibration_text(asked, model, tokenizer, 4, 64)  # too short to hold both
    assert name == texts.BUILTIN
    assert not within(found, texts.gate_text(asked, model, tokenizer)[0])

    def fill(folder: Path) -> None:
        writer = Writer(folder, len(tokenizer), tokenizer.bos_id, tokenizer.eos_id or 0)
        for split, length in (("train", 600), ("val", 300)):
            writer.add(split, np.random.default_rng(length).integers(5, 250, length).tolist(), length, "text")
        writer.close()

    data = publish("prep", "tokens", fill)
    learnt = publish(
        "pretrain", "model", lambda folder: hf.save(hf.load(model.path), tokenizer, folder), {"data": data}
    )
    found, name = texts.calibration_text(job(learnt), learnt, tokenizer, 4, 64)
    assert name == f"the training split of prep {data.short}"
    assert len(np.unique(found, axis=0)) == 4
    assert not within(found, texts.gate_text(job(learnt), learnt, tokenizer)[0])


def within(windows: np.ndarray, text: np.ndarray) -> bool:
    """Whether any window is a piece of the text."""
    whole = text.astype("<i8").tobytes()
    return any(row.astype("<i8").tobytes() in whole for row in windows)
