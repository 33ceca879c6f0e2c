"""Causal language models: Llama and its relatives, Gemma, GPT-2, and the recurrent baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmctl.model.config import FULL, SLIDING, Config, Task
from llmctl.model.families.family import (
    ATTENTION,
    COMMON,
    FEED,
    LAYER,
    LAYER_NORM,
    SELF,
    Family,
    Field,
    Name,
    Stated,
    gelu_new,
    rope,
    scaling,
    spelled,
    windowed,
    write_rope,
)

LLAMA_FIELDS = COMMON | {
    "num_key_value_heads": Field("num_key_value_heads"),
    "head_dim": Field("head_dim"),
    "norm_eps": Field("rms_norm_eps", 1e-6),
    "tie_word_embeddings": Field("tie_word_embeddings", False),
    "hidden_act": Field("hidden_act", "silu"),
}


GEMMA_FIELDS = {
    "hidden_act": Field("hidden_activation", "gelu_pytorch_tanh"),
    "head_dim": Field("head_dim", 256),
    "tie_word_embeddings": Field("tie_word_embeddings", True),
}
GEMMA = {"norm_offset": True, "norm_place": "both", "hidden_act": "gelu_pytorch_tanh"}


DECODER_HEADS: dict[Task, tuple[Name, ...]] = {
    "sequence-classification": (Name("score", "head.classifier"),),
    "token-classification": (Name("score", "head.classifier"),),
    "question-answering": (Name("qa_outputs", "head.classifier"),),
}


GPT2_NAMES = (
    Name("wte", "embed_tokens"),
    Name("wpe", "embed_positions"),
    Name("h.{}.ln_1", LAYER + "input_layernorm"),
    Name("h.{}.attn.c_attn", tuple(SELF + name for name in ATTENTION), transposed=True),
    Name("h.{}.attn.c_proj", SELF + "o_proj", transposed=True),
    Name("h.{}.ln_2", LAYER + "post_attention_layernorm"),
    Name("h.{}.mlp.c_fc", FEED + "up_proj", transposed=True),
    Name("h.{}.mlp.c_proj", FEED + "down_proj", transposed=True),
    Name("ln_f", "norm"),
)


def _decoders(prefix: str) -> dict[Task, str]:
    tasks: dict[Task, str] = {"sequence-classification": "ForSequenceClassification"}
    tasks |= {"token-classification": "ForTokenClassification", "embedding": "Model"}
    made: dict[Task, str] = {"causal-lm": f"{prefix}ForCausalLM"}
    return made | {task: prefix + suffix for task, suffix in tasks.items()}


def _like_llama(
    model_type: str,
    prefix: str,
    fields: Mapping[str, Field] | None = None,
    *,
    built: Mapping[str, tuple[Any, ...]] | None = None,
    **rest: Any,
) -> Family:
    """A row whose tensors and most of whose keys have Llama's names."""
    return Family(
        model_type,
        "decoder",
        _decoders(prefix),
        fields={**LLAMA_FIELDS, **(fields or {})},
        heads=DECODER_HEADS,
        built=built or {},
        aside=(r".*\.rotary_emb\.inv_freq",),
        **rest,
    )


def read_llama(stated: Stated) -> dict[str, Any]:
    """For a family whose one key gives all four projections a bias."""
    bias = bool(stated.get("attention_bias", False))
    return rope(stated) | {"attention_bias": bias, "attention_output_bias": bias}


def write_llama(c: Config) -> Stated:
    return write_rope(c) | {"attention_bias": c.attention_bias}


def read_qwen(stated: Stated) -> dict[str, Any]:
    return rope(stated) | windowed(stated, used=bool(stated.get("use_sliding_window", False)))


def write_qwen(c: Config) -> Stated:
    used = SLIDING in c.layer_types
    said = write_rope(c) | {"use_sliding_window": used, "sliding_window": c.sliding_window}
    if used:
        said |= {"layer_types": list(c.layer_types), "max_window_layers": c.layer_types.index(SLIDING)}
    return said


def read_mistral(stated: Stated) -> dict[str, Any]:
    """Every layer slides where there is a window at all."""
    return rope(stated) | windowed({**stated, "max_window_layers": 0}, used=True)


def read_gemma(stated: Stated, *, every: int) -> dict[str, Any]:
    """One layer in `every` sees everything, unless `layer_types` says otherwise."""
    every = int(stated.get("sliding_window_pattern") or every)
    layers = range(int(stated["num_hidden_layers"]))
    bias = bool(stated.get("attention_bias", False))
    return {
        "layer_types": tuple(stated.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in layers]),
        "sliding_window": int(stated.get("sliding_window") or 4096),
        "attention_scale": float(stated.get("query_pre_attn_scalar", 256)) ** -0.5,
        "embedding_scale": float(stated["hidden_size"]) ** 0.5,
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def write_gemma(c: Config) -> Stated:
    """What `read_gemma` reads back."""
    scalar = (c.attention_scale or c.head_dim**-0.5) ** -2
    return {
        "layer_types": list(c.layer_types),
        "sliding_window": c.sliding_window,
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "attention_bias": c.attention_bias,
    }


def fresh_gemma(c: Config, *, every: int) -> dict[str, Any]:
    """One layer in `every` sees everything, the others a quarter of the context."""
    layers = range(1, c.num_hidden_layers + 1)
    return {
        "layer_types": tuple(SLIDING if i % every else FULL for i in layers),
        "sliding_window": max(16, c.max_position_embeddings // 4),
        "attention_scale": c.head_dim**-0.5,
        "embedding_scale": c.hidden_size**0.5,
    }


def read_gemma3(stated: Stated) -> dict[str, Any]:
    """Gemma 2's, and a rotary base of its own for sliding layers."""
    ropes: Stated = stated.get("rope_parameters") or {}
    full = ropes.get(FULL) or {**(stated.get("rope_scaling") or {}), "rope_theta": stated.get("rope_theta", 1e6)}
    local = ropes.get(SLIDING) or {"rope_theta": stated.get("rope_local_base_freq", 10_000.0)}
    return read_gemma(stated, every=6) | {
        "rope_theta": float(full.get("rope_theta", 1e6)),
        "rope_scaling": scaling(full, stated),
        "rope_local_theta": float(local.get("rope_theta", 10_000.0)),
    }


def write_gemma3(c: Config) -> Stated:
    """What `read_gemma3` reads back."""
    local = c.rope_local_theta or 10_000.0
    said = write_rope(c)
    return (
        said
        | write_gemma(c)
        | {
            "rope_parameters": {FULL: said["rope_parameters"], SLIDING: spelled(None, local)},
            "rope_local_base_freq": local,
        }
    )


def read_gpt2(stated: Stated) -> dict[str, Any]:
    return {"intermediate_size": int(stated.get("n_inner") or 4 * int(stated["n_embd"]))}


def write_gpt2(c: Config) -> Stated:
    inner = None if c.intermediate_size == 4 * c.hidden_size else c.intermediate_size
    return {"n_inner": inner, "activation_function": gelu_new(c.hidden_act)}


def read_lstm(stated: Stated) -> dict[str, Any]:
    """There are no heads and no feed-forward: what every config has says one of each, as wide as the state."""
    return {"num_attention_heads": 1, "intermediate_size": int(stated["hidden_size"])}


def fresh_lstm(c: Config) -> dict[str, Any]:
    width = c.hidden_size
    return {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width, "intermediate_size": width}


DECODERS: dict[str, Family] = {
    "llama": _like_llama(  # Touvron et al. 2023, arXiv:2302.13971; SmolLM and many others
        "llama",
        "Llama",
        {"mlp_bias": Field("mlp_bias", False)},
        built={"pretraining_tp": (1, None), "layer_types": (None,)},
        read=read_llama,
        write=write_llama,
    ),
    "mistral": _like_llama(  # Jiang et al. 2023, arXiv:2310.06825
        "mistral",
        "Mistral",
        read=read_mistral,
        write=lambda c: write_rope(c) | {"sliding_window": c.sliding_window},
    ),
    "qwen2": _like_llama(  # Qwen Team 2024, arXiv:2407.10671
        "qwen2",
        "Qwen2",
        switches={"attention_bias": True},
        read=read_qwen,
        write=write_qwen,
    ),
    "qwen3": _like_llama(  # Qwen Team 2025, arXiv:2505.09388
        "qwen3",
        "Qwen3",
        switches={"qk_norm": True},
        read=lambda stated: read_llama(stated) | read_qwen(stated),
        write=lambda c: write_llama(c) | write_qwen(c),
    ),
    "stablelm": _like_llama(  # Bellagente et al. 2024, arXiv:2402.17834
        "stablelm",
        "StableLm",
        {"norm_eps": Field("layer_norm_eps", 1e-5), "attention_bias": Field("use_qkv_bias", False)},
        switches={"norm": "layer", "norm_bias": True},
        built={"use_parallel_residual": (False,), "qk_layernorm": (False,)},
        read=lambda stated: rope({"partial_rotary_factor": 0.25, **stated}),
        write=lambda c: write_rope(c) | {"partial_rotary_factor": c.partial_rotary_factor},
        fresh=lambda c: {"partial_rotary_factor": 0.25},
    ),
    "gemma2": _like_llama(  # Gemma Team 2024, arXiv:2408.00118
        "gemma2",
        "Gemma2",
        GEMMA_FIELDS
        | {
            "attn_logit_softcapping": Field("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": Field("final_logit_softcapping", 30.0),
        },
        switches=GEMMA,
        built={"use_bidirectional_attention": (False, None)},
        read=lambda stated: rope(stated) | read_gemma(stated, every=2),
        write=lambda c: write_rope(c) | write_gemma(c),
        fresh=lambda c: {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            **fresh_gemma(c, every=2),
        },
    ),
    "gemma3": dataclasses.replace(  # Gemma Team 2025, arXiv:2503.19786; the text model alone
        _like_llama(
            "gemma3_text",
            "Gemma3",
            GEMMA_FIELDS | {"final_logit_softcapping": Field("final_logit_softcapping")},
            switches=GEMMA | {"qk_norm": True},
            built={"use_bidirectional_attention": (False, None)},
            read=read_gemma3,
            write=write_gemma3,
            fresh=lambda c: {"rope_theta": 1e6, "rope_local_theta": 10_000.0, **fresh_gemma(c, every=6)},
        ),
        architectures={"causal-lm": "Gemma3ForCausalLM", "embedding": "Gemma3TextModel"},
    ),
    "gpt2": Family(  # Radford et al. 2019
        "gpt2",
        "decoder",
        {
            "causal-lm": "GPT2LMHeadModel",
            "sequence-classification": "GPT2ForSequenceClassification",
            "embedding": "GPT2Model",
        },
        base="transformer.",
        fields={
            "vocab_size": Field("vocab_size"),
            "hidden_size": Field("n_embd"),
            "num_hidden_layers": Field("n_layer"),
            "num_attention_heads": Field("n_head"),
            "max_position_embeddings": Field("n_positions"),
            "norm_eps": Field("layer_norm_epsilon", 1e-5),
            "hidden_act": Field("activation_function", "gelu_new"),
            "tie_word_embeddings": Field("tie_word_embeddings", True),
        },
        switches=LAYER_NORM | {"hidden_act": "gelu_pytorch_tanh"},
        names=GPT2_NAMES,
        heads={"sequence-classification": (Name("score", "head.classifier"),)},
        built={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        aside=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        read=read_gpt2,
        write=write_gpt2,
    ),
    "lstm": Family(  # the recurrent baseline: llmctl's own files, which no other tool reads
        "lstm",
        "recurrent",
        {"causal-lm": "LSTMForCausalLM"},
        fields={
            "vocab_size": Field("vocab_size"),
            "hidden_size": Field("hidden_size"),
            "num_hidden_layers": Field("num_hidden_layers"),
            "max_position_embeddings": Field("max_position_embeddings"),
            "tie_word_embeddings": Field("tie_word_embeddings", True),
        },
        switches={"positions": "none"},
        read=read_lstm,
        fresh=fresh_lstm,
    ),
}
