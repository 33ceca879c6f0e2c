"""A model's shape as GGUF metadata: read as Hugging Face's config.json, written from `Config`.

GGUF states less than config.json. What it leaves out is what llama.cpp takes for granted of the architecture; a model
that differs there cannot be written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model.config import FULL, SLIDING, Config
from llmctl.model.gguf_file import GGUFFile

FREQUENCIES = "rope_freqs.weight"  # what Llama 3 divides its rotary frequencies by
LLAMA3 = (1.0, 4.0, 8192)  # low and high frequency factor and the trained length of every Llama 3.1, 3.2 and 3.3
# Every how manieth layer of a Gemma sees everything, and how many layers its 27B has, whose attention is scaled by the
# model's width, not by the head's: no key says so.
GEMMA = {"gemma2": (2, 46), "gemma3": (6, 62)}
CAPS = {"gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "gemma3": {"final_logit_softcapping": 0.0}}  # where no key says otherwise; 0: none  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """A file's metadata, asked for by the keys of its architecture."""

    file: GGUFFile
    name: str  # general.architecture
    model_type: str
    class_name: str

    def number(self, key: str, default: Any = None) -> Any:
        """An integer or a fraction; `default` where the key is absent."""
        full = f"{self.name}.{key}"
        value = self.file.metadata.get(full, default)
        if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:  # one number a layer, all the same
            value = value[0].item()
        if value is None:
            raise self.wrong(f"has no {full}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(f"{full} is {value!r}, but it must be one number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self.wrong(f"{self.name}.{key} is {value!r}, but it must be a count")
        return value

    def wrong(self, problem: str) -> DataError:
        return DataError(problem, file=self.file.path)

    def agrees(self, key: str, expected: int, tensor: str, axis: int) -> None:
        """Holds a stated size against a tensor."""
        stored = self.file.tensors.get(tensor)
        if stored is not None and stored.shape[axis] != expected:
            raise self.wrong(f"{self.name}.{key} asks for {expected}, but {tensor} has {stored.shape[axis]}")

    def token(self, name: str) -> int | None:
        """The id of a special token."""
        value = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < 1 << 31 else None

    def config(self) -> dict[str, Any]:
        """config.json, every field that the file states; not `dtype`, which is the importer's choice.

        Raises:
            DataError: a key that is missing or is no number, a size that the tensors contradict, a switch that llmctl
                does not build.
        """
        layers, width = self.size("block_count"), self.size("embedding_length")
        heads, inner = self.size("attention.head_count"), self.size("feed_forward_length")
        self.agrees("embedding_length", width, "token_embd.weight", -1)
        self.agrees("feed_forward_length", inner, "blk.0.ffn_up.weight", 0)
        blocks = {name.split(".")[1] for name in self.file.tensors if name.startswith("blk.")}
        if len(blocks) != layers:
            raise self.wrong(f"{self.name}.block_count is {layers}, but it has {len(blocks)} blocks")
        config: dict[str, Any] = {
            "architectures": [self.class_name],
            "initializer_range": 0.02,
            "model_type": self.model_type,
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "use_cache": True,
            "vocab_size": self.file.tensors["token_embd.weight"].shape[0],
            "bos_token_id": self.token("bos"),
            "eos_token_id": self.token("eos"),
            "pad_token_id": self.token("padding"),
        }
        if self.name == "gpt2":
            return config | {
                "activation_function": "gelu_new",
                "layer_norm_epsilon": self.number("attention.layer_norm_epsilon", 1e-5),
                "n_embd": width,
                "n_head": heads,
                "n_inner": None if inner == 4 * width else inner,
                "n_layer": layers,
                "n_positions": self.size("context_length"),
            }
        rotated = self.size("rope.dimension_count", self.size("attention.key_length", max(1, width // heads)))
        head_dim = self.size("attention.key_length", rotated)
        if head_dim % 2:
            raise self.wrong(f"{self.name}.attention.key_length is {head_dim}, but the rotary embedding turns pairs")
        if rotated != head_dim or self.size("attention.value_length", head_dim) != head_dim:
            raise self.wrong(f"rotates {rotated} of {head_dim} dimensions a head; llmctl reads files that rotate all")
        kv_heads = self.size("attention.head_count_kv", heads)
        for layer in range(layers):
            for kind in ("weight", "bias"):
                self.agrees("attention.head_count", heads * head_dim, f"blk.{layer}.attn_q.{kind}", 0)
                self.agrees("attention.head_count_kv", kv_heads * head_dim, f"blk.{layer}.attn_k.{kind}", 0)
        config |= {
            "attention_dropout": 0.0,
            "head_dim": head_dim,
            "hidden_size": width,
            "intermediate_size": inner,
            "max_position_embeddings": self.size("context_length"),
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-6),
        }
        rope = self.rope(head_dim, config["max_position_embeddings"], 1e6 if self.name == "gemma3" else 1e4)
        if self.name in GEMMA:
            return config | rope | self.gemma(rope, layers, width, heads, head_dim)
        biased = "blk.0.attn_q.bias" in self.file.tensors
        rest: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in self.file.tensors},
            "qwen2": {"sliding_window": None, "use_sliding_window": False},
            "qwen3": {"attention_bias": biased, "sliding_window": None, "use_sliding_window": False},
        }
        return config | rope | {"hidden_act": "silu"} | rest[self.name]

    def gemma(self, rope: dict[str, Any], layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
        """What a Gemma has beyond the others."""
        pattern = self.file.metadata.get(f"{self.name}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray):
            types = [SLIDING if slides else FULL for slides in pattern.tolist()]
        else:
            types = layer_types(layers, self.size("attention.sliding_window_pattern", GEMMA[self.name][0]))
        if len(types) != layers:
            raise self.wrong(f"{self.name}.attention.sliding_window_pattern has {len(types)} of {layers} layers")
        found: dict[str, Any] = {
            "attention_bias": False,
            "attn_logit_softcapping": None,
            **{key: float(self.number(key, default)) or None for key, default in CAPS[self.name].items()},
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": types,
            "query_pre_attn_scalar": query_scalar(self.name, layers, width, heads, head_dim),
            "sliding_window": self.size("attention.sliding_window"),
        }
        if self.name == "gemma3":
            local = float(self.number("rope.freq_base_swa", 10_000.0))
            sliding = {"rope_theta": local, "rope_type": "default"}
            found["rope_local_base_freq"] = local
            found["rope_parameters"] = {"full_attention": rope["rope_parameters"], "sliding_attention": sliding}
        return found

    def rope(self, head_dim: int, context: int, default: float) -> dict[str, Any]:
        """The rotary base and how it is stretched, under transformers 5's key and the older ones."""
        theta = float(self.number("rope.freq_base", default))
        kind = str(self.file.metadata.get(f"{self.name}.rope.scaling.type", "linear"))
        factor = float(self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0)))
        scaling: dict[str, Any] = {}
        if FREQUENCIES in self.file.tensors:
            scaling = self.llama3(theta, head_dim, context)
        elif kind == "yarn":
            original = self.size("rope.scaling.original_context_length", context)
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for theirs, ours in YARN.items():
                if f"{self.name}.rope.scaling.{theirs}" in self.file.metadata:
                    scaling[ours] = float(self.number(f"rope.scaling.{theirs}"))
        elif kind not in ("none", "linear"):
            raise self.wrong(f"{self.name}.rope.scaling.type is {kind!r}; llmctl reads linear and yarn")
        elif factor != 1.0 and kind == "linear":
            scaling = {"rope_type": "linear", "factor": factor}
        parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        return {"rope_parameters": parameters, "rope_scaling": scaling or None, "rope_theta": theta}

    def llama3(self, theta: float, head_dim: int, context: int) -> dict[str, Any]:
        """Llama 3's stretching, found again from the frequencies' divisors, which are all that the file keeps of it."""
        divisors = self.file.tensors[FREQUENCIES].load().float().flatten()
        factor = float(f"{divisors.max().item():.6g}")
        low, high, trained = LLAMA3
        stated = self.size("rope.scaling.original_context_length", context)
        for original in (trained, stated, max(1, int(context / factor)) if factor > 0 else trained):
            expected = llama3_divisors(theta, head_dim, factor, low, high, original)
            if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
        raise self.wrong(f"{FREQUENCIES} is not how Llama 3 stretches its rotary frequencies; llmctl reads no other")


YARN = {"attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def layer_types(layers: int, period: int) -> list[str]:
    """Sliding layers, and every `period`th that sees everything."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def query_scalar(name: str, layers: int, width: int, heads: int, head_dim: int) -> int:
    """What a Gemma divides its scores by the root of; llama.cpp knows it by the number of layers."""
    return width // heads if layers == GEMMA[name][1] else head_dim


def llama3_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> Tensor:
    """What Llama 3 divides each of its `head_dim` / 2 rotary frequencies by (fp32).

    Source: transformers' `_compute_llama3_parameters` and llama.cpp's generate_extra_tensors.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    turns = original * frequencies / (2 * math.pi)  # within the trained length
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: a slow one, divided whole; 1: a fast one, left alone
    return 1 / ((1 - smooth) / factor + smooth)


# ----------------------------------------------------------------------------------------------------------- to write


def metadata(config: Config, name: str) -> dict[str, Any]:
    """The keys that say what `config` does, for the architecture `name`.

    Raises:
        DataError: a switch that llama.cpp does not have for this architecture.
    """
    if problem := unwritable(config, name):
        raise DataError(f"{problem}, which a GGUF file cannot say", hint="export it with --hf or --onnx")
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if name == "gpt2":
        found["attention.layer_norm_epsilon"] = float(config.norm_eps)
        return {f"{name}.{key}": value for key, value in found.items()}
    found |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if name in GEMMA:
        found["attention.sliding_window"] = config.sliding_window
        found |= {key: float(cap) for key in CAPS[name] if (cap := getattr(config, key)) is not None}
    if (scaling := config.rope_scaling) is not None:
        if scaling.kind != "llama3":  # which has a tensor of its own
            found |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        if scaling.kind != "linear":
            found["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        for theirs, ours in YARN.items() if scaling.kind == "yarn" else ():
            if (value := getattr(scaling, ours)) is not None:
                found[f"rope.scaling.{theirs}"] = float(value)
    return {f"{name}.{key}": value for key, value in found.items()}


def unwritable(config: Config, name: str) -> str:
    """What llama.cpp does not do for this architecture; empty if it does everything."""
    scaling, gemma = config.rope_scaling, name in GEMMA
    act = "silu" if name in ("llama", "qwen2", "qwen3") else "gelu_pytorch_tanh"
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim)
    sliding = [config.layer_type(layer) for layer in range(config.num_hidden_layers)]
    if config.hidden_act != act:
        return f"hidden_act is {config.hidden_act!r}"
    if config.partial_rotary_factor != 1.0:
        return f"partial_rotary_factor is {config.partial_rotary_factor}"
    if scaling is not None and (
        scaling.kind not in ("linear", "yarn", "llama3") or (gemma and scaling.kind != "linear")
    ):
        return f"rope_type is {scaling.kind!r}"
    if (
        scaling is not None
        and scaling.kind == "llama3"
        and LLAMA3[:2] != (scaling.low_freq_factor, scaling.high_freq_factor)
    ):
        return f"low_freq_factor and high_freq_factor are {scaling.low_freq_factor} and {scaling.high_freq_factor}"
    if not gemma and SLIDING in sliding:
        return f"sliding_window is {config.sliding_window}"
    if gemma and sliding != layer_types(config.num_hidden_layers, period := GEMMA[name][0]):
        return f"layer_types has not every {period}th layer, and no other, see everything"
    if gemma and not math.isclose(
        (config.attention_scale or 1.0) ** -2, scalar := query_scalar(name, *shape), rel_tol=1e-6
    ):
        return f"query_pre_attn_scalar is not {scalar}"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap, built = getattr(config, key), CAPS.get(name, {})
        if (cap is not None and key not in built) or (cap is None and built.get(key)):
            return f"{key} is {cap}"
    return ""
