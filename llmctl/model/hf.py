"""A model as a Hugging Face folder: config.json, generation_config.json, model.safetensors and the tokenizer's files.

This is the only format that llmctl keeps weights in, and no pickle is ever opened. What is written loads in
transformers (parity tested), vLLM and llama.cpp's converter; what is read is any Llama or Qwen3 folder, in one file
or in shards. config.json carries the rotary parameters twice: `rope_parameters` is what transformers 5 reads,
`rope_theta` and `rope_scaling` what everything older reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model.config import FAMILIES, Config, RopeScaling, impossible
from llmctl.model.transformer import Decoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PADDING = 512  # embeddings may have this many rows more than there are pieces: Qwen pads its own by up to 399

N = TypeVar("N", int, float)


class Saves(Protocol):
    """Anything that writes its files into a folder, as text.tokenizer.Tokenizer does."""

    def save(self, folder: Path) -> object: ...


def save(model: Decoder, tokenizer: Saves | Path, folder: Path, dtype: str = "fp32") -> None:
    """Writes the whole Hugging Face folder.

    Args:
        model: its `config.eos_token_id` may name several ids (a chat model ends a turn and a text): config.json gets
            the first, because older readers expect one, generation_config.json all of them.
        tokenizer: saves itself, or a folder whose tokenizer files are copied.
        folder: exists; files of the same names are replaced.
        dtype: "fp32", "bf16" or "fp16": how the weights are stored.
    """
    config = model.config
    write_json(folder / "config.json", config_to_json(config, dtype))
    write_json(folder / "generation_config.json", generation_to_json(config))
    assert not any(".lora_" in name for name in model.state_dict()), "merge the adapter first"
    state = {name: t.detach().to("cpu", DTYPES[dtype]).contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if isinstance(tokenizer, Path):
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    else:
        tokenizer.save(folder)


def load(folder: Path, dtype: str = "fp32", device: torch.device | str = "cpu") -> Decoder:
    """The model in `folder`, in evaluation mode.

    Raises:
        DataError: a file that is missing or corrupt, a shape that llmctl does not build, or tensors that do not fit the
            config, each by name.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    # A copy, not a view of the mapped file: replacing or truncating the file must not reach into a running model.
    state = {name: t.to(device, DTYPES[dtype], copy=True) for name, t in fitting(model, folder)}
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def fitting(model: Decoder, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `folder` one by one, after checking by their headers that they are exactly those of `model`."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    opened = [(path, open_tensors(path)) for path in tensor_files(folder)]
    for path, file in opened:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in shapes:
                raise DataError(f"tensor {name} is stored twice", file=path)
            shapes[name] = tuple(file.get_slice(name).get_shape())
    # Old checkpoints store the rotary frequencies, and some the tied head a second time: neither is a weight of its
    # own.
    ignored = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and "lm_head.weight" in shapes:
        ignored.add("lm_head.weight")
    found = shapes.keys() - ignored
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [f"unexpected {name} {list(shapes[name])}" for name in sorted(found - expected.keys())]
    problems += [
        f"{name} is {list(shapes[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and shapes[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError(f"the weights do not fit config.json: {'; '.join(problems[:8])}{more}", file=folder)
    for path, file in opened:
        for name in file.keys():  # noqa: SIM118
            if name in expected:
                try:
                    yield name, file.get_tensor(name)
                except (SafetensorError, OSError) as reason:
                    raise DataError(f"tensor {name} cannot be read ({reason})", file=path) from reason


def tensor_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names, which must lie in the folder itself."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        hint = (
            "a folder of pickled weights (.bin, .pt) is not opened; convert it with its own tools"
            if any(folder.glob("*.bin"))
            else ""
        )
        raise DataError("holds no model.safetensors", file=folder, hint=hint)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DataError("has no `weight_map` from tensors to files", file=index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"names the shard {name!r}, which is not a file beside it", file=index)
    return [folder / name for name in names]


def open_tensors(path: Path) -> Any:
    """A safetensors file, its header checked by the safetensors library; tensors are read when asked for."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as reason:
        raise DataError(
            f"is not a readable safetensors file ({reason})",
            file=path,
            hint="it may be cut off or damaged: copy it again, or rerun the stage that wrote it",
        ) from reason


def read_config(folder: Path) -> Config:
    """The shape that config.json states; where generation_config.json names the ids that end a text, those count."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError("holds no config.json, so it is not a model folder", file=folder)
    stated = read_json(path)
    generation = folder / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        stated = {**stated, "eos_token_id": eos}
    return config_from_json(stated, path)


def config_to_json(config: Config, dtype: str = "fp32") -> dict[str, Any]:
    """What config.json says; `config_from_json` reads it back."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default"}
    if scaling:
        rope["factor"] = scaling.factor
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    stated: dict[str, Any] = {
        "architectures": [FAMILIES[config.family].architecture],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "eos_token_id": config.eos_ids[0] if config.eos_ids else None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": FAMILIES[config.family].model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_scaling": rope if scaling else None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),  # what transformers 4 and vLLM call `dtype`
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.family == "llama":
        stated["mlp_bias"] = False
    if config.family == "qwen3":
        stated |= {"sliding_window": None, "use_sliding_window": False}
    if config.dropout:
        stated["dropout"] = (
            config.dropout
        )  # llmctl's own key: dropout on the residual stream, which a finetune inherits
    return stated


def generation_to_json(config: Config) -> dict[str, Any]:
    """What generation_config.json says: which ids begin, end and pad a text."""
    eos = config.eos_ids
    stated: dict[str, Any] = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    stated["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    return {key: value for key, value in stated.items() if value is not None}


def config_from_json(stated: dict[str, Any], file: Path) -> Config:
    """The shape in a parsed config.json.

    Raises:
        DataError: another architecture, a switch that llmctl does not build, a missing or mistyped field, each by name.
    """
    family = stated.get("model_type")
    if family not in FAMILIES:
        raise DataError(
            f"model_type is {family!r}", file=file, hint=f"llmctl builds these families: {', '.join(FAMILIES)}"
        )
    for key, built in UNBUILT.items():
        if key in stated and stated[key] not in built:
            raise DataError(f"{key} is {stated[key]!r}, which llmctl does not build", file=file)
    if set(stated.get("layer_types") or ()) - {"full_attention"}:
        raise DataError("layer_types asks for layers that llmctl does not build", file=file)
    heads = _number(stated, "num_attention_heads", int, file)
    width = _number(stated, "hidden_size", int, file)
    theta, scaling = _rope(stated, file)
    bos, eos, pad = (_ids(stated, f"{name}_token_id", file) for name in ("bos", "eos", "pad"))
    config = Config(
        family=family,
        vocab_size=_number(stated, "vocab_size", int, file),
        hidden_size=width,
        intermediate_size=_number(stated, "intermediate_size", int, file),
        num_hidden_layers=_number(stated, "num_hidden_layers", int, file),
        num_attention_heads=heads,
        num_key_value_heads=_number(stated, "num_key_value_heads", int, file, heads),
        head_dim=_number(stated, "head_dim", int, file, width // max(heads, 1)),
        max_position_embeddings=_number(stated, "max_position_embeddings", int, file),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number(stated, "rms_norm_eps", float, file, 1e-6),
        tie_word_embeddings=bool(stated.get("tie_word_embeddings", False)),
        attention_bias=bool(stated.get("attention_bias", False)),
        dropout=_number(stated, "dropout", float, file, 0.0),
        bos_token_id=bos[0] if bos else None,
        eos_token_id=eos if len(eos) > 1 else eos[0] if eos else None,
        pad_token_id=pad[0] if pad else None,
    )
    if problem := impossible(config):
        raise DataError(problem, file=file)
    return config


# Switches of these families that llmctl does not build, and the values that leave them off.
UNBUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}


def check_vocabulary(config: Config, pieces: int, folder: Path) -> None:
    """Raises DataError where the tokenizer and the embedding do not belong together; padded embeddings pass."""
    if not 0 <= config.vocab_size - pieces <= PADDING:
        raise DataError(
            f"the tokenizer has {pieces:,} pieces, but the model's embedding has {config.vocab_size:,} rows",
            file=folder,
            hint="use the tokenizer that the model was trained with",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a DataError that names the file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as reason:
        raise DataError(f"is not JSON ({reason.msg})", file=path, line=reason.lineno) from reason
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"cannot be read ({reason})", file=path) from reason
    if not isinstance(value, dict):
        raise DataError("is not a JSON object", file=path)
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as transformers does: indented, keys sorted, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(stated: dict[str, Any], key: str, kind: type[N], file: Path, default: N | None = None) -> N:
    """A number of config.json; absent or null takes the default."""
    value = stated.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise DataError(f"{key} is {value!r}, but it must be a number", file=file)
    return kind(value)


def _rope(stated: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling, from transformers 5's key or from the older ones."""
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError("rope_parameters is not an object", file=file)
    theta = _number({**stated, **rope}, "rope_theta", float, file, 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise DataError(f"rope_type is {kind!r}; llmctl builds default, linear and llama3", file=file)
    if kind == "default":
        return theta, None
    factor = _number(rope, "factor", float, file)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = (_number(rope, f"{end}_freq_factor", float, file) for end in ("low", "high"))
    trained = _number(stated, "max_position_embeddings", int, file)
    original = _number(rope, "original_max_position_embeddings", int, file, trained)
    return theta, RopeScaling("llama3", factor, low, high, original)


def _ids(stated: dict[str, Any], key: str, file: Path) -> tuple[int, ...]:
    """The token ids of a field that may be absent, one id, or a list of them; -1 is how old configs spell "none"."""
    value = stated.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) for id in ids):
        raise DataError(f"{key} is {value!r}, but it must be a token id", file=file)
    return tuple(id for id in ids if id >= 0)
