"""The `hf-int4`, `hf-int8`, `hf-int8-dynamic` and `hf-mixed` variants: the model with its matrices in few bits.

A Hugging Face folder in compressed-tensors' format, which eval, chat and serve take as they take the model, and which
the quantised ONNX graphs are written from. It is published only if it is still the model it was made from.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import UsageError
from llmctl.export import hf, parity, reports, tolerance
from llmctl.export.quantizing import mixed
from llmctl.export.quantizing.methods import CALIBRATED, rounded
from llmctl.export.texts import calibration_text, gate_text
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf as models
from llmctl.model import quant
from llmctl.model.quant import Quantized, Scheme
from llmctl.model.transformer import Decoder
from llmctl.recipe import ExportSection
from llmctl.text.tokenizer import Tokenizer

BEST = {"int4": "gptq", "int8": "k-quant", "int8-dynamic": "rtn", "mixed": "gptq"}  # what "auto" is: docs/benchmarks.md
WINDOW, TOKENS = 512, 16_384  # of the calibration text
FLOPS = 4e12  # what a pass over it may cost, 2 a parameter and token
LEAST = 4_096  # tokens of it, whatever they cost


def quantize(job: Job) -> Artifact:
    """Publishes `export/<subject>/hf-<variant>`.

    Raises:
        GateError: the quantised model is further from the original than `parity.quality` allows.
        UsageError: another kind of model than a decoder.
    """
    model, section, started = job.inputs["model"], job.recipe.section("export"), time.monotonic()
    original, tokenizer = models.load(model.path), Tokenizer.load(model.path)
    if not isinstance(original, Decoder):
        config = original.config
        raise UsageError(
            f"{model.path} is a {config.family} {config.kind} for {config.task}, and quantising is of decoders so far",
            hint="llmctl export --hf without --quantize writes the folder as it is",
        )
    models.check_vocabulary(original.config, len(tokenizer), model.path, tokenizer.special_ids)
    torch.set_num_threads(job.device.threads)
    tokens, text = gate_text(job, model, tokenizer)
    method = BEST[section.variant] if section.quantize_method == "auto" else section.quantize_method
    told: dict[str, Any] = {"method": method}
    ids = None
    if method in CALIBRATED or section.variant == "mixed":
        read = min(TOKENS, max(LEAST, int(FLOPS / (2 * original.config.parameters))))
        length = min(WINDOW, original.config.max_position_embeddings)
        found, told["calibration_text"] = calibration_text(job, model, tokenizer, -(-read // length), length)
        ids = torch.from_numpy(found)
        console.detail(f"calibrated on {ids.numel():,} tokens of {told['calibration_text']}")

    if section.variant == "mixed":
        assert ids is not None
        schemes = mixed.chosen(original, section, method, ids, parity.allowed_increase(section))
    else:
        schemes = planned(original, section)
    changed = models.load(model.path)
    matrices = rounded(changed, schemes, method, ids)

    with job.publishing() as staging:
        hf.copy_companions(model.path, staging.path)
        size = quant.write(changed, matrices, staging.path)
        del changed
        candidate = models.load(staging.path)  # what was written is what is measured
        assert isinstance(candidate, Decoder)
        allowed = parity.allowed_increase(section)
        report = parity.quality(original, TorchRunner.of(candidate), tokens, text, allowed)
        told |= {"bytes": size, "bits_per_weight": round(bits_per_weight(original, schemes), 4)}
        told |= {"matrices": bits_of(matrices)}
        parity.gate(report | {"quantized": told}, job.work / "parity.json")
        (job.work / "parity.json").rename(staging.path / "parity.json")
        seconds = round(time.monotonic() - started, 3)
        artifact = staging.seal({**told, **reports.metrics(report), "seconds": seconds}, logs=("parity.json",))

    figures = (
        f"{console.size(size)} · {told['bits_per_weight']:.2f} bits a weight · {method} · {reports.summary(report)}"
    )
    console.stage("export", f"hf-{section.variant} {figures}", console.duration(time.monotonic() - started))
    if (cost := artifact.metrics["perplexity_change"]) > tolerance.NOTABLE and not section.max_ppl_increase:
        console.warn(
            f"quantising costs {100 * cost:.0f} % of perplexity; what keeps more: --max-ppl-increase 5% (mixed bits), "
            "--quantize int8, or --set export.block_size=32"
        )
    return artifact


def planned(model: models.Model, section: ExportSection) -> dict[str, Scheme]:
    """How each matrix is quantised where all are alike.

    A matrix that int8 products read has a scale a row; an embedding that is looked up alone, one too.
    """
    native = model.state_dict()
    if section.variant == "int8-dynamic":
        tied = model.config.tie_word_embeddings
        return {
            name: Scheme(8, 0, True, tied or not name.endswith("embed_tokens.weight")) for name in quant.matrices(model)
        }
    plain = Scheme(4 if section.variant == "int4" else 8, section.block_size, section.is_symmetric)
    return {name: quant.fitted(plain, native[name].shape[1]) for name in quant.matrices(model)}


def bits_per_weight(model: models.Model, schemes: dict[str, Scheme]) -> float:
    """Bits a parameter of the whole model, scales, zero points and what stays in fp32 among them."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    bits = sum(schemes[n].size(*shape) if n in schemes else 32 * shape.numel() for n, shape in shapes.items())
    return float(bits / sum(shape.numel() for shape in shapes.values()))


def bits_of(matrices: dict[str, Quantized]) -> dict[str, int]:
    """How many matrices have which scheme, as the manifest says it."""
    counts: dict[str, int] = {}
    for matrix in matrices.values():
        scheme = matrix.scheme
        width = f"blocks of {scheme.block}" if scheme.block else "rows"
        name = f"{scheme.bits} bits, {width}" + (", dynamic" if scheme.dynamic else "")
        counts[name] = counts.get(name, 0) + 1
    return counts
