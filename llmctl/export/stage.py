"""`llmctl export`: the model in the form another runtime takes, published only if it still is the model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import UsageError
from llmctl.export import (
    bisect,
    encoder_graph,
    genai,
    gguf,
    graph,
    hf,
    kv_cache,
    lowrank,
    lstm_graph,
    parity,
    parity_encoder,
    quantize,
    reports,
    seq2seq_graph,
    tensorrt,
)
from llmctl.export.form import Form
from llmctl.export.provenance import provenance
from llmctl.export.texts import calibration_text, gate_text
from llmctl.inference import exported
from llmctl.model import hf as models
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder
from llmctl.text.tokenizer import Tokenizer


def export(job: Job) -> Artifact:
    """Publishes `export/<subject>/<variant>`; the variant is the last part of the job's place.

    Raises:
        GateError: the exported graph differs from the model by more than parity.py allows.
        DataError: the model holds something that the graph has no node for, or its weights do not fit its config.
        UsageError: the model has no form in which other tools read it.
    """
    variant, model = job.place.rpartition("/")[2], job.inputs["model"].path
    if not variant.startswith("onnx-") and models.read_config(model).kind == "recurrent":
        raise UsageError(
            f"{variant}: no other tool has a class for an LSTM, so ONNX is the only form it is exported in",
            hint=f"llmctl export --onnx; {model} itself holds config.json, model.safetensors and the tokenizer",
        )
    if variant.startswith("gguf-"):
        return export_gguf(job)
    if variant.startswith("hf-"):
        return quantize.quantize(job)
    if variant.startswith("tensorrt-"):
        return tensorrt.export(job)
    return export_hf(job) if variant == "hf" else export_onnx(job)


def export_onnx(job: Job) -> Artifact:
    """A graph, its weights beside it, and parity.json, which says how near it is to the model.

    A quantised graph has its weights from the input "quantized". On failure parity.json stays in the run's working
    folder.
    """
    model, started, section = job.inputs["model"], time.monotonic(), job.recipe.section("export")
    weights, form = job.inputs.get("quantized", model), Form(section.profile, section.dtype)
    adapter = model.path / "adapter" if section.adapter == "apart" else None
    if adapter is not None:
        weights, form = lowrank.base(model), replace(form, adapted=lowrank.modules(adapter))
    config, tokenizer = models.read_config(model.path), Tokenizer.load(model.path)
    models.check_vocabulary(config, len(tokenizer), model.path, tokenizer.special_ids)
    torch.set_num_threads(job.device.threads)
    tokens, text = gate_text(job, model, tokenizer)
    writer = writer_of(config)
    if section.kv_cache == "int8":
        windows = calibration_text(job, model, tokenizer, kv_cache.WINDOWS, min(kv_cache.WINDOW, config.longest))
        form = replace(form, cache=kv_cache.calibrated(weights.path, windows[0].reshape(-1), job.device.torch))

    with job.publishing() as staging:
        told = provenance(model if adapter is None else weights)
        size = writer.write(weights.path, staging.path, config, told, form)
        hf.copy_companions(model.path, staging.path)
        if adapter is not None:
            lowrank.write(adapter, staging.path, form.dtype)
        if writer is graph and form.profile == "ort":  # onnxruntime-genai knows decoders alone
            genai.write(staging.path, config)

        report = reported(job, staging.path, form, tokens, text)
        parity.gate(report, job.work / "parity.json")
        (job.work / "parity.json").rename(staging.path / "parity.json")

        seconds = round(time.monotonic() - started, 3)
        artifact = staging.seal({"bytes": size, **reports.metrics(report), "seconds": seconds}, logs=("parity.json",))

    figures = f"{job.place.rpartition('/')[2]} {console.size(size)} · {reports.summary(report)}"
    console.stage("export", figures, console.duration(time.monotonic() - started))
    for parting in report.get("greedy", {}).get("partings", ()):
        gap = f"{parting['gap']:.1e} apart (below {parting['limit']:.1e} is a tie)"
        console.detail(f"greedy token {parting['token']} parted where the model's two best logits are {gap}")
    return artifact


def reported(job: Job, folder: Path, form: Form, tokens: np.ndarray, text: str) -> dict[str, Any]:
    """The gate's report on the graph in `folder`: see `parity.measure`."""
    model, section = job.inputs["model"], job.recipe.section("export")
    weights = job.inputs.get("quantized", model)
    if models.read_config(model.path).task != "causal-lm":
        mask = Tokenizer.load(model.path).mask_id
        return parity_encoder.measure(weights.path, folder, job.device, tokens, text, form.dtype, mask)
    runner = exported.load(folder, job.device)
    reference = models.load_causal(weights.path, device=job.device.torch)
    kept: dict[str, Any] = {}
    if weights is not model or form.cache:
        original, allowed = models.load_causal(model.path, device=job.device.torch), parity.allowed_increase(section)
        kept = {"original": original, "max_increase": allowed}
    report = parity.measure(reference, runner, tokens, text, "int8" if kept else form.dtype, **kept)
    if not report["passed"] or section.debug_parity:
        bisect.blame(report, reference, runner, tokens)
    return report


def writer_of(config: Config) -> Any:
    """The module that writes such a model's graph."""
    if config.kind == "recurrent":
        return lstm_graph
    if config.kind == "encoder-decoder":
        return seq2seq_graph
    return graph if config.task == "causal-lm" else encoder_graph


def export_hf(job: Job) -> Artifact:
    """The clean Hugging Face folder, loaded back before it is published."""
    model, started = job.inputs["model"], time.monotonic()
    with job.publishing() as staging:
        size = hf.write(model, staging.path, job.run.name)
        metrics = {"bytes": size, "seconds": round(time.monotonic() - started, 3)}
        artifact = staging.seal(metrics, logs=("README.md",))
    told = f"hf {console.size(size)} · loaded back, bit for bit the model"
    console.stage("export", told, console.duration(time.monotonic() - started))
    return artifact


def export_gguf(job: Job) -> Artifact:
    """One GGUF file, read back before it is published, beside the tokenizer's files and parity.json.

    transformers takes a tokenizer.json beside the file before the one in it, which it can't read without a space put
    before every text.
    """
    model, started, kind = job.inputs["model"], time.monotonic(), job.recipe.section("export").gguf_type
    torch.set_num_threads(job.device.threads)
    reference = models.load_causal(model.path)
    gguf.architecture_of(reference.config)
    assert isinstance(reference, Decoder)
    told = {"general.name": job.run.name, **provenance(model)}
    told.pop("llmctl.chat_template", "")  # a GGUF file has keys of its own for these two
    if licence := told.pop("llmctl.licence", ""):
        told["general.license"] = licence
    tokens, text = gate_text(job, model, Tokenizer.load(model.path))
    with job.publishing() as staging:
        path = staging.path / gguf.FILE
        gguf.write(reference, model.path, path, kind, told)
        hf.copy_companions(model.path, staging.path)
        report = gguf.check(reference, model.path, path, kind, tokens, text)
        parity.gate(report, job.work / "parity.json")
        (job.work / "parity.json").rename(staging.path / "parity.json")
        read, weights, size = report["text"], report["weights"], path.stat().st_size
        metrics = {
            "bytes": size,
            "weight_error": weights["max_relative_error"],
            "parity_error": report["error"],
            "perplexity": read["gguf_perplexity"],
            "perplexity_change": read["change"],
            "perplexity_text": read["name"],
            "seconds": round(time.monotonic() - started, 3),
        }
        artifact = staging.seal(metrics, logs=("parity.json",))
    same = (
        "read back, every weight the model's"
        if weights["exact"] == weights["tensors"]
        else f"weights within {weights['max_relative_error']:.1e} of the largest"
    )
    change = f"perplexity {round(100 * read['change'], 2) + 0.0:+.2f} %"
    console.stage(
        "export", f"gguf-{kind} {console.size(size)} · {same} · {change}", console.duration(time.monotonic() - started)
    )
    return artifact
