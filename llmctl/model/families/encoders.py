"""Encoders: BERT, RoBERTa and ModernBERT."""

from __future__ import annotations

import dataclasses
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
    scaling,
    spelled,
)

BERT = LAYER_NORM | {"norm_place": "post", "embedding_norm": True, "type_vocab_size": 2, "hidden_act": "gelu"}


BERT_FIELDS = COMMON | {
    "norm_eps": Field("layer_norm_eps", 1e-12),
    "hidden_act": Field("hidden_act", "gelu"),
    "type_vocab_size": Field("type_vocab_size", 2),
    "tie_word_embeddings": Field("tie_word_embeddings", True),
}


BERT_BUILT = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


BERT_HEAD: dict[Task, str] = {"masked-lm": "norm", "sequence-classification": "pooler"}


ALL_TASKS: tuple[Task, ...] = (
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
)


BERT_NAMES = (
    Name("embeddings.word_embeddings", "embed_tokens"),
    Name("embeddings.position_embeddings", "embed_positions"),
    Name("embeddings.token_type_embeddings", "embed_token_types"),
    Name("embeddings.LayerNorm", "embed_norm"),
    *(
        Name(f"encoder.layer.{{}}.attention.self.{theirs}", SELF + ours)
        for theirs, ours in zip(("query", "key", "value"), ATTENTION, strict=True)
    ),
    Name("encoder.layer.{}.attention.output.dense", SELF + "o_proj"),
    Name("encoder.layer.{}.attention.output.LayerNorm", LAYER + "post_attention_layernorm"),
    Name("encoder.layer.{}.intermediate.dense", FEED + "up_proj"),
    Name("encoder.layer.{}.output.dense", FEED + "down_proj"),
    Name("encoder.layer.{}.output.LayerNorm", LAYER + "post_feedforward_layernorm"),
)


BERT_HEADS: dict[Task, tuple[Name, ...]] = {
    "masked-lm": (
        Name("cls.predictions.transform.dense", "head.dense"),
        Name("cls.predictions.transform.LayerNorm", "head.norm"),
        Name("cls.predictions", "head"),
        Name("cls.predictions.decoder", "head.decoder"),
    ),
    "sequence-classification": (Name("bert.pooler.dense", "head.dense"), Name("classifier", "head.classifier")),
    "token-classification": (Name("classifier", "head.classifier"),),
    "question-answering": (Name("qa_outputs", "head.classifier"),),
    "embedding": (Name("pooler.dense", "head.dense"),),
}


ROBERTA_HEADS: dict[Task, tuple[Name, ...]] = {
    "masked-lm": (
        Name("lm_head.dense", "head.dense"),
        Name("lm_head.layer_norm", "head.norm"),
        Name("lm_head", "head"),
        Name("lm_head.decoder", "head.decoder"),
    ),
    "sequence-classification": (
        Name("classifier.dense", "head.dense"),
        Name("classifier.out_proj", "head.classifier"),
    ),
    "token-classification": (Name("classifier", "head.classifier"),),
    "question-answering": (Name("qa_outputs", "head.classifier"),),
    "embedding": (Name("pooler.dense", "head.dense"),),
}


MODERNBERT_NAMES = (
    Name("embeddings.tok_embeddings", "embed_tokens"),
    Name("embeddings.norm", "embed_norm"),
    Name("layers.{}.attn_norm", LAYER + "input_layernorm"),
    Name("layers.{}.attn.Wqkv", tuple(SELF + name for name in ATTENTION)),
    Name("layers.{}.attn.Wo", SELF + "o_proj"),
    Name("layers.{}.mlp_norm", LAYER + "post_attention_layernorm"),
    Name("layers.{}.mlp.Wi", (FEED + "gate_proj", FEED + "up_proj")),
    Name("layers.{}.mlp.Wo", FEED + "down_proj"),
    Name("final_norm", "norm"),
)


_MODERNBERT_HEAD = (Name("head.dense", "head.dense"), Name("head.norm", "head.norm"))


MODERNBERT_HEADS: dict[Task, tuple[Name, ...]] = {
    "masked-lm": (*_MODERNBERT_HEAD, Name("decoder", "head"), Name("decoder", "head.decoder")),
    "sequence-classification": (*_MODERNBERT_HEAD, Name("classifier", "head.classifier")),
    "token-classification": (*_MODERNBERT_HEAD, Name("classifier", "head.classifier")),
    "question-answering": (*_MODERNBERT_HEAD, Name("classifier", "head.classifier")),
}


def _encoders(prefix: str) -> dict[Task, str]:
    return {
        "masked-lm": f"{prefix}ForMaskedLM",
        "sequence-classification": f"{prefix}ForSequenceClassification",
        "token-classification": f"{prefix}ForTokenClassification",
        "question-answering": f"{prefix}ForQuestionAnswering",
        "embedding": f"{prefix}Model",
    }


def read_roberta(stated: Stated) -> dict[str, Any]:
    return {"position_offset": int(stated.get("pad_token_id", 1)) + 1}


def read_modernbert(stated: Stated) -> dict[str, Any]:
    """One layer in three sees everything, unless `layer_types` says otherwise; each type has its rotary base."""
    layers, every = int(stated["num_hidden_layers"]), int(stated.get("global_attn_every_n_layers") or 3)
    types = stated.get("layer_types") or [SLIDING if i % every else FULL for i in range(layers)]
    ropes = stated.get("rope_parameters") or {}
    full: Stated = ropes.get(FULL) or {}
    local: Stated = ropes.get(SLIDING) or {}
    if scaling(full, stated) or scaling(local, stated):
        raise ValueError("rope_parameters asks for a scaled rotary embedding, which llmctl does not build here")
    bias = bool(stated.get("attention_bias", False))
    return {
        "rope_theta": float(full.get("rope_theta") or stated.get("global_rope_theta") or 160_000.0),
        "rope_local_theta": float(local.get("rope_theta") or stated.get("local_rope_theta") or 10_000.0),
        "layer_types": tuple(types),
        "sliding_window": int(stated.get("local_attention", 128)) // 2,
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def write_modernbert(c: Config) -> Stated:
    """What `read_modernbert` reads back."""
    local = c.rope_local_theta or 10_000.0
    return {
        "rope_parameters": {FULL: spelled(None, c.rope_theta), SLIDING: spelled(None, local)},
        "global_rope_theta": c.rope_theta,
        "local_rope_theta": local,
        "layer_types": list(c.layer_types),
        "local_attention": 2 * (c.sliding_window or 64),
        "attention_bias": c.attention_bias,
        "cls_token_id": c.bos_token_id,
        "sep_token_id": c.eos_ids[0] if c.eos_ids else None,
    } | ({"classifier_pooling": c.pooling} if c.task == "sequence-classification" else {})


def fresh_modernbert(c: Config) -> dict[str, Any]:
    """Every third layer sees everything, the others 64 tokens to either side (Warner et al. 2024, arXiv:2412.13663)."""
    types = tuple(SLIDING if i % 3 else FULL for i in range(c.num_hidden_layers))
    window = min(64, max(8, c.max_position_embeddings // 4))
    return {"rope_theta": 160_000.0, "rope_local_theta": 10_000.0, "layer_types": types, "sliding_window": window}


ENCODERS: dict[str, Family] = {
    "bert": Family(  # Devlin et al. 2018, arXiv:1810.04805
        "bert",
        "encoder",
        _encoders("Bert"),
        base="bert.",
        fields=BERT_FIELDS,
        switches=BERT,
        names=BERT_NAMES,
        heads=BERT_HEADS,
        head=BERT_HEAD,
        built=BERT_BUILT,
        aside=(
            r".*embeddings\.position_ids",
            r"cls\.seq_relationship\..*",
            r"cls\.predictions\.decoder\.bias",
            r"bert\.pooler\..*",
        ),
    ),
    "roberta": Family(  # Liu et al. 2019, arXiv:1907.11692
        "roberta",
        "encoder",
        _encoders("Roberta"),
        base="roberta.",
        fields=BERT_FIELDS,
        switches=BERT | {"position_offset": 2, "type_vocab_size": 1},
        names=BERT_NAMES,
        heads=ROBERTA_HEADS,
        head=BERT_HEAD,
        built=BERT_BUILT,
        aside=(r".*embeddings\.position_ids", r"lm_head\.decoder\.bias", r"roberta\.pooler\..*"),
        read=read_roberta,
        fresh=lambda c: {
            "pad_token_id": 1 if c.pad_token_id is None else c.pad_token_id,
            "position_offset": (1 if c.pad_token_id is None else c.pad_token_id) + 1,
            "max_position_embeddings": c.max_position_embeddings + (c.pad_token_id or 1) + 1,
        },
    ),
    "modernbert": Family(  # Warner et al. 2024, arXiv:2412.13663
        "modernbert",
        "encoder",
        _encoders("ModernBert"),
        fields=COMMON
        | {
            "norm_eps": Field("norm_eps", 1e-5),
            "norm_bias": Field("norm_bias", False),
            "hidden_act": Field("hidden_activation", "gelu"),
            "mlp_bias": Field("mlp_bias", False),
            "head_bias": Field("classifier_bias", False),
            "head_act": Field("classifier_activation", "gelu"),
            "tie_word_embeddings": Field("tie_word_embeddings", True),
        },
        switches={
            "norm": "layer",
            "embedding_norm": True,
            "skip_first_norm": True,
            "hidden_act": "gelu",
            "head_bias": False,
        },
        names=MODERNBERT_NAMES,
        heads=MODERNBERT_HEADS,
        head=dict.fromkeys(ALL_TASKS, "norm"),
        built={"decoder_bias": (True,)},
        read=read_modernbert,
        write=write_modernbert,
        fresh=fresh_modernbert,
    ),
}
# XLM-RoBERTa (Conneau et al. 2019, arXiv:1911.02116): RoBERTa with a vocabulary of a hundred languages
ENCODERS["xlm-roberta"] = dataclasses.replace(
    ENCODERS["roberta"], model_type="xlm-roberta", architectures=_encoders("XLMRoberta")
)
