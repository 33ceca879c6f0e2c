"""The `gguf-*` variants: the model as one GGUF file, as llama.cpp, Ollama and transformers (`gguf_file=`) take it.

What is written is read back by model/gguf.py before it is published: every tensor against the model's, the tokenizer's
ids on varied text, the config, and real text through the model that the file holds. The bytes follow from the model
alone. Which tensor gets which type is llama.cpp's convention (its llama-quant.cpp and convert_hf_to_gguf.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llmctl.errors import DataError, GateError
from llmctl.export import parity
from llmctl.inference.runners import TorchRunner
from llmctl.model import gguf as reader
from llmctl.model import gguf_config, hf
from llmctl.model.config import Config
from llmctl.model.families.stated import config_from_json, config_to_json
from llmctl.model.gguf import ARCHITECTURES, Architecture
from llmctl.model.transformer import Decoder
from llmctl.text import gguf_vocabulary
from llmctl.text.tokenizer import Tokenizer

FILE = "model.gguf"
BLOCK = 32  # values that share a scale
# By [export] gguf_type: ggml's type; the largest error of a weight, as a share of the largest in its tensor (half a
# step, or a whole one of Q4_0, which has no code for the negative of a block's largest value); the largest change of
# the perplexity, as a share of it.
KINDS = {
    "f32": ("F32", 0.0, 1e-5),
    "f16": ("F16", 2**-11, 0.01),
    "bf16": ("BF16", 2**-8, 0.05),
    "q8_0": ("Q8_0", 1 / 200, 0.05),
    "q4_0": ("Q4_0", 1 / 7, 0.5),
}
EXACT = 1e-5  # of the largest logit, where every weight is the model's
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL SAY!",
    "  two spaces, a tab\tand\r\n\r\n   three, then  12 and 3,456.78 ",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！「引号」与 ASCII 混排 123",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 注释\n\n\nif __name__ == '__main__':\n\tprint(f(2))\n",
    "naïve café Ünïcödé Привет שלום ไทย 🎉👩‍👩‍👧‍👦🇪🇺 €½ <b>&amp;</b> a_b-c/d\\e https://x.y/?z=1#t",
)


def architecture_of(config: Config) -> Architecture:
    """llama.cpp's name of the family.

    Raises:
        DataError: it has none, or only for another task.
    """
    model_type = "llama" if config.family == "mistral" else str(config_to_json(config)["model_type"])
    found = next((each for each in ARCHITECTURES.values() if each.model_type == model_type), None)
    if found is None or config.task != "causal-lm":
        raise DataError(
            f"a {config.family} model for {config.task} has no GGUF form in llmctl",
            hint=f"{', '.join(ARCHITECTURES)} language models can be written; --hf takes every model",
        )
    return found


def write(model: Decoder, folder: Path, path: Path, kind: str, told: Mapping[str, str]) -> None:
    """Writes the file.

    Args:
        model: on the CPU, in fp32.
        folder: holds the tokenizer's files.
        kind: a key of KINDS.
        told: what the file says of itself, under GGUF's keys.

    Raises:
        DataError: a family, a switch or a tokenizer that the format cannot hold; a weight beyond F16's range.
    """
    config = model.config
    architecture = architecture_of(config)
    shape = gguf_config.metadata(config, architecture.name)
    tokenizer = Tokenizer.load(folder)
    template = folder / "chat_template.jinja"
    files = {**tokenizer.files, **({template.name: template.read_bytes()} if template.is_file() else {})}
    vocabulary = gguf_vocabulary.to_metadata(files, config.vocab_size, folder)
    vocabulary |= ends(config)

    writer = gguf.GGUFWriter(path, architecture.name)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{KINDS[kind][0]}"
    general = {"general.type": "model", "general.file_type": int(gguf.LlamaFileType[file_type])}
    general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    for key, value in {**general, **told, **shape, **vocabulary}.items():
        add(writer, key, value)
    with contextlib.closing(writer):
        write_tensors(writer, model, architecture, kind)


def write_tensors(writer: Any, model: Decoder, architecture: Architecture, kind: str) -> None:
    """Writes the keys that were added, the table of tensors, and the tensors one at a time."""
    native, stated = dict(model.state_dict()), config_to_json(model.config)
    layout = {str(architecture.gguf_name(name)): entry for name, entry in hf.layout(model).items()}
    divisors = stretched(model.config)
    if divisors is not None:
        writer.add_tensor_info(gguf_config.FREQUENCIES, divisors.shape, divisors.dtype, divisors.nbytes)
    for name, entry in layout.items():
        shape = entry.shape[::-1] if name.endswith(architecture.transposed) else entry.shape
        type = gguf.GGMLQuantizationType[type_of(name, shape, kind)]
        block, size = gguf.GGML_QUANT_SIZES[type]
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(type.name, np.uint8))
        stored = (*shape[:-1], shape[-1] // block * size // dtype.itemsize)
        writer.add_tensor_info(name, stored, dtype, math.prod(stored) * dtype.itemsize, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    for name, entry in layout.items():
        tensor = architecture.to_gguf(name, hf.joined(entry, native).detach(), stated).contiguous()
        type = gguf.GGMLQuantizationType[type_of(name, tuple(tensor.shape), kind)]
        with np.errstate(over="ignore"):  # said below
            values = gguf.quants.quantize(tensor.numpy(), type)
        if values.dtype == np.float16 and not np.isfinite(values).all():
            raise DataError(f"{name} holds values beyond F16's range", hint='set [export] gguf_type = "bf16" or "f32"')
        writer.write_tensor_data(values)


def stretched(config: Config) -> np.ndarray | None:
    """What Llama 3 divides its rotary frequencies by, which llama.cpp keeps as a tensor; None for other scalings."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    ramp = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
    divisors: np.ndarray = gguf_config.llama3_divisors(config.rope_theta, config.head_dim, *ramp).numpy()
    return divisors


def type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """How a tensor is stored: norms, biases and positions in F32, rows that do not split into blocks in F16, and of a
    4-bit model what looks pieces up and what scores them, which feel it most, in Q8_0."""
    type = KINDS[kind][0]
    if len(shape) == 1 or name.startswith("position_embd") or kind == "f32":
        return "F32"
    if type.startswith("Q") and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if type == "Q4_0" and name in ("token_embd.weight", "output.weight") else type


def ends(config: Config) -> dict[str, int]:
    """The ids that end a text and a turn, as the model's config has them: GGUF keeps two."""
    found = dict(zip(("eos", "eot"), config.eos_ids, strict=False))
    found |= {"bos": config.bos_token_id} if config.bos_token_id is not None else {}
    found |= {"padding": config.pad_token_id} if config.pad_token_id is not None else {}
    return {f"tokenizer.ggml.{name}_token_id": index for name, index in found.items()}


def add(writer: Any, key: str, value: Any) -> None:
    """Adds a key of the type that its value has in Python; counts are 32 bits wide, as everywhere in GGUF."""
    kinds = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    kinds.get(type(value), writer.add_array)(key, value)


# ----------------------------------------------------------------------------------------------------------- the gate


def check(model: Decoder, folder: Path, path: Path, kind: str, tokens: np.ndarray, text: str) -> dict[str, Any]:
    """Reads the file back and holds it against the model.

    Args:
        tokens: ids of real text, at least two; `text` is what text that is.

    Returns: what parity.json holds; `passed` is the verdict, `worst` the figure nearest to its limit or past it.

    Raises:
        GateError: another config or other ids than the model's, which no tolerance allows.
    """
    found = reader.read(path)
    config = config_from_json({**found.config, **found.generation_config}, path)
    compare_configs(model.config, config)
    compare_tokenizers(Tokenizer.load(folder), Tokenizer(found.tokenizer_files(), path))

    _, weight_limit, perplexity_limit = KINDS[kind]
    copy, errors = restored(found, model)

    room = max(512, int(parity.TEXT_FLOPS / (2 * model.config.parameters)))
    read = parity.on_text(model, TorchRunner.of(copy), tokens[: min(parity.TEXT, room)], text)
    read["gguf_perplexity"] = read.pop("onnx_perplexity")
    worst_tensor = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    exact = sum(error == 0 for error in errors.values())
    figures = [
        (f"weights, {worst_tensor}", errors[worst_tensor], max(weight_limit, 2**-20)),  # Gemma's 1 + w is rounded
        ("perplexity", abs(read["change"]), perplexity_limit),
    ]
    figures += [("logits on text", read["error"], EXACT)] if exact == len(errors) else []
    name, value, limit = max(figures, key=lambda each: math.inf if math.isnan(each[1]) else each[1] / each[2])
    return {
        "type": kind,
        "passed": value <= limit,
        "worst": {"figure": name, "value": value, "limit": limit},
        "error": read["error"],
        "limits": {"weights": weight_limit, "perplexity": perplexity_limit},
        "weights": {
            "tensors": len(errors),
            "exact": exact,
            "max_relative_error": errors[worst_tensor],
            "worst_tensor": worst_tensor,
            "stored": dict(Counter(stored.type for stored in found.file.tensors.values()).most_common()),
        },
        "text": read,
        "reference": f"torch {torch.__version__}, fp32",
        "candidate": f"the file's weights, dequantised, in torch {torch.__version__}",
    }


def restored(found: reader.GGUFModel, model: Decoder) -> tuple[Decoder, dict[str, float]]:
    """The model that a file holds, and how far each tensor is from `model`'s, as a share of its largest value."""
    native, layout, copy = dict(model.state_dict()), hf.layout(model), hf.build(model.config)
    assert isinstance(copy, Decoder)
    state: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, tensor in found.tensors():
        source, got = hf.joined(layout[name], native).detach(), tensor.float()
        errors[name] = float((got - source).abs().max() / source.abs().max().clamp(min=1e-30))
        state |= dict(hf.split(layout[name], got, native))
    if missing := layout.keys() - errors.keys():
        raise GateError(f"the file lacks {min(missing)}", hint="this is a bug in llmctl")
    copy.load_state_dict({name: state[name].contiguous() for name in copy.state_dict()}, assign=True)
    return copy.eval(), errors


def compare_configs(ours: Config, theirs: Config) -> None:
    """Raises GateError where the file's config is not the model's; dropout is training's, and GGUF keeps two ends."""
    same = {"family": theirs.family, "dropout": 0.0, "carried": {}} if ours.family == "mistral" else {"dropout": 0.0}
    ours = dataclasses.replace(ours, **same)
    for field in dataclasses.fields(Config):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "eos_token_id":
            a, b = ours.eos_ids[:2], theirs.eos_ids
        if (
            field.compare
            and a != b
            and not (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))
        ):
            raise GateError(
                f"the file says {field.name} = {b!r}, the model {a!r}", hint="export it with --hf or --onnx"
            )


def compare_tokenizers(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raises GateError where the two give other ids."""
    for text in PROBES:
        if (a := ours.encode(text)) != (b := theirs.encode(text)) or theirs.decode(b) != ours.decode(a):
            raise GateError(f"the file's tokenizer gives other ids for {text!r}", hint="export it with --hf or --onnx")
    if (ours.begin_id, ours.special_ids) != (theirs.begin_id, theirs.special_ids & set(range(len(ours)))):
        raise GateError("the file's tokenizer has other special pieces", hint="export it with --hf or --onnx")
