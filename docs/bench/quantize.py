"""What quantising costs, beside the ways of others: a table of size and quality on weights that were never quantised.

    python docs/bench/quantize.py runs/small/pretrain [--windows 160]

The text is the validation split of the run's tokens, the calibration text its training split; without tokens beside the
model, both come from the built-in text. "MatMulNBits" is what onnxruntime-genai's builder makes of the model by default
(`-p int4 -e cpu`: symmetric, blocks of 32, fp32 scales, the tied embedding included), Q4_1 llama.cpp's format, every
matrix in it. Bits are of the whole model: scales, zero points, norms.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.export import quantize
from llmctl.export.quantizing import mixed
from llmctl.export.quantizing.methods import rounded
from llmctl.model import hf, quant
from llmctl.model.dynamic import round_inputs
from llmctl.model.quant import Scheme
from llmctl.model.transformer import Decoder
from llmctl.recipe import ExportSection
from llmctl.text import sources
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="of the model's context, to score")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    asked = parser.parse_args()
    model = hf.load(asked.model)
    assert isinstance(model, Decoder)
    length = min(512, model.config.max_position_embeddings)
    text, ids = texts(asked.model, asked.windows, -(-quantize.TOKENS // length), length)
    print(f"{asked.model}: {model.config.parameters:,} parameters; scored on {text.numel():,} tokens")
    print("| | bits a weight | MB | perplexity | top-1 | KL, nats |\n|---|---:|---:|---:|---:|---:|")
    for name, make in rows(ids).items():
        if asked.only in name:
            made = copy.deepcopy(model)
            bits = make(made)
            change, same, divergence = compare(model, made, text)
            size = bits * sum(t.numel() for t in model.state_dict().values()) / 8e6
            print(
                f"| {name} | {bits:.2f} | {size:.1f} | {change:+.2%} | {same:.1%} | {divergence:.5f} |",
                flush=True,
            )


def rows(ids: Tensor) -> dict[str, Callable[[Decoder], float]]:
    """What rounds a model in place and returns its bits a weight, by the row's name."""

    def ours(scheme: Scheme, method: str) -> Callable[[Decoder], float]:
        def make(model: Decoder) -> float:
            plan = {name: quant.fitted(scheme, model.get_parameter(name).shape[1]) for name in quant.matrices(model)}
            rounded(model, plan, method, ids)
            if scheme.dynamic:
                round_inputs(model, list(plan))
            return quantize.bits_per_weight(model, plan)

        return make

    def chosen(bits: float) -> Callable[[Decoder], float]:
        def make(model: Decoder) -> float:
            section = ExportSection.model_validate({"target_bits": bits})
            plan = mixed.chosen(copy.deepcopy(model), section, "gptq", ids, 0.0)
            rounded(model, plan, "gptq", ids)
            return quantize.bits_per_weight(model, plan)

        return make

    found = {"MatMulNBits, RTN (genai's default)": theirs(matmul_nbits, 32), "Q4_1": theirs(q4_1, 32)}
    for name, scheme in (
        ("int4 symmetric, blocks of 32", Scheme(4, 32, True)),
        ("int4, blocks of 64", Scheme(4, 64, False)),
        ("int4, blocks of 32", Scheme(4, 32, False)),
    ):
        found |= {f"{name}, {method}": ours(scheme, method) for method in ("rtn", "k-quant", "awq", "gptq")}
    found |= {f"mixed, at most {bits} bits": chosen(bits) for bits in (5.0, 6.0)}
    found["int8, blocks of 32, k-quant"] = ours(Scheme(8, 32, False), "k-quant")
    found["int8-dynamic"] = ours(Scheme(8, 0, True, True), "rtn")
    return found


def theirs(change: Callable[[Tensor], Tensor], block: int) -> Callable[[Decoder], float]:
    """Another tool's values, of 5 bits: 4, and 32 more a block. Rows that its blocks do not divide are filled up."""

    def make(model: Decoder) -> float:
        names = quant.matrices(model)
        for name in names:
            matrix = model.get_parameter(name).data
            model.get_parameter(name).data = change(F.pad(matrix, (0, -matrix.shape[1] % block)))[:, : matrix.shape[1]]
        return quantize.bits_per_weight(model, dict.fromkeys(names, Scheme(4, block, True)))

    return make


def q4_1(matrix: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType.Q4_1
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.numpy(), kind), kind).copy())


def matmul_nbits(matrix: Tensor) -> Tensor:
    """The value of the largest magnitude of a block at code 0 (onnxruntime's MatMulNBitsQuantizer, symmetric)."""
    blocks = matrix.view(len(matrix), -1, 32)
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(most != 0, most / -8, 1.0)
    return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(matrix)


def compare(model: Decoder, made: Decoder, text: Tensor) -> tuple[float, float, float]:
    """Perplexity's change, the share of equal best tokens, and the mean divergence, over (N, T) windows."""
    nats = same = divergence = 0.0
    with torch.inference_mode():
        for row in text:
            theirs, ours = (each(row[None, :-1])[0].double().log_softmax(-1) for each in (model, made))
            wanted = row[1:, None]
            nats += float((theirs.gather(1, wanted) - ours.gather(1, wanted)).sum())
            same += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum())
    count = text[:, 1:].numel()
    return math.exp(nats / count) - 1, same / count, divergence / count


def texts(model: Path, windows: int, calibration: int, length: int) -> tuple[Tensor, Tensor]:
    """(windows, length) to score and (calibration, length) to calibrate on, of different text."""
    tokens = model.parent / "prep"
    if (tokens / "index.json").is_file():
        held, seen = Shards.open(tokens, "val")[: windows * length], Shards.open(tokens, "train")
        drawn = np.random.default_rng(0).permutation(len(seen) // length)[:calibration]
        chosen = np.stack([seen[int(i) * length : (int(i) + 1) * length] for i in drawn])
        return torch.from_numpy(held[: len(held) // length * length].reshape(-1, length)[:windows]), torch.from_numpy(
            chosen
        )
    ids: list[int] = []
    tokenizer = Tokenizer.load(model)
    for document in sources.documents("builtin:python-stdlib", Path(), tally=sources.Tally()):
        ids += tokenizer.encode(document.text)
        if len(ids) >= (windows + calibration) * length:
            break
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return whole[:windows], whole[windows : windows + calibration]


if __name__ == "__main__":
    main()
