"""Decoders small enough to build in a millisecond, with every switch somewhere on."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmctl.model.config import Config, RopeScaling

torch.set_num_threads(1)  # products this small only wait for a second thread, for seconds where the machine is busy

LLAMA = Config(
    family="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=12,
    max_position_embeddings=320,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
)
SHAPES = {
    "llama": LLAMA,
    "llama untied, biased": replace(
        LLAMA, tie_word_embeddings=False, attention_bias=True, attention_output_bias=True, rope_theta=500_000.0
    ),
    "llama grouped, llama3 rope": replace(
        LLAMA, num_key_value_heads=2, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), norm_eps=1e-5
    ),
    "llama linear rope": replace(LLAMA, rope_scaling=RopeScaling("linear", 2.0)),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True),
    "qwen3 grouped, wide heads, untied": replace(
        LLAMA,
        family="qwen3",
        qk_norm=True,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        eos_token_id=(6, 2),
    ),
}
