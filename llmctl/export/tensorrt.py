"""A decoder for TensorRT: the portable graph, the shapes it is tuned for, and the engine where one can be built.

    model.onnx      the graph of standard operators, for any runtime
    tensorrt.onnx   the same over the same weights, with what TensorRT wants: a cache of fixed length, and leave to take
                    attention apart where no fused kernel fits (fp32, some head sizes)
    profiles.json   the shapes: one profile for prompts, one for decoding; its `formulas` say where each figure is from
    trtexec.sh      builds model.plan from them with NVIDIA's command
    model.plan      the engine, for this GPU and this version of TensorRT

The cache is an input and an output of the network at one address (TensorRT's KVCacheUpdate, ONNX's TensorScatter):
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-kv-cache.html

B sequences, T new tokens, S positions of the cache, L layers, K key/value heads, D head size
"""

from __future__ import annotations

import ctypes.util
import json
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.device import Device
from llmctl.errors import RunError, UnavailableError, UsageError
from llmctl.export import graph, hf, parity, reports, tensorrt_support
from llmctl.export.builder import GRAPH
from llmctl.export.form import Form
from llmctl.export.provenance import provenance
from llmctl.export.texts import gate_text
from llmctl.inference import exported, tensorrt_runner
from llmctl.inference.tensorrt_runner import ENGINE, ENGINES, PROFILES, PROVIDER, shapes
from llmctl.model import hf as models
from llmctl.model.config import Config
from llmctl.text.tokenizer import Tokenizer

ENGINE_GRAPH, COMMAND, CHECK = "tensorrt.onnx", "trtexec.sh", "check.json"
BATCH = 8  # sequences at once
PROMPT = 512  # new tokens at once: a longer prompt goes in pieces, since logits take B * T * vocabulary * 4 bytes
CACHES = 8 << 30  # bytes that the caches of all sequences may take
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
FORMULAS = {
    "batch": f"1 to {BATCH}",
    "new": f"a prompt's piece: 1 to min({PROMPT}, cache), tuned for half of that; decoding: 1",
    "cache": f"max_position_embeddings, as far as {BATCH} caches of 2 * L * K * S * D values fit in {CACHES >> 30} GiB",
}

Shapes = dict[str, dict[str, list[int]]]  # by input: min, opt and max


def export(job: Job) -> Artifact:
    """The folder above, its engine built here and passed through the gate.

    Raises:
        UnavailableError: there is no GPU here, or no TensorRT. All but the engine stays in the run's working folder,
            checked, with the command that builds the engine elsewhere.
        GateError: the engine is not the model. UsageError: the model is no decoder.
    """
    model, started, section = job.inputs["model"], time.monotonic(), job.recipe.section("export")
    weights, config = job.inputs.get("quantized", model), models.read_config(model.path)
    tokenizer = Tokenizer.load(model.path)
    if config.kind != "decoder" or config.task != "causal-lm":
        raise UsageError(
            f"{model.path} is a {config.family} {config.kind}, and the TensorRT export is of decoders",
            hint="llmctl export --onnx --profile portable writes a graph that trtexec takes",
        )
    models.check_vocabulary(config, len(tokenizer), model.path, tokenizer.special_ids)
    runtime, absent = available(job.device)
    if not runtime:
        folder = job.work / "graph"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(weights.path, folder, config, provenance(model), section.dtype)
        hf.copy_companions(model.path, folder)
        raise unavailable(folder, absent)

    torch.set_num_threads(job.device.threads)
    tokens, text = gate_text(job, model, tokenizer)
    with job.publishing() as staging:
        size = write(weights.path, staging.path, config, provenance(model), section.dtype)
        hf.copy_companions(model.path, staging.path)
        if runtime == ENGINE:
            # Beside the run, not in the artifact: the next build is quicker, and two equal ones make one identity.
            build(tensorrt_runner.tensorrt(), staging.path, job.run.path / ".work" / "tensorrt-timing.cache")
        else:
            (staging.path / ENGINES).mkdir()
        runner: Any = exported.load(staging.path, job.device)
        reference = models.load_causal(weights.path, device=job.device.torch)
        kept: dict[str, Any] = {}
        if weights is not model:
            original = models.load_causal(model.path, device=job.device.torch)
            kept = {"original": original, "max_increase": parity.allowed_increase(section)}
        report = parity.measure(reference, runner, tokens, text, section.dtype, **kept)
        parity.gate(report, job.work / "parity.json")
        (job.work / "parity.json").rename(staging.path / "parity.json")
        seconds = round(time.monotonic() - started, 3)
        built = [f"{ENGINES}/{file.name}" for file in (staging.path / ENGINES).glob("*")]  # never twice alike
        metrics = {"bytes": size, **reports.metrics(report), "seconds": seconds}
        artifact = staging.seal(metrics, logs=("parity.json", ENGINE, *built))
    figures = f"{job.place.rpartition('/')[2]} {console.size(size)} · {reports.summary(report)}"
    console.stage("export", figures, console.duration(time.monotonic() - started))
    return artifact


def available(device: Device) -> tuple[str, str]:
    """What builds engines here, ENGINE (the package tensorrt) or ENGINES (ONNX Runtime's provider); or "", and why."""
    if device.kind != "cuda":
        return "", "no NVIDIA GPU here, or none that was asked for"
    try:
        tensorrt_runner.tensorrt()
    except UnavailableError as reason:
        # The provider is in every GPU wheel of ONNX Runtime; the library that it needs is not.
        if PROVIDER in ort.get_available_providers() and ctypes.util.find_library("nvinfer"):
            return ENGINES, ""
        return "", reason.message
    return ENGINE, ""


def unavailable(folder: Path, absent: str) -> UnavailableError:
    """The error that says what is missing, what was made all the same, and what is known of it; also in check.json."""
    path, table = folder / ENGINE_GRAPH, tensorrt_support.TABLE
    found = tensorrt_support.unsupported(path)
    nodes = len(onnx.load(str(path), load_external_data=False).graph.node)
    parsers = {trt.__name__.removesuffix("_bindings"): trt for trt in tensorrt_support.parsers()}
    verdicts = {name: tensorrt_support.verdict(trt, path) for name, trt in parsers.items()}
    document = {
        "table": {key: table[key] for key in ("runtime", "source", "checked")},
        "nodes": nodes,
        "unsupported": [problem._asdict() for problem in found],
        "parsers": verdicts,
    }
    (folder / CHECK).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    told = f"all {nodes} nodes are in the table of {table['runtime']}"
    if found:
        first = "; ".join(map(str, found[:3]))
        told = f"{len(found)} of {nodes} nodes are not in the table of {table['runtime']}: {first}"
    for name, verdict in verdicts.items():
        told += f"; the parser of {name} takes it" if not verdict else f"; the parser of {name} refuses: {verdict[0]}"
    return UnavailableError(
        f"no engine was built: {absent}. All else is in this folder ({told})",
        file=folder,
        hint=f"on a machine with an NVIDIA GPU: pip install 'llmctl[tensorrt]' and the same command, or sh {COMMAND}",
    )


def write(model: Path, folder: Path, config: Config, metadata: Mapping[str, str], dtype: str) -> int:
    """Writes all but the engine into `folder` and returns the bytes of model.onnx and its weights.

    Args:
        model: where the weights are, plain or quantised.
        dtype: "fp32", "fp16" or "bf16", of what is not quantised; the network is strongly typed.
    """
    size = graph.write(model, folder, config, metadata, Form("portable", dtype))
    network = onnx.load(str(folder / GRAPH), load_external_data=False)
    length = cache_length(config, dtype)
    fix(network.graph, length)
    onnx.save(network, folder / ENGINE_GRAPH)
    tuned = profiles(network.graph, length)
    document = {"formulas": FORMULAS, "cache": length, "profiles": tuned}
    readable = re.sub(r"\[[^][{}]*\]", lambda shape: " ".join(shape[0].split()), json.dumps(document, indent=1))
    (folder / PROFILES).write_text(readable + "\n", encoding="utf-8")
    (folder / COMMAND).write_text(command(tuned), encoding="utf-8")
    return size


def cache_length(config: Config, dtype: str) -> int:
    """S, the positions of the cache; see FORMULAS."""
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * BYTES[dtype]
    return min(config.max_position_embeddings, CACHES // (BATCH * position))


def fix(network: onnx.GraphProto, length: int) -> None:
    """Makes the portable graph one that TensorRT builds an engine of."""
    cached = next(value for value in network.input if value.name.startswith("past_key_values."))
    name = cached.type.tensor_type.shape.dim[2].dim_param
    for value in (*network.input, *network.output, *network.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if name and dim.dim_param == name:
                dim.dim_value = length
    defaults = {tensor.name for tensor in network.initializer}
    asked = [value for value in network.input if value.name not in defaults]  # TensorRT knows no input with a default
    del network.input[:]
    network.input.extend(asked)
    dequantize_lookups(network)
    for node in network.node:
        if node.op_type == "Attention":  # an attribute of NVIDIA's parser alone: onnx.checker refuses it
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))


def dequantize_lookups(network: onnx.GraphProto) -> None:
    """Looks rows up behind DequantizeLinear: TensorRT has int8 and int4 constants before that operator alone.

    quantized.lookup, which is made for a CPU, takes a few rows of codes (N, blocks, width) and of steps (N, blocks, 1).
    """
    codes = {tensor.name: tensor for tensor in network.initializer if tensor.data_type == onnx.TensorProto.INT8}
    readers = {name: node for node in network.node for name in node.input}
    makers = {name: node for node in network.node for name in node.output}
    for rows in [node for node in network.node if node.op_type == "Gather" and node.input[0] in codes]:
        cast = readers[rows.output[0]]
        scaled = readers[cast.output[0]]
        steps = makers[scaled.input[1]]
        stored, ids, width = rows.input[0], rows.input[1], codes[rows.input[0]].dims[2]
        at = list(network.node).index(rows)
        for node in (rows, cast, steps, scaled):
            network.node.remove(node)
        options: dict[str, Any] = {"axis": 2, "block_size": width}
        whole = onnx.helper.make_node("DequantizeLinear", [stored, steps.input[0]], [f"{stored}.whole"], **options)
        lookup = onnx.helper.make_node("Gather", [f"{stored}.whole", ids], scaled.output)
        for node in (lookup, whole):
            node.name = node.output[0]
            network.node.insert(at, node)


def profiles(network: onnx.GraphProto, length: int) -> dict[str, Shapes]:
    """Two optimisation profiles: "prefill" and "decode", in this order."""
    batch, new = (dim.dim_param for dim in network.input[0].type.tensor_type.shape.dim)
    longest = min(PROMPT, length)
    ranges = {
        "prefill": {batch: (1, 1, BATCH), new: (1, max(1, longest // 2), longest)},
        "decode": {batch: (1, BATCH, BATCH), new: (1, 1, 1)},
    }
    return {
        name: {
            value.name: {
                which: [dim.dim_value or dims[dim.dim_param][i] for dim in value.type.tensor_type.shape.dim]
                for i, which in enumerate(("min", "opt", "max"))
            }
            for value in network.input
        }
        for name, dims in ranges.items()
    }


def command(tuned: Mapping[str, Shapes]) -> str:
    """A script that builds the engine with trtexec, which comes with TensorRT."""
    lines = [f"trtexec --onnx={ENGINE_GRAPH} --saveEngine={ENGINE} --stronglyTyped --skipInference"]
    lines[0] += " --timingCacheFile=timing.cache"
    for i, profile in enumerate(tuned.values()):
        lines.append(f"--profile={i}")
        for which in ("min", "opt", "max"):
            stated = (f"{name}:{'x'.join(map(str, shape[which]))}" for name, shape in profile.items())
            lines.append(shlex.quote(f"--{which}Shapes={','.join(stated)}"))
    return '#!/bin/sh\nset -e\ncd "$(dirname "$0")"\n' + " \\\n  ".join(lines) + "\n"


def build(trt: Any, folder: Path, timing: Path | None = None, target: Any = None) -> int:
    """Builds model.plan from what `write` left in `folder` and returns its bytes.

    Args:
        trt: one of `tensorrt_support.parsers`: TensorRT for RTX needs no GPU to build.
        timing: how fast kernels were, kept from one build to the next.
        target: a compute capability to build for on a machine without that GPU; TensorRT for RTX alone has it.

    Raises:
        UnavailableError: this TensorRT has no form of a node.
        RunError: it took the graph and made no engine.
    """
    log = tensorrt_support.logger(trt)
    builder, network, errors = tensorrt_support.parse(trt, folder / ENGINE_GRAPH, log)
    if errors:
        raise UnavailableError(
            f"{trt.__name__} {trt.__version__} does not take the graph: {'; '.join(errors[:3])}",
            file=folder / ENGINE_GRAPH,
            hint=f"the oldest version that does, by NVIDIA's table: {tensorrt_support.TABLE['runtime']}",
        )
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if target is not None:
        settings.num_compute_capabilities = 1
        settings.set_compute_capability(target, 0)
    for inputs in shapes(folder).values():
        profile = builder.create_optimization_profile()
        for name, shape in inputs.items():
            profile.set_shape(name, *(tuple(shape[which]) for which in ("min", "opt", "max")))
        settings.add_optimization_profile(profile)
    if timing is not None:
        known = timing.read_bytes() if timing.exists() else b""
        settings.set_timing_cache(settings.create_timing_cache(known), True)  # True: another GPU's is passed over
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise RunError(f"{trt.__name__} {trt.__version__} made no engine: {'; '.join(log.errors[:3])}")
    if timing is not None:
        timing.parent.mkdir(parents=True, exist_ok=True)
        timing.write_bytes(bytes(settings.get_timing_cache().serialize()))
    return (folder / ENGINE).write_bytes(bytes(engine))
