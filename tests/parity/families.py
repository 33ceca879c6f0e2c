"""Tiny random models of every family, made by transformers: the reference that llmctl's transformer is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, WIDTH, CONTEXT = 97, 48, 160
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 3,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
GEMMA = LLAMA | {"num_hidden_layers": 4, "query_pre_attn_scalar": 20, "sliding_window": 8, "sliding_window_pattern": 3}
GEMMA2 = LLAMA | {"num_hidden_layers": 4, "query_pre_attn_scalar": 20, "sliding_window": 8}
GEMMA2 |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
MODERN = BERT | {"num_hidden_layers": 4, "local_attention": 12, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
T5: dict[str, Any] = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
T5 |= {"num_decoder_layers": 3, "pad_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3}
T5 |= {"relative_attention_max_distance": 40, "relative_attention_num_buckets": 12}


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **more}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biases, untied": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, llama3 rope": ("LlamaForCausalLM", LLAMA | rope(**LLAMA3) | {"tie_word_embeddings": True}),
    "llama, linear rope": ("LlamaForCausalLM", LLAMA | rope(rope_type="linear", factor=2.0)),
    "llama, dynamic rope": ("LlamaForCausalLM", LLAMA | rope(rope_type="dynamic", factor=2.0)),
    "llama, yarn rope": ("LlamaForCausalLM", LLAMA | rope(**YARN)),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 7}),
    "mistral, no window": ("MistralForCausalLM", LLAMA | {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen2, sliding": (
        "Qwen2ForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "gemma3, capped": ("Gemma3ForCausalLM", GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "stablelm": (
        "StableLmForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"use_qkv_bias": True, **rope(partial_rotary_factor=0.5)},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
}
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT | {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT | {"type_vocab_size": 1}),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}{head}": (f"{kind}{head}", config | {"num_labels": labels})
    for kind, config in (("Bert", BERT), ("Roberta", BERT), ("ModernBert", MODERN))
    for head, labels in (("ForSequenceClassification", 5), ("ForTokenClassification", 4), ("ForQuestionAnswering", 2))
} | {
    "LlamaForSequenceClassification": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}),
    "Qwen3ForTokenClassification": ("Qwen3ForTokenClassification", LLAMA | {"num_labels": 3}),
    "GPT2ForSequenceClassification": ("GPT2ForSequenceClassification", GPT2 | {"num_labels": 1}),
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "roberta": ("RobertaModel", BERT),
    "modernbert": ("ModernBertModel", MODERN),
    "qwen3": ("Qwen3Model", LLAMA),
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 v1.1": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
EVERY = DECODERS | MASKED | HEADS | {f"{name} base": row for name, row in BASES.items()} | SEQ2SEQ


def reference(name: str) -> Any:
    """transformers' model, eager attention, every tensor random, gains and biases too: a wrong one shows."""
    class_, options = EVERY[name]
    kind = getattr(transformers, class_)
    torch.manual_seed(5)
    model = kind(kind.config_class(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1))
    for key in ("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"):
        assert not model.training, key
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def ids_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids of no special token."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
