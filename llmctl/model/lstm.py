"""The recurrent baseline: an embedding, a stack of LSTM layers and a head, under the methods of a decoder.

Each layer is the LSTM of Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as torch.nn.LSTM
computes it, under torch's own parameter names; dropout falls on what moves up a layer, never on what moves on in time
(Zaremba et al. 2014, arXiv:1409.2329). A text begins with a state of zeros, and so does every sequence in training.
Nothing resets the state in between: in packed sequences it goes on past the end of a document, as attention without a
document mask does, and learning what </s> and <s> mean is left to the model.

There is no such model in the ecosystem: the folder is llmctl's own, and transformers does not load it.
"""

# B batch, T time, C channels, L layers, V vocabulary

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model.config import Config
from llmctl.model.sublayers import embedding

# torch.nn.Embedding's. As small as a transformer's it is no signal to gates that add up what they read: the same 60
# steps of recipes/tiny.toml end at 3.0 bits a byte with 0.1, at 2.4 with 1.
EMBEDDING_STD = 1.0


class State:
    """What the layers remember of the positions seen so far; its size does not grow with them."""

    def __init__(
        self, config: Config, batch: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.hidden_size)
        self.h = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, C), what a layer puts out
        self.c = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, C), its memory
        self.max_length = max_length
        self.length = 0  # positions read

    def select(self, rows: Tensor) -> State:
        """A copy whose row i goes on from row rows[i]; rows (N,) int64."""
        chosen = copy.copy(self)
        chosen.h, chosen.c = self.h[:, rows], self.c[:, rows]
        return chosen


class Trunk(nn.Module):
    """Everything but the head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, layers = config.hidden_size, config.num_hidden_layers
        between = config.dropout if layers > 1 else 0.0  # nn.LSTM warns of dropout that falls nowhere
        self.embed_tokens = embedding(config.vocab_size, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=between)


class LSTM(nn.Module):
    """A causal language model. With tied embeddings there is no `lm_head` module, so every tensor is stored once.

    The constructor leaves the weights as torch.nn's defaults; `LSTM.random` draws them from a seed, `hf.load` reads
    them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def random(cls, config: Config, seed: int) -> LSTM:
        """A fresh model in fp32 on the CPU; the same seed draws the same weights, whatever else the process draws.

        The distributions are torch.nn's own: normal for the embedding, uniform within 1 / sqrt(C) for the rest.
        """
        with torch.device("meta"):
            model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(config.hidden_size)

        def draw(name: str, shape: torch.Size) -> Tensor:
            if "embed_tokens" in name:
                return torch.empty(shape).normal_(0.0, EMBEDDING_STD, generator=generator)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        state = {name: draw(name, tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return model

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits: the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: State | None = None) -> Tensor:
        """The states before the head, (B, T) -> (B, T, C), for a loss that never holds all the logits.

        Args:
            ids: (B, T) int64; rows that are shorter are filled up on the right, where nothing reads them.
            cache: the state to go on from; it moves on past the new tokens.

        Raises:
            ValueError: more positions than the context, which training and serving keep to, or than the cache allows.
        """
        past, new = cache.length if cache is not None else 0, ids.shape[1]
        longest = self.config.max_position_embeddings
        room = min(longest, cache.max_length if cache is not None else longest)
        if past + new > room:
            raise ValueError(f"{past} + {new} positions do not fit in {room}")
        x = F.dropout(self.model.embed_tokens(ids), self.config.dropout, self.training)
        if cache is None:
            x, _ = self.model.lstm(x)
        elif new == 1 and not self.training:
            x = self._step(x[:, 0], cache)[:, None]
        else:
            x, (cache.h, cache.c) = self.model.lstm(x, (cache.h, cache.c))
        if cache is not None:
            cache.length = past + new
        return F.dropout(x, self.config.dropout, self.training)

    def _step(self, x: Tensor, cache: State) -> Tensor:
        """One token, (B, C) -> (B, C), layer by layer: 2 to 5 times as fast on a CPU as nn.LSTM, whose kernel packs
        the weights anew at every call.
        """
        h, c = [], []
        for layer, weights in enumerate(self.model.lstm.all_weights):
            x, memory = torch.lstm_cell(x, (cache.h[layer], cache.c[layer]), *weights)
            h.append(x)
            c.append(memory)
        cache.h, cache.c = torch.stack(h), torch.stack(c)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """States to logits in fp32, (..., C) -> (..., V)."""
        return F.linear(x, self.head_weight()).float()

    def forward(self, ids: Tensor, cache: State | None = None, last_only: bool = False) -> Tensor:
        """Logits in fp32, (B, T) -> (B, T, V), or (B, 1, V) with `last_only`, which skips the head elsewhere."""
        x = self.hidden(ids, cache)
        return self.logits(x[:, -1:] if last_only else x)

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> State:
        """A state of zeros of this model's device and dtype, for `max_position_embeddings` positions unless told."""
        weight = self.model.embed_tokens.weight
        length = max_length or self.config.max_position_embeddings
        return State(self.config, batch, length, device=weight.device, dtype=weight.dtype)
