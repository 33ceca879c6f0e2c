"""`llmctl export`: the model in the form another runtime takes, published only if it still is the model."""

from __future__ import annotations

import time

import numpy as np
import torch

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, UsageError
from llmctl.export import genai, gguf, graph, hf, lstm_graph, parity
from llmctl.inference import onnx_recurrent
from llmctl.model import hf as models
from llmctl.model.transformer import Decoder
from llmctl.text import sources
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer

BUILTIN = "builtin:python-stdlib"  # the text of the perplexity check where there is no other
ENOUGH = parity.TEXT + 1  # tokens


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
    return export_hf(job) if variant == "hf" else export_onnx(job)


def export_onnx(job: Job) -> Artifact:
    """A decoder graph with a KV cache, its weights beside it, and parity.json, which says how near it is to the model.

    On failure parity.json stays in the run's working folder.
    """
    model, started = job.inputs["model"], time.monotonic()
    config, tokenizer = models.read_config(model.path), Tokenizer.load(model.path)
    if config.task != "causal-lm":
        raise UsageError(
            f"{model.path} is a {config.family} {config.kind}, and the ONNX export is of decoders so far",
            hint="llmctl export --hf writes the folder that transformers loads",
        )
    models.check_vocabulary(config, len(tokenizer), model.path, tokenizer.special_ids)
    torch.set_num_threads(job.device.threads)
    tokens, text = gate_text(job, model, tokenizer)

    with job.publishing() as staging:
        recurrent = config.kind == "recurrent"
        size = (lstm_graph if recurrent else graph).write(model.path, staging.path, config, provenance(model))
        hf.copy_companions(model.path, staging.path)
        if not recurrent:  # onnxruntime-genai knows decoders alone
            genai.write(staging.path, config)

        runner = onnx_recurrent.load(staging.path, job.device)
        reference = models.load_causal(model.path, device=job.device.torch)
        report = parity.measure(reference, runner, tokens, text)
        parity.gate(report, job.work / "parity.json")
        (job.work / "parity.json").rename(staging.path / "parity.json")

        run, read = report["greedy"], report["text"]
        metrics = {
            "bytes": size,
            "parity_error": report["error"],
            "greedy_tokens": run["tokens"],
            "greedy_equal": run["equal"],
            "perplexity": read["onnx_perplexity"],
            "perplexity_change": read["change"],
            "perplexity_text": read["name"],
            "seconds": round(time.monotonic() - started, 3),
        }
        artifact = staging.seal(metrics, logs=("parity.json",))

    same, change = (
        f"greedy {run['equal']}/{run['tokens']} equal",
        f"perplexity {round(100 * read['change'], 2) + 0.0:+.2f} %",
    )
    figures = f"onnx-ort {console.size(size)} · parity {report['error']:.1e} · {same} · {change}"
    console.stage("export", figures, console.duration(time.monotonic() - started))
    for parting in run["partings"]:
        gap = f"{parting['gap']:.1e} apart (below {parting['limit']:.1e} is a tie)"
        console.detail(f"greedy token {parting['token']} parted where the model's two best logits are {gap}")
    return artifact


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


def provenance(model: Artifact) -> dict[str, str]:
    """What the graph's properties say of its origin."""
    known = {"llmctl.model": model.identity, "llmctl.stage": model.stage}
    for name, entry in model.manifest["files"].items():
        if name.endswith(".safetensors"):
            known[f"llmctl.sha256.{name}"] = entry["sha256"]
    licence = model.licence()
    return known | ({"llmctl.licence": licence} if licence else {})


def gate_text(job: Job, model: Artifact, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Ids of the text that the gate reads, and its name.

    `[export] text`, else the validation split of the tokens the model was trained on, else the built-in text.
    """
    asked = job.recipe.section("export").text
    if asked:
        return tokens_of(tokenizer, asked, job), asked
    data = training_data(model)
    if data is not None:
        shards = Shards.open(data.path, "val")
        if len(shards) > 1:
            return shards[:ENOUGH], f"the validation split of prep {data.short}"
    return tokens_of(tokenizer, BUILTIN, job), BUILTIN


def training_data(model: Artifact | None) -> Artifact | None:
    """The tokens that the model, or the one it was finetuned from, was trained on, if they are still there."""
    while model is not None:
        data = model.input("data")
        if data is not None and data.kind == "tokens":
            return data
        model = model.input("model")
    return None


def tokens_of(tokenizer: Tokenizer, source: str, job: Job) -> np.ndarray:
    """The first tokens of a source, each document between <s> and </s> as in the shards."""
    ids: list[int] = []
    bos, eos = ([id] if id is not None else [] for id in (tokenizer.begin_id, tokenizer.end_id))
    for document in sources.documents(source, job.recipe.root, tally=sources.Tally()):
        ids += [*bos, *tokenizer.encode(document.text[: 16 * ENOUGH]), *eos]
        if len(ids) >= ENOUGH:
            break
    if len(ids) < 2:
        raise DataError("too little text for the perplexity check", file=source, hint="name more as [export] text")
    return np.array(ids[:ENOUGH], np.int64)
