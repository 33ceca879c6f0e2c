"""A model as a Hugging Face folder: config.json, generation_config.json, model.safetensors and the tokenizer's files.

This is the only format that llmctl keeps weights in, and no pickle is ever opened. What is written loads in
transformers (parity tested), vLLM and llama.cpp's converter; what is read is any folder of a family in `families/`,
in one file or in shards. On disk every tensor has the family's own name and layout; in memory, Llama's.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import compressed, dynamic, pooling, storage
from llmctl.model.compressed import Packed
from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.model.families import layout as layouts
from llmctl.model.families import stated as keys
from llmctl.model.families.layout import Stored, native_spelling
from llmctl.model.jsonfile import read_json, write_json
from llmctl.model.lstm import LSTM
from llmctl.model.origin import INDEX, WEIGHTS
from llmctl.model.transformer import Decoder, Encoder, EncoderDecoder

Causal = Decoder | LSTM
Model = Decoder | LSTM | Encoder | EncoderDecoder

STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # as safetensors spells them
KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
IMAGES = 4  # special pieces that may have no row in the embedding
PADDING = 512  # embeddings may have this many rows more than there are pieces: Qwen pads its own by up to 399


class Saves(Protocol):
    """Anything that writes its files into a folder, as text.tokenizer.Tokenizer does."""

    def save(self, folder: Path) -> object: ...


# ----------------------------------------------------------------------------------------------------------- models


def class_of(config: Config) -> type[Model]:
    """Which dataflow a config asks for."""
    if config.kind == "recurrent":
        return LSTM
    if config.kind == "encoder-decoder":
        return EncoderDecoder
    return Decoder if config.task == "causal-lm" else Encoder


def build(config: Config) -> Model:
    """A model without memory for its weights (torch's meta device)."""
    with torch.device("meta"):
        return class_of(config)(config)


def random(config: Config, seed: int) -> Model:
    """A fresh model in fp32 on the CPU; the same seed draws the same weights."""
    return class_of(config).random(config, seed)


def save(model: Model, tokenizer: Saves | Path, folder: Path, dtype: str = "fp32") -> None:
    """Writes the whole Hugging Face folder.

    Args:
        model: its `config.eos_token_id` may name several ids (a chat model ends a turn and a text): config.json gets
            the first, because older readers expect one, generation_config.json all of them.
        tokenizer: saves itself, or a folder whose tokenizer files are copied.
        folder: exists; files of the same names are replaced.
        dtype: "fp32", "bf16" or "fp16": how the weights are stored.
    """
    config = model.config
    write_json(folder / "config.json", keys.config_to_json(config, dtype))
    if config.kind != "encoder":
        write_json(folder / "generation_config.json", keys.generation_to_json(config))
    native = model.state_dict()
    assert not any(".lora_" in name for name in native), "merge the adapter first"
    stored = layout(model)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    tensors = ((name, joined(entry, native).detach().to("cpu", DTYPES[dtype])) for name, entry in stored.items())
    shapes = {name: (STORED[dtype], entry.shape) for name, entry in stored.items()}
    storage.write(folder, shapes, ((name, chunks(tensor)) for name, tensor in tensors), storage.SHARD)
    if config.task == "embedding":
        pooling.write(folder, config)
    if isinstance(tokenizer, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    else:
        tokenizer.save(folder)


def load(folder: Path, dtype: str = "fp32", device: torch.device | str = "cpu", *, mapped: bool = False) -> Model:
    """The model in `folder`, in evaluation mode.

    Args:
        mapped: weights that are stored as they are wanted stay views of the file, read when first used: for a folder
            that nobody writes into while the model runs, and a model that is not trained.

    Raises:
        DataError: a file that is missing or corrupt, a shape that llmctl does not build, or tensors that do not fit the
            config, each by name.
    """
    config = read_config(folder)
    model = build(config)
    native, state = model.state_dict(), dict[str, Tensor]()
    found = places(model, folder)
    for entry, tensor in tensors(found, mapped=STORED[dtype] if mapped else ""):
        for name, part in split(entry, tensor, native):
            kept = part.to(device, DTYPES[dtype], copy=len(entry.parts) > 1)
            state[name] = kept if kept.is_contiguous() else kept.contiguous()
    model.load_state_dict({name: state[name] for name in native}, assign=True)
    model.to(device)
    for entry, stored in found.values():
        if isinstance(stored, Packed) and stored.scheme.dynamic:
            dynamic.round_inputs(model, entry.parts)
    return model.eval()


def load_causal(folder: Path, dtype: str = "fp32", device: torch.device | str = "cpu") -> Causal:
    """`load` for those who need a causal language model.

    Raises:
        DataError: as `load`; or it is another kind of model.
    """
    config = read_config(folder)
    if config.task != "causal-lm":
        raise DataError(
            f"is a {config.family} {config.kind} for {config.task}, not a causal language model",
            file=folder,
            hint="this needs a model that continues a text: llama, qwen2, qwen3, gemma3, gpt2, mistral or lstm",
        )
    model = load(folder, dtype, device)
    assert isinstance(model, Causal)
    return model


# ---------------------------------------------------------------------------------------------------------- tensors


def layout(model: Model) -> dict[str, Stored]:
    """Every tensor that the model is stored as, by its name on disk."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return layouts.layout(model.config, shapes)


def joined(entry: Stored, native: Mapping[str, Tensor]) -> Tensor:
    """The tensor as it lies on disk."""
    parts = [native[name] for name in entry.parts]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.t() if entry.transposed else whole


def split(entry: Stored, tensor: Tensor, native: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The native tensors that one on disk holds, as views of it; `native` has their shapes."""
    whole, start = tensor.t() if entry.transposed else tensor, 0
    for name in entry.parts:
        rows = native[name].shape[0]
        yield name, whole[start : start + rows]
        start += rows


def tensors(
    found: Mapping[str, tuple[Stored, storage.Stored | Packed]], *, mapped: str = ""
) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors that `places` found one by one.

    They are copies; those that are stored as `mapped` says are views of the file.
    """
    opened = dict[Path, Any]()
    for name, (entry, stored) in found.items():
        if isinstance(stored, Packed):
            values = compressed.unpack(name, stored, read).values()
            yield entry, values.t() if entry.transposed else values
            continue
        if stored.dtype != mapped:
            yield entry, read(stored)
            continue
        try:
            if stored.path not in opened:
                opened[stored.path] = safe_open(stored.path, framework="pt")
            yield entry, opened[stored.path].get_tensor(name)
        except (SafetensorError, OSError) as reason:
            raise DataError(f"tensor {name} cannot be read ({reason})", file=stored.path) from reason


def places(model: Model, folder: Path) -> dict[str, tuple[Stored, storage.Stored | Packed]]:
    """What each tensor of `folder` is to `model` and where it lies, by its name there, in the order of the file.

    A quantised matrix has the name that its plain weight would have.

    Raises:
        DataError: as `check`; or as `compressed.found`.
    """
    where, family, stored = storage.headers(tensor_files(folder)), FAMILIES[model.config.family], layout(model)
    packed = {  # in memory's orientation, which is the one it lies in
        name: each._replace(shape=each.shape[::-1])
        if (entry := stored.get(native_spelling(family, name, stored))) is not None and entry.transposed
        else each
        for name, each in compressed.found(folder, where).items()
    }
    inside = {f"{name.removesuffix('.weight')}.{leaf}" for name, each in packed.items() for leaf in each.parts}
    found: dict[str, storage.Stored | Packed] = {name: each for name, each in where.items() if name not in inside}
    found |= packed
    expected = check(model, folder, {name: each.shape for name, each in found.items()})
    spelled = {name: expected.get(native_spelling(family, name, expected)) for name in found}
    return {name: (entry, found[name]) for name, entry in spelled.items() if entry is not None}


def check(model: Model, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """What `model` is stored as, once the names and shapes in `folder` have been found to be exactly that.

    Raises:
        DataError: listing what is missing, unexpected or misshapen.
    """
    expected, config = layout(model), model.config
    family = FAMILIES[config.family]
    ignored = aside(config, shapes, expected)
    spelled = {native_spelling(family, name, expected): name for name in shapes if name not in ignored}
    problems = [f"missing {name} {list(entry.shape)}" for name, entry in expected.items() if name not in spelled]
    problems += [
        f"unexpected {stored} {list(shapes[stored])}"
        for name, stored in sorted(spelled.items())
        if name not in expected
    ]
    problems += [
        f"{name} is {list(shapes[spelled[name]])}, not {list(entry.shape)}"
        for name, entry in expected.items()
        if name in spelled and shapes[spelled[name]] != entry.shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError(f"the weights do not fit config.json: {'; '.join(problems[:8])}{more}", file=folder)
    return expected


def aside(config: Config, shapes: Mapping[str, Any], expected: Mapping[str, Stored]) -> set[str]:
    """Stored tensors that are no weights of their own: buffers, heads of another task, a tied head's second copy."""
    family = FAMILIES[config.family]
    patterns = [re.compile(pattern) for pattern in family.aside]
    found = {name for name in shapes if name not in expected and any(p.fullmatch(name) for p in patterns)}
    if config.tie_word_embeddings:
        found |= {name for name in _heads(config) if name in shapes}
    return found


def _heads(config: Config) -> tuple[str, ...]:
    """What a separate output matrix is called."""
    if config.task == "masked-lm":
        return ("cls.predictions.decoder.weight", "lm_head.decoder.weight", "decoder.weight")
    return ("lm_head.weight",) if config.task in ("causal-lm", "seq2seq-lm") else ()


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row by row in memory's order, a few megabytes at a time."""
    flat = tensor.contiguous().view(-1)
    step = storage.BUFFER // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].view(torch.uint8).numpy().data


def tensor_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names, which must lie in the folder itself."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        hint = ""
        if any(folder.glob("*.bin")):
            hint = "a folder of pickled weights (.bin, .pt) is not opened; `llmctl import` says how to convert one"
        elif any(folder.glob("*.gguf")):
            hint = "a GGUF file is imported first: llmctl import FILE.gguf"
        raise DataError("holds no model.safetensors", file=folder, hint=hint)
    return indexed(index)


def indexed(index: Path) -> list[Path]:
    """The files beside an index that it names.

    Raises:
        DataError: it is no index, or names what is no file beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DataError("has no `weight_map` from tensors to files", file=index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise DataError(f"names the shard {name!r}, which is not a file beside it", file=index)
    return [index.parent / name for name in names]


def read(stored: storage.Stored) -> Tensor:
    """A tensor of a safetensors file in memory of its own: pages of a mapped file would count, and stay, beside it.

    The memory goes back to the system as soon as the tensor is dropped, which torch's own often does not.
    """
    if stored.start == stored.end:
        return torch.empty(stored.shape, dtype=KINDS[stored.dtype])
    pages = mmap.mmap(-1, stored.end - stored.start)
    left = memoryview(pages)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while left:
            if not (count := file.readinto(left)):
                raise DataError("ends in the middle of a tensor", file=stored.path, hint=storage.DAMAGED)
            left = left[count:]
    return torch.frombuffer(pages, dtype=KINDS[stored.dtype]).view(stored.shape)


# ------------------------------------------------------------------------------------------------------ config.json


def read_config(folder: Path) -> Config:
    """The shape that config.json states, and what only the files beside it tell.

    generation_config.json names the ids that end a text; the weights tell whether a tied head is stored a second time
    with other values (it is a head of its own then, as in Flan-T5) and whether an encoder kept its pooler.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DataError("holds no config.json, so it is not a model folder", file=folder)
    stated = read_json(path)
    generation = folder / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        stated = {**stated, "eos_token_id": eos}
    if stated.get(compressed.KEY) is not None:
        compressed.described(stated[compressed.KEY], path)
    config = keys.config_from_json(stated, path)
    if config.task in ("embedding", "causal-lm") and (folder / pooling.POOLING).is_file():
        # Qwen3-Embedding names the class with a language model's head; what stands beside it says what it is for
        config = dataclasses.replace(config, task="embedding", pooling=pooling.read(folder))
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return _as_stored(config, folder)
    return config


def _as_stored(config: Config, folder: Path) -> Config:
    if config.kind == "recurrent" or (config.kind == "decoder" and not config.tie_word_embeddings):
        return config
    where = storage.headers(tensor_files(folder))
    if config.tie_word_embeddings and (head := next((n for n in _heads(config) if n in where), None)):
        stored = layout(build(config))
        embedding = next(name for name, entry in stored.items() if entry.parts[0].endswith("embed_tokens.weight"))
        family = FAMILIES[config.family]
        other = next((n for n in where if native_spelling(family, n, stored) == embedding), None)
        if other is not None and not torch.equal(read(where[head]), read(where[other])):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    if config.kind == "encoder" and config.task == "embedding":
        pooler = any(name.endswith(("pooler.dense.weight", "pooler.dense.weight_scale")) for name in where)
        config = dataclasses.replace(config, head_transform="pooler" if pooler else "")
    return config


def check_vocabulary(config: Config, pieces: int, folder: Path, special: frozenset[int] = frozenset()) -> None:
    """Raises DataError where the tokenizer and the embedding do not belong together.

    Padded embeddings pass, and so do a few `special` pieces behind the last row, which no text can give: Gemma 3's
    tokenizer has one for images, and the text model no row for it.
    """
    beyond = frozenset(range(config.vocab_size, min(pieces, config.vocab_size + IMAGES + 1)))
    if 0 < len(beyond) <= IMAGES and beyond <= special:
        return
    if not 0 <= config.vocab_size - pieces <= PADDING:
        raise DataError(
            f"the tokenizer has {pieces:,} pieces, but the model's embedding has {config.vocab_size:,} rows",
            file=folder,
            hint="use the tokenizer that the model was trained with",
        )
