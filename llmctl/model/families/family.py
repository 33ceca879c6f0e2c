"""What a family is: a row of data, and how its config.json spells what several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmctl.model.config import FULL, SLIDING, Config, Kind, RopeScaling, Task

Stated = dict[str, Any]  # a parsed config.json


class Name(NamedTuple):
    """A module on disk and in memory; `{}` is the layer's number. Several native modules lie one below the other."""

    hf: str
    native: str | tuple[str, ...]
    transposed: bool = False  # (in, out), as GPT-2's Conv1D stores it


class Field(NamedTuple):
    """A key of config.json and what it means where it is absent; no default: it must be there."""

    key: str
    default: Any = None


def nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        architectures: the class of each task that transformers, vLLM and llama.cpp look up.
        base: what a class with a head calls the trunk; the trunk alone is stored without it.
        fields: `Config`'s field -> the key in config.json.
        switches: what every model of the family has.
        names, heads: of the trunk's modules, and of each task's head.
        built: keys whose other values change the model in a way that llmctl does not build.
        aside: beginnings of stored tensors that are no weights of the model (buffers, other heads).
        read, write: what a plain rename can't say: config.json -> fields, and back.
        fresh: fields of a new model that follow from its shape.
        head: what a task's head does before its last layer, see `Config.head_transform`.
    """

    model_type: str
    kind: Kind
    architectures: Mapping[Task, str]
    base: str = "model."
    fields: Mapping[str, Field] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[Name, ...] = ()
    heads: Mapping[Task, tuple[Name, ...]] = field(default_factory=dict)
    head: Mapping[Task, str] = field(default_factory=dict)
    built: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    read: Callable[[Stated], dict[str, Any]] = nothing
    write: Callable[[Config], Stated] = nothing
    fresh: Callable[[Config], dict[str, Any]] = nothing


COMMON = {
    "vocab_size": Field("vocab_size"),
    "hidden_size": Field("hidden_size"),
    "num_hidden_layers": Field("num_hidden_layers"),
    "num_attention_heads": Field("num_attention_heads"),
    "intermediate_size": Field("intermediate_size"),
    "max_position_embeddings": Field("max_position_embeddings"),
}


ACT_NAMES = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}  # the same functions


LAYER_NORM = {"norm": "layer", "norm_bias": True, "gated": False, "attention_bias": True}

LAYER_NORM |= {"attention_output_bias": True, "mlp_bias": True, "positions": "learned"}


ATTENTION = ("q_proj", "k_proj", "v_proj")


LAYER, SELF, FEED = "layers.{}.", "layers.{}.self_attn.", "layers.{}.mlp."


def rope(stated: Stated) -> dict[str, Any]:
    """The rotary base and its scaling, from transformers 5's key or from the older ones."""
    found = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError("rope_parameters is not an object")
    merged = {"rope_theta": 10_000.0, **{k: stated[k] for k in ("rope_theta",) if k in stated}, **found}
    partial = found.get("partial_rotary_factor", stated.get("partial_rotary_factor"))
    return {
        "rope_theta": real(merged, "rope_theta"),
        "rope_scaling": scaling(found, stated),
        "partial_rotary_factor": 1.0 if partial is None else float(partial),
    }


def scaling(found: Stated, stated: Stated) -> RopeScaling | None:
    """A rope_scaling object."""
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"rope_type is {kind!r}; llmctl builds default, linear, dynamic, yarn and llama3")
    trained: Any = found.get("original_max_position_embeddings", stated.get("max_position_embeddings"))
    if kind == "dynamic":
        trained = stated.get("max_position_embeddings")  # what transformers compares the length with
    factor = found.get("factor")
    if factor is None and kind == "yarn":
        factor = stated["max_position_embeddings"] / trained
    options: dict[str, Any] = {"factor": float(factor) if factor is not None else real(found, "factor")}
    if kind == "llama3":
        options |= {key: real(found, key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        options |= {"beta_fast": float(found.get("beta_fast") or 32), "beta_slow": float(found.get("beta_slow") or 1)}
        options |= {k: float(found[k]) for k in ("attention_factor", "mscale", "mscale_all_dim") if found.get(k)}
        options["truncate"] = bool(found.get("truncate", True))
    if kind != "linear":
        options["original_max_position_embeddings"] = int(trained)
    return RopeScaling(kind, **options)


def spelled(found: RopeScaling | None, theta: float) -> Stated:
    """The object that `scaling` reads back."""
    said: Stated = {"rope_theta": theta, "rope_type": found.kind if found else "default"}
    if found is None:
        return said
    said["factor"] = found.factor
    if found.kind == "llama3":
        said |= {"low_freq_factor": found.low_freq_factor, "high_freq_factor": found.high_freq_factor}
    if found.kind == "yarn":
        plain = RopeScaling("yarn", found.factor)
        optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        said |= {key: getattr(found, key) for key in optional if getattr(found, key) != getattr(plain, key)}
    if found.kind in ("llama3", "yarn"):
        said["original_max_position_embeddings"] = found.original_max_position_embeddings
    return said


def write_rope(c: Config) -> Stated:
    """Twice: `rope_parameters` is what transformers 5 reads, `rope_theta` and `rope_scaling` what everything older
    reads."""
    said = spelled(c.rope_scaling, c.rope_theta)
    if c.partial_rotary_factor != 1.0:
        said["partial_rotary_factor"] = c.partial_rotary_factor
    old = {key: value for key, value in said.items() if key != "rope_theta"} if c.rope_scaling else None
    return {"rope_parameters": said, "rope_theta": c.rope_theta, "rope_scaling": old}


def windowed(stated: Stated, *, used: bool) -> dict[str, Any]:
    """`sliding_window` and which layers have it."""
    layers, window = int(stated["num_hidden_layers"]), stated.get("sliding_window")
    if not used or window is None:
        return {}
    first = stated.get("max_window_layers", layers)
    types = stated.get("layer_types") or [SLIDING if i >= first else FULL for i in range(layers)]
    return {"sliding_window": int(window), "layer_types": tuple(types)} if SLIDING in types else {}


def gelu_new(act: str) -> str:
    return "gelu_new" if act == "gelu_pytorch_tanh" else act


def real(stated: Stated, key: str) -> float:
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, but it must be a number")
    return float(value)
