"""The decoder of the Llama and Qwen3 families, under Hugging Face's parameter names.

The forward is architecture only: no loss, no sampling, no packing. Both families share the block
`x + attend(norm(x))`, `x + mlp(norm(x))`; what sets them apart is data in `config.FAMILIES`.

Numerics follow transformers' LlamaForCausalLM and Qwen3ForCausalLM (tests/parity): norms and rotations are computed
in fp32 whatever the weights' dtype.
"""

# B batch, T time, S past and new time together, C channels, H heads, K key/value heads, D head size, V vocabulary

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.config import Config

INIT_STD = (
    0.02  # GPT-2's; the outputs into the residual stream get it divided by sqrt(2L), as there (Radford et al. 2019)
)


BLOCKWISE = 1024  # the longest text that `blockwise` attends to on a CPU


class Rope(NamedTuple):
    """The cosines and sines of the positions at hand, each (T, 1, D/2) or (B, T, 1, D/2), fp32."""

    cos: Tensor
    sin: Tensor


class Cache:
    """Keys and values of the positions seen so far, in buffers of a fixed length, so that appending moves nothing."""

    def __init__(
        self, config: Config, batch: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (L, B, K, max_length, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0  # positions held; the decoder advances it when every layer has appended

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, D) behind what is held; returns all of it, (B, K, S, D), as views."""
        past, total = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, past:total] = k
        self.values[layer, :, :, past:total] = v
        return self.keys[layer, :, :, :total], self.values[layer, :, :, :total]


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467); the mean is taken in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim, self.qk_norm = layer, size, config.qk_norm
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=bias)
        if self.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)  # before the rotation, as Qwen3 does
        q, k = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out: Tensor = self.o_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention, then the feed-forward, each added to the stream; dropout falls on what is added."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Trunk(nn.Module):
    """Everything but the head; a module of its own because Hugging Face's names begin with `model.`"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model. With tied embeddings there is no `lm_head` module, so every tensor is stored once.

    The constructor leaves the weights as torch.nn's defaults; `Decoder.random` draws them from a seed, `hf.load`
    reads them.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    future: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        angles = rotary_angles(config)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        longest = min(config.max_position_embeddings, BLOCKWISE)
        future = torch.full((longest, longest), -math.inf, device="cpu").triu(1)  # hides what comes later
        self.register_buffer("future", future, persistent=False)

    @classmethod
    def random(cls, config: Config, seed: int) -> Decoder:
        """A fresh model in fp32 on the CPU; the same seed draws the same weights, whatever else the process draws."""
        with torch.device("meta"):
            model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * config.num_hidden_layers)

        def draw(name: str, shape: torch.Size) -> Tensor:
            if len(shape) == 1:
                return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
            return torch.empty(shape).normal_(0.0, std, generator=generator)

        state = {name: draw(name, tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return model

    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        """The normed states before the head, (B, T) -> (B, T, C), for a loss that never holds all the logits.

        Args:
            ids: (B, T) int64.
            cache: what came before; the new keys and values are appended to it.
            positions: (T,) or (B, T) where the tokens stand, if not right behind the cache.

        Raises:
            ValueError: more positions than the rotary table or the cache holds.
        """
        past, new = cache.length if cache is not None else 0, ids.shape[1]
        room = min(self.rope_cos.shape[0], cache.max_length if cache is not None else self.rope_cos.shape[0])
        if past + new > room:
            raise ValueError(f"{past} + {new} positions do not fit in {room}")
        at = slice(past, past + new) if positions is None else positions
        rope = Rope(self.rope_cos[at].unsqueeze(-2), self.rope_sin[at].unsqueeze(-2))
        mask = None
        if past and new > 1:
            mask = torch.full((new, past + new), -math.inf, device=ids.device).triu(past + 1)
        elif 1 < new <= BLOCKWISE and ids.device.type == "cpu":
            mask = self.future[:new, :new]
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length = past + new
        return self.model.norm(x)  # type: ignore[no-any-return]

    def forward(
        self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits in fp32, (B, T) -> (B, T, V), or (B, 1, V) with `last_only`, which skips the head elsewhere."""
        x = self.hidden(ids, cache, positions)
        return F.linear(x[:, -1:] if last_only else x, self.head_weight()).float()

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Cache:
        """An empty cache of this model's device and dtype, `max_position_embeddings` long unless told."""
        weight = self.model.embed_tokens.weight
        length = max_length or self.config.max_position_embeddings
        return Cache(self.config, batch, length, device=weight.device, dtype=weight.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair (i, i + D/2) of (B, T, H, D) by its angle, in fp32 (Su et al. 2021, arXiv:2104.09864)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (B, H, T, D), twice (B, K, S, D) -> (B, H, T, D).

    `mask` (T, S) is added to the scores. Without one a single query sees every key, and several see causally (S = T).
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    if T == 1:  # the heads of a group become rows of one product, so that no key is read twice
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v).reshape(B, H, T, D)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K != H)
    return blockwise(q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1), mask)


def blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Causal attention by plain matrix products, 128 queries at a time against the keys up to the last of them.

    Forward and backward at T = 256 take 11 ms where torch's CPU kernel takes 31 (bf16, compiled; 6 heads of 64, 8 rows,
    one core with AVX512-BF16), 16 ms uncompiled, and 25 against 30 in fp32. The weights are kept for the backward pass,
    which is why it is only for T up to `BLOCKWISE`.
    """
    q = q * q.shape[-1] ** -0.5
    past, rows = k.shape[2] - q.shape[2], []
    for start in range(0, q.shape[2], 128):
        stop = min(start + 128, q.shape[2])
        seen = past + stop
        scores = (q[:, :, start:stop] @ k[:, :, :seen].transpose(-1, -2)).float() + mask[start:stop, :seen]
        rows.append(scores.softmax(-1).to(v.dtype) @ v[:, :, :seen])  # (B, H, 128, D)
    return torch.cat(rows, dim=2)


def rotary_angles(config: Config) -> Tensor:
    """The angle of every position and pair, (max_position_embeddings, D/2) fp32, always on the CPU.

    Frequencies are computed in fp32 in transformers' order of operations, so that the two agree bit for bit.
    """
    size = config.head_dim
    pairs = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (pairs / size))
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        # Llama 3.1: keep waves shorter than `short`, divide those longer than `long`, blend between the two.
        waves = 2 * math.pi / frequencies
        original, low, high = (
            scaling.original_max_position_embeddings,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        blend = ((original / waves - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    return torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu").outer(frequencies)
