"""What training minimises: the summed loss of a micro-batch, in nats, so that its parts can be added up exactly.

The kind of the model decides: a decoder (or an LSTM) learns the next token, an encoder the tokens that were masked, an
encoder-decoder the spans that were cut out.
"""

# B batch, T time, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.errors import DataError
from llmctl.model.config import Config
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import corruption
from llmctl.training.batch import IGNORED, Batch, Ids

Loss = Callable[..., Tensor]  # model, the inputs of a batch, its labels -> ()


@dataclass(frozen=True)
class Objective:
    """What a kind of model learns from windows of text."""

    name: str
    frame: Callable[[Ids, int, int], Batch]  # windows (B, T + 1), seed, the loader's position after them
    marks: Mapping[int, str] = field(default_factory=dict)  # what stands for hidden text, by id
    is_causal: bool = False


def of(config: Config, tokenizer: Tokenizer) -> Objective:
    """The objective that goes with a model of this kind.

    Raises:
        DataError: the vocabulary has no mask, or no sentinels; or an encoder without the head that predicts tokens.
        RecipeError: windows with more spans than there are sentinels.
    """
    if config.kind == "encoder":
        return _masking(config, tokenizer)
    if config.kind == "encoder-decoder":
        return _corruption(config, tokenizer)
    return Objective(
        "the next token", lambda rows, _, after: Batch((rows[:, :-1],), rows[:, 1:], after), is_causal=True
    )


def _masking(config: Config, tokenizer: Tokenizer) -> Objective:
    if config.task != "masked-lm":
        raise DataError(
            f"this encoder's head is for {config.task}; text teaches one that predicts masked tokens",
            hint="start from a masked language model, or leave [model] from out",
        )
    mark = tokenizer.special_names.get("mask_token", "<mask>")
    mask_id = tokenizer.special(mark)
    special = np.array(sorted(tokenizer.special_ids))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        samples = range(after - len(rows), after)
        pairs = [
            corruption.mask(row, corruption.generator(seed, at), mask_id=mask_id, special=special, ordinary=ordinary)
            for row, at in zip(rows[:, :-1], samples, strict=True)
        ]
        read, labels = (np.stack(part) for part in zip(*pairs, strict=True))
        return Batch((read,), labels, after)

    return Objective("masked tokens", frame, {mask_id: mark})


def _corruption(config: Config, tokenizer: Tokenizer) -> Objective:
    marks, eos, start = sentinels(tokenizer), tokenizer.eos_id, config.decoder_start_token_id
    if eos is None or start is None:
        what = "an end-of-text token" if eos is None else "a decoder_start_token_id"
        raise DataError(f"an encoder-decoder needs {what}", hint="use a tokenizer made by llmctl prep")
    corruption.check_sentinels(config.longest, len(marks))
    ids = np.array(list(marks))

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        samples = range(after - len(rows), after)
        pairs = [
            corruption.spans(row, corruption.generator(seed, at), sentinels=ids, eos=eos)
            for row, at in zip(rows[:, :-1], samples, strict=True)
        ]
        read, labels = (np.stack(part) for part in zip(*pairs, strict=True))
        return Batch((read, shifted(labels, start)), labels, after)

    return Objective("cut-out spans", frame, marks)


def sentinels(tokenizer: Tokenizer) -> dict[int, str]:
    """<extra_id_0>, <extra_id_1> and so on by id, in this order: in T5's own vocabulary their ids fall."""
    known, names = set(tokenizer.specials), ["<extra_id_0>"]
    while (name := f"<extra_id_{len(names)}>") in known:
        names.append(name)
    return {tokenizer.special(name): name for name in names}


def shifted(labels: Ids, start: int) -> Ids:
    """What the decoder reads to say `labels`, (B, T) -> (B, T): the start token and all labels but the last."""
    return np.concatenate((np.full_like(labels[:, :1], start), labels[:, :-1]), axis=1)


def loss(model: nn.Module, *tensors: Tensor) -> Tensor:
    """Cross-entropy summed over the supervised labels: the inputs of a batch, then its labels -> ().

    labels[:, t] is what the model has to say at position t of its last input. Logits are compared in fp32 under
    autocast too.
    """
    *inputs, labels = tensors
    logits = model(*inputs)  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
