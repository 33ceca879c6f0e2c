"""A model grows with its vocabulary: rows for new pieces, made of the rows of what they were spelled with before."""

from __future__ import annotations

import dataclasses

import torch

from llmctl.errors import DataError
from llmctl.model import hf
from llmctl.model.hf import Model
from llmctl.text import extension
from llmctl.text.tokenizer import Tokenizer

PER_PIECE = ("embed_tokens.weight", "lm_head.weight", "head.decoder.weight", "head.bias")  # one row a piece


def grow(model: Model, base: Tokenizer, extended: Tokenizer) -> Model:
    """The model for `extended`, an extension of its tokenizer `base`; everything it had keeps its values.

    A new piece's embedding, and its row of an untied head, is the mean of the rows of its pieces in `base`, so that a
    text in which it stands first reads about as it did (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models", recommends the mean of all rows; that of the parts is nearer to the word). Rows of padding at the
    end of the embedding are used first.

    Raises:
        DataError: `extended` is another tokenizer.
    """
    made_of = extension.parts(base, extended)
    if made_of is None:
        raise DataError("the tokenizer is no extension of the model's own")
    config = model.config
    rows = max(config.vocab_size, len(extended))
    grown = hf.build(dataclasses.replace(config, vocab_size=rows))
    counts = torch.tensor([len(ids) for ids in made_of])
    state = dict(model.state_dict())
    for name, old in state.items():
        if name.endswith(PER_PIECE) and old.shape[0] == config.vocab_size:
            new = torch.zeros(rows, *old.shape[1:], dtype=old.dtype, device=old.device)
            new[: len(old)] = old
            flat = old[torch.tensor([index for ids in made_of for index in ids], device=old.device)].float()
            sums = torch.zeros(len(made_of), *old.shape[1:], device=old.device)
            sums.index_add_(0, torch.arange(len(made_of)).repeat_interleave(counts).to(old.device), flat)
            means = sums / counts.to(old.device).reshape(-1, *[1] * (old.dim() - 1))
            new[len(base) : len(extended)] = means.to(old.dtype)
            state[name] = new
    grown.load_state_dict(state, assign=True)
    return grown.to(model.device).train(model.training)
