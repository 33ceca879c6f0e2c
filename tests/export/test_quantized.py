"""Quantised graphs: each product and lookup computes with the very weights that torch does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from llmctl.errors import DataError
from llmctl.export import hf
from llmctl.export.form import Form
from llmctl.inference import exported as runners
from llmctl.model import hf as models
from llmctl.model import quant
from llmctl.model.config import Config
from llmctl.model.quant import Scheme
from tests.export.conftest import CPU
from tests.project import Project

SCHEMES = {
    "int4": Scheme(4, 16, False),
    "int4, symmetric": Scheme(4, 32, True),
    "int8": Scheme(8, 16, False),
    "int8, symmetric": Scheme(8, 128, True),
    "dynamic": Scheme(8, 0, True, dynamic=True),
}


@pytest.fixture
def quantised(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model folder with every matrix rounded to nearest; `wider` says which have 8 bits."""

    def make(folder: Path, scheme: Scheme, wider: str = "nothing") -> Path:
        model, made = models.load(folder), tmp_path / "quantised"
        made.mkdir()
        hf.copy_companions(folder, made)
        values, found = model.state_dict(), {}
        for name in quant.matrices(model):
            own = scheme._replace(bits=8) if wider in name else scheme
            found[name] = quant.nearest(values[name], quant.fitted(own, values[name].shape[1]))
        quant.write(model, found, made)
        return made

    return make


def precisely(folder: Path) -> None:
    """Makes MatMulNBits multiply in fp32, so that what is left of an error is of the weights."""
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(proto, folder / "model.onnx")


def difference(quantised: Path, written: Path) -> float:
    """The largest difference of two logits between torch and the graph, as a share of the largest logit."""
    ids = np.random.default_rng(0).integers(0, 200, (2, 12))
    with torch.inference_mode():
        expected = models.load_causal(quantised)(torch.from_numpy(ids)).numpy()
    found = runners.load(written, CPU).forward(ids, last_only=False)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_torchs(
    name: str,
    tied: bool,
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("llama", tie_word_embeddings=tied)), SCHEMES[name])
    written = exported(folder)
    assert difference(folder, written) < 0.05  # products of integers
    precisely(written)
    assert difference(folder, written) < (0.02 if SCHEMES[name].dynamic else 2e-6)  # a rounding may turn over


@pytest.mark.parametrize("name", SCHEMES)
def test_standard_operators_give_the_same(
    name: str,
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("qwen3")), SCHEMES[name])
    written = exported(folder, Form("portable"))
    proto = onnx.load(str(written / "model.onnx"), load_external_data=False)
    assert {node.domain for node in proto.graph.node} == {""}
    assert difference(folder, written) < 0.05


def test_a_block_that_the_rows_do_not_fill(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("llama", intermediate_size=52, hidden_size=56)), Scheme(4, 32, False))
    written = exported(folder)
    precisely(written)
    assert difference(folder, written) < 2e-6


def test_a_packed_family_and_biases(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    config = shaped("gpt2", num_key_value_heads=4, hidden_size=64)
    folder = quantised(saved(config), Scheme(4, 16, False))
    written = exported(folder)
    precisely(written)
    assert difference(folder, written) < 2e-6


def test_mixed_bits(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("llama")), Scheme(4, 16, False), wider="down_proj")
    written = exported(folder)
    proto = onnx.load(str(written / "model.onnx"), load_external_data=False)
    bits = {
        a.i for node in proto.graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    }
    assert bits == {4, 8}
    precisely(written)
    assert difference(folder, written) < 2e-6


def test_projections_that_are_multiplied_together_have_one_scheme(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("llama")), Scheme(4, 16, False), wider="k_proj")
    with pytest.raises(DataError, match="multiplied together, but quantised apart"):
        exported(folder)


@pytest.mark.parametrize("name", ["int4", "dynamic"])
def test_a_tied_embedding_is_stored_once(
    name: str,
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    written = exported(quantised(saved(shaped("llama")), SCHEMES[name]))
    proto = onnx.load(str(written / "model.onnx"), load_external_data=False)
    reads = {n.op_type: n.input[n.op_type == "MatMulNBits"] for n in proto.graph.node if n.domain == "com.microsoft"}
    held = {tensor.name: {item.key: item.value for item in tensor.external_data} for tensor in proto.graph.initializer}
    assert held[reads["GatherBlockQuantized"]] == held[reads["MatMulNBits"]]


def test_rows_of_a_batch_do_not_change_each_other(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = quantised(saved(shaped("llama")), SCHEMES["dynamic"])
    runner = runners.load(exported(folder), CPU)
    ids = np.random.default_rng(1).integers(0, 200, (3, 9))
    whole = runner.forward(ids, last_only=False)
    for row in range(3):
        assert np.array_equal(runner.forward(ids[row : row + 1], last_only=False)[0], whole[row])


def test_from_the_command_line(finished: Project) -> None:
    """Quantised once, then exported, scored and found up to date; another block size is another model."""
    done = finished.llmctl("export", "--onnx", "--quantize", "int8", "--json")
    assert done.code == 0, done.err
    folder = finished.run / "export" / "finetune"
    assert {path.name for path in folder.iterdir()} >= {"hf-int8", "onnx-ort-int8"}
    parity = json.loads((folder / "onnx-ort-int8" / "parity.json").read_text())
    assert parity["original"]["change"] < 0.005
    plain = json.loads((folder / "onnx-ort" / "artifact.json").read_text())["metrics"]["bytes"]
    assert done.json["metrics"]["bytes"] < 0.4 * plain

    scores = {}
    for name in ("hf-int8", "onnx-ort-int8"):
        scored = finished.llmctl("eval", str(folder / name), "--json")
        assert scored.code == 0, scored.err
        scores[name] = scored.json["metrics"]["val_loss"]
    assert scores["hf-int8"] == pytest.approx(scores["onnx-ort-int8"], rel=2e-3)

    again = finished.llmctl("export", "--onnx", "--quantize", "int8", "--dry-run")
    assert again.out.count("would be kept") == 2
    other = finished.llmctl("export", "--onnx", "--quantize", "int8", "--set", "export.block_size=32", "--dry-run")
    assert other.out.count("would be made") == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--quantize", "int3"), "'int3'"),
        (("--quantize", "int8", "--target-bits", "5"), 'target_bits is of quantize = "mixed"'),
        (("--quantize", "mixed"), "needs a budget"),
        (("--quantize", "int4", "--dtype", "fp16"), "computes in fp32"),
        (("--max-ppl-increase", "2"), "max_ppl_increase"),
    ],
)
def test_what_does_not_go_together(flags: tuple[str, ...], said: str, finished: Project) -> None:
    done = finished.llmctl("export", "--onnx", *flags, "--json")
    assert done.code == 2
    assert said in done.json["error"]["message"]


def test_what_two_products_read_is_rounded_once(
    shaped: Callable[..., Config],
    saved: Callable[..., Path],
    quantised: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    written = exported(quantised(saved(shaped("llama")), SCHEMES["dynamic"]))
    kinds = [node.op_type for node in onnx.load(str(written / "model.onnx"), load_external_data=False).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2 * 5  # a layer: q, k and v; o; gate; up; down
    assert kinds.count("QuantizeLinear") == 2 * 4
