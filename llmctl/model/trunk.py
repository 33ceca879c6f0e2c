"""A stack of blocks with its embeddings and its last norm, and what it tells them of positions and of who sees whom."""

# B batch, T time, S past and new time together, C channels, H heads, D head size

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model import rotary
from llmctl.model.config import FULL, SLIDING, Config
from llmctl.model.rotary import Rope
from llmctl.model.sublayers import BLOCKWISE, Block, Cache, embedding, norm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HIDDEN = -1e30  # added to scores that do not count; finite, so that a row of padding alone gives numbers, not NaN
FLEX = {"cuda"}  # devices on which FlexAttention is compiled; on a CPU it has no backward pass
TABLE = 8192  # positions whose rotations are kept; those beyond are computed when they come

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # row, head, query, key -> whether it is seen


class Trunk(nn.Module):
    """Embeddings, blocks and the last norm: everything but the head.

    With `layers` it is one stack of an encoder-decoder, which embeds its tokens itself.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    local_cos: Tensor
    local_sin: Tensor
    future: Tensor

    def __init__(self, config: Config, *, causal: bool, layers: int = 0, cross: bool = False) -> None:
        super().__init__()
        self.config, self.causal, self.cross = config, causal, cross
        if not layers:
            self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
            if config.positions == "learned":
                self.embed_positions = embedding(config.max_position_embeddings, config.hidden_size)
            if config.type_vocab_size:
                self.embed_token_types = embedding(config.type_vocab_size, config.hidden_size)
            if config.embedding_norm:
                self.embed_norm = norm(config)
        if config.positions == "relative":
            self.relative_bias = embedding(config.relative_attention_num_buckets, config.num_attention_heads)
        depth = layers or config.num_hidden_layers
        self.layers = nn.ModuleList(Block(config, layer, causal=causal, cross=cross) for layer in range(depth))
        if config.norm_place != "post":
            self.norm = norm(config)
        kept = min(config.max_position_embeddings, TABLE)
        if config.positions == "rotary":
            for name, local in [("rope", False), *([("local", True)] if config.rope_local_theta is not None else [])]:
                cos, sin = rotary.table(config, kept, local=local)
                self.register_buffer(f"{name}_cos", cos, persistent=False)
                self.register_buffer(f"{name}_sin", sin, persistent=False)
        longest = min(config.max_position_embeddings, BLOCKWISE) if causal else 0
        future = torch.full((longest, longest), -math.inf, device="cpu").triu(1)  # hides what comes later
        self.register_buffer("future", future, persistent=False)

    @property
    def blocks(self) -> Iterator[Block]:
        """`layers` with their type."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """The normed states, (B, T) -> (B, T, C); see `Decoder.hidden` for the arguments."""
        past, new = (0 if cache is None else cache.length), ids.shape[1]
        if mask is not None and positions is None and self.causal:
            positions = (mask.long().cumsum(1)[:, -new:] - 1).clamp(min=0)
        room = self.config.max_position_embeddings - self.config.position_offset
        room = min(room, cache.max_length) if cache is not None else room
        if past + new > room and self.config.positions != "relative":
            raise ValueError(f"{past} + {new} positions do not fit in {room}")
        return self.run(self.embed(ids, past, positions, mask, token_types), cache, positions, mask, documents)

    def embed(
        self, ids: Tensor, past: int, positions: Tensor | None, mask: Tensor | None, token_types: Tensor | None
    ) -> Tensor:
        """Tokens, and what is added to them: (B, T) -> (B, T, C)."""
        c = self.config
        x = self.embed_tokens(ids)
        if c.embedding_scale != 1.0:
            x = x * torch.tensor(c.embedding_scale, dtype=x.dtype)  # rounded to the weights' dtype, as Gemma's is
        if c.type_vocab_size:
            x = x + self.embed_token_types(torch.zeros_like(ids) if token_types is None else token_types)
        if c.positions == "learned":
            at = torch.arange(past, past + ids.shape[1], device=ids.device) if positions is None else positions
            if c.position_offset and mask is not None:  # RoBERTa counts what is no padding, and padding stands at 0
                real = mask[:, -ids.shape[1] :]
                at = torch.where(real, mask.long().cumsum(1)[:, -ids.shape[1] :] - 1, -1)
            x = x + self.embed_positions(at + c.position_offset)
        if c.embedding_norm:
            x = self.embed_norm(x)
        return F.dropout(x, c.dropout, self.training) if c.embedding_norm else x

    def run(
        self,
        x: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        memory: list[tuple[Tensor, Tensor]] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Embedded tokens through the blocks and the last norm, (B, T, C) -> (B, T, C)."""
        past, new = (0 if cache is None else cache.length), x.shape[1]
        masks, ropes = self.masks(x, past, mask, documents), self.ropes(past, new, positions)
        for index, block in enumerate(self.blocks):
            read = memory[index] if memory is not None else None
            x = block(x, ropes.get(block.kind), masks[block.kind], cache, read, hidden)
        if cache is not None:
            cache.length = past + new
        return self.norm(x) if self.config.norm_place != "post" else x

    def ropes(self, past: int, new: int, positions: Tensor | None) -> dict[str, Rope]:
        """The rotations of the tokens at hand, by layer type."""
        c = self.config
        if c.positions != "rotary":
            return {}
        at: slice | Tensor = slice(past, past + new) if positions is None else positions
        stretched = c.rope_scaling is not None and c.rope_scaling.kind == "dynamic"
        if past + new > len(self.rope_cos) or (stretched and past + new > _trained(c)):
            cos, sin = (part.to(self.rope_cos.device) for part in rotary.table(c, past + new))
        else:
            cos, sin = self.rope_cos, self.rope_sin
        full = Rope(cos[at].unsqueeze(-2), sin[at].unsqueeze(-2))
        if c.rope_local_theta is None:
            return {FULL: full, SLIDING: full}
        if past + new > len(self.local_cos):
            cos, sin = (part.to(self.local_cos.device) for part in rotary.table(c, past + new, local=True))
        else:
            cos, sin = self.local_cos, self.local_sin
        return {FULL: full, SLIDING: Rope(cos[at].unsqueeze(-2), sin[at].unsqueeze(-2))}

    def masks(
        self, x: Tensor, past: int, mask: Tensor | None, documents: Tensor | None
    ) -> dict[str, Tensor | BlockMask | None]:
        """What the layers of each type add to their scores: (T, S), (B, 1, T, S) or (B, H, T, S), fp32.

        None where `attention` needs no telling: a single new token, or all of a text at once. On a GPU, windows and
        documents are BlockMasks: what lies outside them is not computed at all.
        """
        c, new, device = self.config, x.shape[1], x.device
        total = past + new
        reach = c.sliding_window if SLIDING in c.layer_types else None
        slides = reach is not None and total > (reach if self.causal else reach + 1)
        plain: Tensor | None = None
        if mask is None and documents is None and c.positions != "relative":
            if new > 1 and self.causal:
                if past:
                    plain = torch.full((new, total), -math.inf, device=device).triu(past + 1)
                elif new <= len(self.future) and device.type == "cpu":
                    plain = self.future[:new, :new]
            if not slides or (new == 1 and self.causal):
                return {FULL: plain, SLIDING: plain}
        sparse = (slides or documents is not None) and c.positions != "relative"
        if device.type in FLEX and sparse and past == 0 and new > 1:
            full = self.block_mask(x, mask, documents, None)
            return {FULL: full, SLIDING: full if reach is None else self.block_mask(x, mask, documents, reach)}
        rows = torch.arange(len(x), device=device)[:, None, None, None]
        q, k = torch.arange(past, total, device=device)[:, None], torch.arange(total, device=device)
        bias = self.bias(past, new) if c.positions == "relative" else 0.0

        def added(reach: int | None) -> Tensor:
            visible = self.sees(mask, documents, reach)(rows, rows, q, k)  # (T, S) or (B, 1, T, S)
            return torch.where(visible, 0.0, HIDDEN) + bias

        everything = added(None) if plain is None else plain
        return {FULL: everything, SLIDING: everything if reach is None else added(reach)}

    def sees(self, mask: Tensor | None, documents: Tensor | None, reach: int | None) -> Sees:
        """The rule by which a query sees a key, for indices of row, head, query and key that broadcast."""

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = k <= q if self.causal else (k >= 0) & (q >= 0)
            if mask is not None:
                seen = seen & mask[b, k].bool()
            if documents is not None:
                seen = seen & (documents[b, q] == documents[b, k])
            if reach is not None:
                seen = seen & ((q - k < reach) if self.causal else ((q - k).abs() <= reach))
            return seen

        return sees

    def block_mask(self, x: Tensor, mask: Tensor | None, documents: Tensor | None, reach: int | None) -> BlockMask:
        """`sees` for FlexAttention, which finds the blocks of pairs that are empty."""
        from torch.nn.attention.flex_attention import create_block_mask

        each = x.shape[0] if mask is not None or documents is not None else None
        sees = self.sees(mask, documents, reach)
        return create_block_mask(sees, each, None, x.shape[1], x.shape[1], device=x.device.type)

    def bias(self, past: int, new: int) -> Tensor:
        """T5's bias by distance, (1, H, T, S)."""
        device = self.relative_bias.weight.device
        distance = torch.arange(past + new, device=device) - torch.arange(past, past + new, device=device)[:, None]
        bucket = buckets(self.config, distance, causal=self.causal)
        found: Tensor = self.relative_bias(bucket)
        return found.permute(2, 0, 1)[None].float()


def buckets(config: Config, distance: Tensor, *, causal: bool) -> Tensor:
    """The row of T5's table of biases for each distance of a key from its query, int64.

    Small distances have rows of their own, others share them in logarithmic buckets up to a largest one (Raffel et al.
    2020, arXiv:1910.10683, section 2.1; transformers' `_relative_position_bucket`). `causal`: all ahead is at 0.
    """
    count, offset = config.relative_attention_num_buckets, torch.zeros_like(distance)
    if causal:
        distance = -distance.clamp(max=0)
    else:
        count //= 2
        offset, distance = (distance > 0) * count, distance.abs()
    exact = count // 2
    far = (distance.clamp(min=1).float() / exact).log() / math.log(config.relative_attention_max_distance / exact)
    bucket = torch.where(distance < exact, distance, exact + (far * (count - exact)).long())
    return bucket.clamp(max=count - 1) + offset


def _trained(config: Config) -> int:
    assert config.rope_scaling is not None
    return config.rope_scaling.original_max_position_embeddings
