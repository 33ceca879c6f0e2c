"""Encoder-decoders: T5, its version 1.1 and Flan-T5."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmctl.model.config import Config
from llmctl.model.families.family import ACT_NAMES, ATTENTION, Family, Field, Name, Stated, gelu_new


def _t5_stack(stack: str, feed: int) -> Iterable[Name]:
    layer = f"{stack}.block.{{}}.layer."
    native = f"{stack}.layers.{{}}."
    for theirs, ours in zip("qkvo", (*ATTENTION, "o_proj"), strict=True):
        yield Name(f"{layer}0.SelfAttention.{theirs}", f"{native}self_attn.{ours}")
        if stack == "decoder":
            yield Name(f"{layer}1.EncDecAttention.{theirs}", f"{native}cross_attn.{ours}")
    yield Name(f"{layer}0.layer_norm", f"{native}input_layernorm")
    if stack == "decoder":
        yield Name(f"{layer}1.layer_norm", f"{native}cross_attn_layernorm")
    yield Name(f"{layer}{feed}.layer_norm", f"{native}post_attention_layernorm")
    yield Name(f"{layer}{feed}.DenseReluDense.wi_0", f"{native}mlp.gate_proj")
    yield Name(f"{layer}{feed}.DenseReluDense.wi_1", f"{native}mlp.up_proj")
    yield Name(f"{layer}{feed}.DenseReluDense.wo", f"{native}mlp.down_proj")
    yield Name(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative_bias")
    yield Name(f"{stack}.final_layer_norm", f"{stack}.norm")


T5_NAMES = (Name("shared", "embed_tokens"), *_t5_stack("encoder", 1), *_t5_stack("decoder", 2))


# the first T5 has one matrix where v1.1 has two
T5_UNGATED = tuple(
    Name(f"{stack}.block.{{}}.layer.{feed}.DenseReluDense.wi", f"{stack}.layers.{{}}.mlp.up_proj")
    for stack, feed in (("encoder", 1), ("decoder", 2))
)


def read_t5(stated: Stated) -> dict[str, Any]:
    """`feed_forward_proj` holds two switches; a config that says "not tied" is version 1.1, whose head is unscaled."""
    act, gated = str(stated.get("feed_forward_proj", "relu")), False
    if act.startswith("gated-"):
        act, gated = act.removeprefix("gated-"), True
        act = "gelu_pytorch_tanh" if act == "gelu" else act  # T5 v1.1's "gated-gelu" is the approximation
    scaled = stated.get("scale_decoder_outputs", stated.get("tie_word_embeddings") is not False)
    start = stated.get("decoder_start_token_id")
    return {
        "num_decoder_layers": int(stated.get("num_decoder_layers") or stated["num_layers"]),
        "hidden_act": ACT_NAMES.get(act, act),
        "gated": gated,
        "logit_scale": float(stated["d_model"]) ** -0.5 if scaled else 1.0,
        "decoder_start_token_id": int(stated.get("pad_token_id", 0) if start is None else start),
        "max_position_embeddings": int(stated.get("n_positions", 512)),
    }


def write_t5(c: Config) -> Stated:
    """What `read_t5` reads back."""
    act = "gelu" if c.hidden_act == "gelu_pytorch_tanh" and c.gated else gelu_new(c.hidden_act)
    return {
        "num_decoder_layers": c.num_decoder_layers,
        "feed_forward_proj": f"gated-{act}" if c.gated else act,
        "scale_decoder_outputs": c.logit_scale != 1.0,
        "decoder_start_token_id": c.decoder_start_token_id,
        "n_positions": c.max_position_embeddings,
        "is_encoder_decoder": True,
    }


def fresh_t5(c: Config) -> dict[str, Any]:
    """T5 v1.1 (Shazeer 2020, arXiv:2002.05202); a tied head is scaled, as that of the first T5."""
    return {
        "num_decoder_layers": c.num_hidden_layers,
        "decoder_start_token_id": c.pad_token_id if c.pad_token_id is not None else 0,
        "logit_scale": c.hidden_size**-0.5 if c.tie_word_embeddings else 1.0,
        "num_key_value_heads": c.num_attention_heads,
    }


ENCODER_DECODERS: dict[str, Family] = {
    "t5": Family(  # Raffel et al. 2020, arXiv:1910.10683; v1.1 and Flan-T5
        "t5",
        "encoder-decoder",
        {"seq2seq-lm": "T5ForConditionalGeneration"},
        base="",
        fields={
            "vocab_size": Field("vocab_size"),
            "hidden_size": Field("d_model"),
            "num_hidden_layers": Field("num_layers"),
            "num_attention_heads": Field("num_heads"),
            "intermediate_size": Field("d_ff"),
            "head_dim": Field("d_kv"),
            "norm_eps": Field("layer_norm_epsilon", 1e-6),
            "tie_word_embeddings": Field("tie_word_embeddings", True),
            "relative_attention_num_buckets": Field("relative_attention_num_buckets", 32),
            "relative_attention_max_distance": Field("relative_attention_max_distance", 128),
        },
        switches={
            "positions": "relative",
            "attention_scale": 1.0,
            "hidden_act": "gelu_pytorch_tanh",
        },
        names=(*T5_NAMES, *T5_UNGATED),
        built={"is_decoder": (False,), "is_encoder_decoder": (True,)},
        aside=(r"(encoder|decoder)\.embed_tokens\.weight",),
        read=read_t5,
        write=write_t5,
        fresh=fresh_t5,
    ),
}
