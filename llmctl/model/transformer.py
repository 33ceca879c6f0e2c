"""One transformer with switches: decoder, encoder and encoder-decoder, under Llama's parameter names.

The forward is architecture only: no loss, no sampling, no packing. A switch of `Config` chooses a sublayer (a norm, an
activation, a way to tell positions); the three dataflows are the three classes at the end. What the tensors are called
on disk is `families/`'s business.

Numerics follow transformers (tests/parity): norms, rotations and softmax are computed in fp32 whatever the weights'
dtype.
"""

# B batch, T time, S past and new time together, C channels, H heads, K key/value heads, D head size, V vocabulary

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.config import Config
from llmctl.model.sublayers import ACTIVATIONS, Cache, embedding, norm
from llmctl.model.trunk import HIDDEN, Trunk

if TYPE_CHECKING:
    pass

INIT_STD = 0.02  # GPT-2's; outputs into the residual stream get it divided by sqrt(2L), as there (Radford et al. 2019)

M = TypeVar("M", bound=nn.Module)


# -------------------------------------------------------------------------------------------------------- dataflows


class Decoder(nn.Module):
    """A causal language model. With tied embeddings there is no `lm_head` module, so every tensor is stored once.

    The constructor leaves the weights as torch.nn's defaults; `random` draws them from a seed, `hf.load` reads them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, causal=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_proj: nn.Module | None = None  # the head as `packed.pack` has laid it out

    @classmethod
    def random(cls, config: Config, seed: int) -> Decoder:
        """See `randomized`."""
        return randomized(cls, config, seed)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The normed states before the head, (B, T) -> (B, T, C), for a loss that never holds all the logits.

        Args:
            ids: (B, T) int64.
            cache: what came before; the new keys and values are appended to it.
            positions: (T,) or (B, T) where the tokens stand, if not right behind the cache; below S.
            mask: (B, S) bool, false at padding of past and new tokens; positions then count what is true.
            documents: (B, T) int64 for packed sequences: tokens see only those of the same number.

        Raises:
            ValueError: more positions than the model or the cache holds.
        """
        return self.model(ids, cache, positions, mask=mask, documents=documents)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """States to logits in fp32, (..., C) -> (..., V)."""
        found = (F.linear(x, self.head_weight()) if self.head_proj is None else self.head_proj(x)).float()
        cap = self.config.final_logit_softcapping
        return found if cap is None else cap * torch.tanh(found / cap)

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits in fp32, (B, T) -> (B, T, V), or (B, 1, V) with `last_only`, which skips the head elsewhere."""
        x = self.hidden(ids, cache, positions, mask=mask)
        return self.logits(x[:, -1:] if last_only else x)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Cache:
        """An empty cache of this model's device and dtype, `max_position_embeddings` long unless told."""
        weight = self.model.embed_tokens.weight
        length = max_length or self.config.max_position_embeddings
        return Cache(self.config, batch, length, device=weight.device, dtype=weight.dtype)


class Head(nn.Module):
    """What a task makes of the states: a transform where the family has one, then labels or vocabulary.

    The masked-LM head's matrix is the embedding; its bias is stored here.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.head_transform:
            self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_bias)
        if config.head_transform == "norm":
            self.norm = norm(config)
        if config.task == "masked-lm":
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            if not config.tie_word_embeddings:
                self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        elif config.task != "embedding":
            scores = config.kind == "decoder" and config.task == "sequence-classification"
            labels = 2 if config.task == "question-answering" else config.num_labels
            self.classifier = nn.Linear(config.hidden_size, labels, bias=not scores)

    def transform(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if self.config.head_transform == "pooler":
            x = torch.tanh(self.dense(x))
        elif self.config.head_transform == "norm":
            x = self.norm(ACTIVATIONS[self.config.head_act](self.dense(x)))
        return F.dropout(x, self.config.dropout, self.training)


class Encoder(nn.Module):
    """A model that is read as a whole: masked LM, classification, spans, embeddings.

    Its trunk sees both ways, or, where the family is a decoder's (embedding models on Qwen3), only back.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, causal=config.kind == "decoder")
        self.head = Head(config)

    @classmethod
    def random(cls, config: Config, seed: int) -> Encoder:
        """See `randomized`."""
        return randomized(cls, config, seed)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The last states, (B, T) -> (B, T, C).

        Args:
            ids: (B, T) int64.
            mask: (B, T) bool, false at padding.
            token_types: (B, T) int64, which text of a pair a token belongs to; zeros if left out.
            documents: (B, T) int64 for packed sequences: tokens see only those of the same number.
        """
        return self.model(ids, mask=mask, documents=documents, token_types=token_types)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """Masked LM: states to logits in fp32, (..., C) -> (..., V)."""
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.head.decoder.weight
        return F.linear(self.head.transform(x), weight, self.head.bias).float()

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """What the task asks for, in fp32.

        masked-lm (B, T, V); sequence-classification (B, labels); token-classification (B, T, labels);
        question-answering (B, T, 2), scores of the span's first and last token; embedding (B, C), of length 1.
        """
        x, task = self.hidden(ids, mask=mask, token_types=token_types), self.config.task
        if task == "masked-lm":
            return self.logits(x)
        if task == "embedding":
            return F.normalize(self.pool(x, mask).float(), dim=-1)
        if task == "sequence-classification":
            x = self.pool(x, mask)
        scores: Tensor = self.head.classifier(self.head.transform(x))
        return scores.float()

    def pool(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector a sequence, (B, T, C) -> (B, C): the first token's, the last one's, or the mean of all."""
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.config.pooling == "cls":
            return x[:, 0]
        if self.config.pooling == "last":
            last = (mask * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
            return x[torch.arange(len(x), device=x.device), last]
        weights = mask.to(x.dtype)[:, :, None]
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class EncoderDecoder(nn.Module):
    """A text in, another out: T5 (Raffel et al. 2020, arXiv:1910.10683)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.encoder = Trunk(config, causal=False, layers=config.num_hidden_layers)
        self.decoder = Trunk(config, causal=True, layers=config.num_decoder_layers, cross=True)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_proj: nn.Module | None = None  # the head as `packed.pack` has laid it out

    @classmethod
    def random(cls, config: Config, seed: int) -> EncoderDecoder:
        """See `randomized`."""
        return randomized(cls, config, seed)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the decoder reads: (B, S) -> (B, S, C); `mask` (B, S) bool is false at padding."""
        x = F.dropout(self.embed_tokens(ids), self.config.dropout, self.training)
        return self.encoder.run(x, mask=mask)

    def read(self, cache: Cache, memory: Tensor, mask: Tensor | None = None) -> None:
        """Puts what cross-attention reads of (B, S, C) into a cache, where decoding steps find it."""
        cache.memory = [block.cross_attn.read(memory) for block in self.decoder.blocks]
        cache.hidden = _hidden(mask)

    def states(
        self, decoder_ids: Tensor, memory: Tensor | None, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The decoder's states before the head, (B, T) -> (B, T, C), scaled as the head wants them.

        Args:
            decoder_ids: (B, T) int64, the first of them `decoder_start_token_id`.
            memory: of `encode`; None where `cache` has read it.
            mask: (B, S) bool of the source, false at padding; with `memory`.
        """
        if memory is not None and cache is not None and not cache.memory:
            self.read(cache, memory, mask)
        if cache is not None:
            read = cache.memory
        else:
            assert memory is not None, "decoding needs a memory, or a cache that has read one"
            read = [block.cross_attn.read(memory) for block in self.decoder.blocks]
        hidden = cache.hidden if cache is not None else _hidden(mask)
        x = F.dropout(self.embed_tokens(decoder_ids), self.config.dropout, self.training)
        x = self.decoder.run(x, cache, memory=read, hidden=hidden)
        return x * self.config.logit_scale if self.config.logit_scale != 1.0 else x

    def hidden(self, ids: Tensor, decoder_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Both passes, (B, S), (B, T) -> (B, T, C): the states before the head, for a loss."""
        return self.states(decoder_ids, self.encode(ids, mask), mask=mask)

    def decode(
        self,
        decoder_ids: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits in fp32, (B, T) -> (B, T, V) or (B, 1, V); the arguments are those of `states`."""
        x = self.states(decoder_ids, memory, mask=mask, cache=cache)
        return self.logits(x[:, -1:] if last_only else x)

    def logits(self, x: Tensor) -> Tensor:
        """States to logits in fp32, (..., C) -> (..., V)."""
        return (F.linear(x, self.head_weight()) if self.head_proj is None else self.head_proj(x)).float()

    def forward(self, ids: Tensor, decoder_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Logits of a whole pair, (B, S), (B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids, decoder_ids, mask=mask))

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Cache:
        """An empty cache for the decoder, `max_position_embeddings` long unless told."""
        weight, length = self.embed_tokens.weight, max_length or self.config.max_position_embeddings
        return Cache(self.config, batch, length, device=weight.device, dtype=weight.dtype)


def _hidden(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.where(mask.bool(), 0.0, HIDDEN)[:, None, None, :]


def randomized(cls: type[M], config: Config, seed: int) -> M:
    """A fresh model in fp32 on the CPU; the same seed draws the same weights, whatever else the process draws."""
    with torch.device("meta"):
        model = cls(config)
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD / math.sqrt(2 * config.num_hidden_layers)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            zero = name.endswith("bias") or (config.norm_offset and name.endswith("norm.weight"))
            return torch.zeros(shape) if zero else torch.ones(shape)
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
        if config.positions == "relative" and name.endswith("q_proj.weight"):
            std = std * config.head_dim**-0.5  # what 1 / sqrt(D) does to the scores elsewhere (T5's initialiser)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    state = {name: draw(name, tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model
