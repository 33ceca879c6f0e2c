"""What the blocks of a transformer are made of: norms, attention, feed-forward, and the block that joins them.

Each switch of `Config` chooses here what a sublayer is; `transformer.py` says how blocks become models. Norms and
softmax are computed in fp32 whatever the weights' dtype, as in transformers.
"""

# B batch, T time, S past and new time together, C channels, H heads, K key/value heads, D head size

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.config import SLIDING, Config
from llmctl.model.rotary import Rope, rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCKWISE = 1024  # the longest text that `blockwise` attends to on a CPU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
}


class Cache:
    """Keys and values of the positions seen so far, in buffers of a fixed length, so that appending moves nothing.

    An encoder-decoder also keeps what its cross-attention reads: `memory`, a (key, value) pair a layer, and `hidden`,
    (B, 1, 1, S), which hides the source's padding.
    """

    def __init__(
        self, config: Config, batch: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers = config.num_decoder_layers or config.num_hidden_layers
        shape = (layers, batch, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (L, B, K, max_length, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0  # positions held; the model advances it when every layer has appended
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.hidden: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, D) behind what is held; returns all of it, (B, K, S, D), as views."""
        past, total = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, past:total] = k
        self.values[layer, :, :, past:total] = v
        return self.keys[layer, :, :, :total], self.values[layer, :, :, :total]

    def select(self, rows: Tensor) -> Cache:
        """A copy whose row i goes on from row rows[i]."""
        made, (L, _, *row) = copy.copy(self), self.keys.shape
        made.keys, made.values = self.keys.new_empty(L, len(rows), *row), self.values.new_empty(L, len(rows), *row)
        made.keys[:, :, :, : self.length] = self.keys[:, rows, :, : self.length]
        made.values[:, :, :, : self.length] = self.values[:, rows, :, : self.length]
        made.memory = [(k[rows], v[rows]) for k, v in self.memory]
        made.hidden = None if self.hidden is None else self.hidden[rows]
        return made


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467); the mean is taken in fp32.

    With `offset` the gain is 1 + weight, applied in fp32, as Gemma's is.
    """

    def __init__(self, size: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table whose values are anyone's guess: drawing them on torch's meta device would import torch's compiler, which
    takes a second and 150 MB.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def norm(config: Config, size: int | None = None) -> nn.Module:
    """The norm of a family, over the stream unless `size` says otherwise."""
    size = config.hidden_size if size is None else size
    if config.norm == "layer":
        return nn.LayerNorm(size, config.norm_eps, bias=config.norm_bias)
    return RMSNorm(size, config.norm_eps, config.norm_offset)


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    def __init__(self, config: Config, layer: int, *, causal: bool) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.layer, self.head_dim, self.qk_norm, self.causal = layer, size, config.qk_norm, causal
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        self.window = config.sliding_window if config.layer_type(layer) == SLIDING else None
        self.qkv_proj: nn.Module | None = None  # the next three in one, where `packed.pack` has joined them
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=config.attention_output_bias)
        if self.qk_norm:
            self.q_norm = norm(config, size)
            self.k_norm = norm(config, size)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | BlockMask | None, cache: Cache | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        if self.qkv_proj is not None:
            q, k, v = torch.split(self.qkv_proj(x).view(heads), self.heads, 2)
        else:
            q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)  # before the rotation, as Qwen3 does
        if rope is not None:
            q, k = torch.split(rotate(torch.cat((q, k), 2), rope), self.heads[:2], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.window is not None and q.shape[2] == 1 and mask is None and self.causal:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        mixed = attention(q, k, v, mask, causal=self.causal, scale=self.scale, softcap=self.softcap)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention of a decoder to what the encoder gave."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim, self.scale = size, config.attention_scale
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=config.attention_output_bias)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (B, S, C), each (B, K, S, D); computed once a text."""
        heads = (*memory.shape[:2], -1, self.head_dim)
        k, v = self.k_proj(memory).view(heads), self.v_proj(memory).view(heads)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q = self.q_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        mixed = attention(q, *memory, mask, causal=False, scale=self.scale, softcap=None)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """The feed-forward; gated (Shazeer 2020, arXiv:2002.05202) where the family's is."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated, self.act = config.gated, ACTIVATIONS[config.hidden_act]
        self.gate_up_proj: nn.Module | None = None  # the first two of a gated one, where `packed.pack` has joined them
        if self.gated:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            inner = self.act(gate) * up
        else:
            inner = self.act(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act(self.up_proj(x))
        out: Tensor = self.down_proj(inner)
        return out


class Block(nn.Module):
    """Attention, cross-attention where there is a memory, then the feed-forward, each added to the stream.

    `norm_place` says which norms there are. Dropout falls on what is added.
    """

    def __init__(self, config: Config, layer: int, *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.place, self.dropout, self.kind = config.norm_place, config.dropout, config.layer_type(layer)
        self.cross, reads, gives = cross, config.norm_place != "post", config.norm_place != "pre"
        if reads:
            skipped = config.skip_first_norm and layer == 0
            self.input_layernorm = nn.Identity() if skipped else norm(config)
        self.self_attn = Attention(config, layer, causal=causal)
        self.post_attention_layernorm = norm(config)  # "pre": before the feed-forward, the name is Llama's
        if cross:
            self.cross_attn_layernorm = norm(config)
            self.cross_attn = CrossAttention(config)
        if self.place == "both":
            self.pre_feedforward_layernorm = norm(config)
        self.mlp = MLP(config)
        if gives:
            self.post_feedforward_layernorm = norm(config)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Tensor | BlockMask | None,
        cache: Cache | None,
        memory: tuple[Tensor, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); `memory` is what cross-attention reads, and `hidden` masks its padding."""
        if self.place == "post":
            x = self.post_attention_layernorm(x + self.drop(self.self_attn(x, rope, mask, cache)))
            return self.post_feedforward_layernorm(x + self.drop(self.mlp(x)))  # type: ignore[no-any-return]
        attended = self.drop(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        if self.place == "both":
            x = x + self.post_attention_layernorm(attended)
            mixed = self.drop(self.mlp(self.pre_feedforward_layernorm(x)))
            return x + self.post_feedforward_layernorm(mixed)  # type: ignore[no-any-return]
        x = x + attended
        if memory is not None:
            x = x + self.drop(self.cross_attn(self.cross_attn_layernorm(x), memory, hidden))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training else x


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v: (B, H, T, D), twice (B, K, S, D) -> (B, H, T, D).

    `mask` (T, S), (B, 1, T, S) or (B, H, T, S) is added to the scores. Without one a single query sees every key, and
    several see causally (S = T) if `causal`. `scale` is 1 / sqrt(D) unless told; `softcap` bounds the scores (Gemma 2).
    A BlockMask goes to FlexAttention.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        return flexible(q, k, v, mask, scale, softcap)
    if T == 1 and softcap is None and (mask is None or K == H):
        # the heads of a group become rows of one product, so that no key is read twice
        mask = None if mask is None else mask.to(q.dtype).expand(B, H, 1, k.shape[2])
        q = q.reshape(B, K, H // K, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(B, H, T, D)
    if softcap is not None or (
        q.device.type == "cpu" and k.shape[2] <= 2 * BLOCKWISE and (mask is not None or not causal)
    ):
        if mask is None and causal and T > 1:
            mask = torch.full((T, T), -math.inf, device=q.device).triu(1)
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        return blockwise(q, k, v, mask, causal=causal, scale=scale, softcap=softcap)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": K != H}
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1, **options)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), **options)


def flexible(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention that leaves out whole blocks of scores which `mask` hides (Dong et al. 2024, arXiv:2412.05496)."""
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out = flex_attention(q, k, v, None if softcap is None else capped, mask, scale, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention by plain matrix products, 128 queries at a time, causally against the keys up to the last of them.

    Forward and backward at T = 256 take 11 ms where torch's CPU kernel takes 31 (bf16, compiled; 6 heads of 64, 8 rows,
    one core with AVX512-BF16), 16 ms uncompiled, and 25 against 30 in fp32. The weights are kept for the backward pass,
    which is why it is only for T up to `BLOCKWISE`.
    """
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    past, rows = k.shape[2] - q.shape[2], []
    for start in range(0, q.shape[2], 128):
        stop = min(start + 128, q.shape[2])
        seen = past + stop if causal else k.shape[2]
        scores = (q[:, :, start:stop] @ k[:, :, :seen].transpose(-1, -2)).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + (mask[..., start:stop, :seen] if mask.shape[-2] > 1 else mask[..., :seen])
        rows.append(scores.softmax(-1).to(v.dtype) @ v[:, :, :seen])  # (B, H, 128, D)
    return torch.cat(rows, dim=2)
