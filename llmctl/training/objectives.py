"""What training minimises: the summed loss of a micro-batch, in nats, so that its parts can be added up exactly.

The kind of the model decides: a decoder (or an LSTM) learns the next token, an encoder the tokens that were masked, an
encoder-decoder the spans that were cut out. A decoder may also learn to fill in a middle, or blanks.
"""

# B batch, T time, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.errors import DataError, RecipeError
from llmctl.model.config import Config
from llmctl.model.hf import Model
from llmctl.model.transformer import Decoder, Encoder
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.words import Words
from llmctl.training import corruption
from llmctl.training.batch import IGNORED, Batch, Ids
from llmctl.training.cross_entropy import Chunk, chunk, linear_cross_entropy
from llmctl.training.fim import Middle

Name = Literal["causal", "fim", "infill", "masked", "spans"]
_CAUSAL = ("decoder", "recurrent")
KINDS: dict[Name, tuple[str, ...]] = {  # what each kind of model can learn; the first one that names it is the usual
    "causal": _CAUSAL,
    "fim": _CAUSAL,
    "infill": _CAUSAL,
    "masked": ("encoder",),
    "spans": ("encoder-decoder",),
}
FIM_RATE = 0.5  # of Bavarian et al.'s main experiments, which find 0.9 to cost the left-to-right loss nothing either


@dataclass(frozen=True)
class Objective:
    """What a model learns from windows of text."""

    name: str
    frame: Callable[[Ids, int, int], Batch]  # windows (B, T + 1), seed, the loader's position after them
    marks: Mapping[int, str] = field(default_factory=dict)  # what stands for hidden text, by id
    is_causal: bool = False
    usual: Objective | None = None  # what such models are measured by, if this is not what they usually learn


def of(
    config: Config,
    tokenizer: Tokenizer,
    name: Name | Literal["auto"] = "auto",
    *,
    whole_word: bool = False,
    fim_rate: float = FIM_RATE,
    document_mask: bool = False,
) -> Objective:
    """The objective called `name` for a model of this kind; "auto" is the one that goes with it.

    Args:
        whole_word: masked: the tokens of a word are hidden together.
        fim_rate: fim: share of the documents whose middle is moved to their end.
        document_mask: tokens see only those of their own document.

    Raises:
        DataError: the vocabulary has no mask, no sentinels, no pieces for fill-in-the-middle; or an encoder without the
            head that predicts tokens.
        RecipeError: what this kind of model can't learn; windows with more spans than there are sentinels.
    """
    usual = next(known for known, kinds in KINDS.items() if config.kind in kinds)
    chosen: Name = usual if name == "auto" else name
    _check(config.kind, chosen, whole_word, document_mask)
    end = tokenizer.end_id
    if chosen == "masked":
        found = _masking(config, tokenizer, whole_word)
    elif chosen == "spans":
        found = _corruption(config, tokenizer)
    elif chosen == "causal":
        found = Objective(
            "the next token", lambda rows, _, after: Batch((rows[:, :-1],), rows[:, 1:], after), is_causal=True
        )
    else:
        assert end is not None, "prep's tokens have an end of text"
        found = _middle(tokenizer, fim_rate, end) if chosen == "fim" else _blanks(config, tokenizer, end)
    if document_mask:
        assert end is not None, "prep's tokens have an end of text"
        found = replace(found, name=f"{found.name}, documents apart", frame=_apart(found.frame, end))
    is_usual = chosen == usual and not whole_word and not document_mask
    return found if is_usual else replace(found, usual=of(config, tokenizer))


def _check(kind: str, name: Name, whole_word: bool, document_mask: bool) -> None:
    """Raises RecipeError where the keys of [pretrain] don't go with the model, or with each other."""
    if kind not in KINDS[name]:
        fits = " or ".join(f'"{known}"' for known, kinds in KINDS.items() if kind in kinds)
        raise RecipeError(
            f'[pretrain] objective = "{name}" is nothing that {ARTICLES[kind]} can learn',
            hint=f"objective = {fits}, or another [model] family",
        )
    if whole_word and name != "masked":
        raise RecipeError(
            f"[pretrain] whole_word is about masked tokens; {ARTICLES[kind]} has none", hint="leave the key out"
        )
    if document_mask and (kind in ("recurrent", "encoder-decoder") or name == "infill"):
        why = (
            "blanks are filled behind all documents of a window"
            if name == "infill"
            else f"{ARTICLES[kind]} reads its input as one text"
        )
        raise RecipeError(f"[pretrain] document_mask: {why}", hint="leave the key out")


ARTICLES = {"decoder": "a decoder", "recurrent": "an LSTM", "encoder": "an encoder", "encoder-decoder": "a T5"}


def _each(hide: Callable[[Ids, np.random.Generator], tuple[Ids, Ids]], rows: Ids, seed: int, after: int) -> list[Ids]:
    """What `hide` makes of each row, with the randomness of its sample: what is read, and the labels."""
    samples = range(after - len(rows), after)
    pairs = [hide(row, corruption.generator(seed, at)) for row, at in zip(rows, samples, strict=True)]
    return [np.stack(part) for part in zip(*pairs, strict=True)]


def _masking(config: Config, tokenizer: Tokenizer, whole_word: bool) -> Objective:
    if config.task != "masked-lm":
        raise DataError(
            f"this encoder's head is for {config.task}; text teaches one that predicts masked tokens",
            hint="start from a masked language model, or leave [model] from out",
        )
    mark = tokenizer.special_names.get("mask_token", "<mask>")
    mask_id = tokenizer.special(mark)
    special = np.array(sorted(tokenizer.special_ids))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    words = Words(tokenizer) if whole_word else None
    hide = functools.partial(corruption.mask, mask_id=mask_id, special=special, ordinary=ordinary, words=words)

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        read, labels = _each(hide, rows[:, :-1], seed, after)
        return Batch((read,), labels, after)

    return Objective("masked words" if whole_word else "masked tokens", frame, {mask_id: mark})


def _corruption(config: Config, tokenizer: Tokenizer) -> Objective:
    marks, eos, start = sentinels(tokenizer), tokenizer.eos_id, config.decoder_start_token_id
    if eos is None or start is None:
        what = "an end-of-text token" if eos is None else "a decoder_start_token_id"
        raise DataError(f"an encoder-decoder needs {what}", hint="use a tokenizer made by llmctl prep")
    corruption.check_sentinels(config.longest, len(marks))
    hide = functools.partial(corruption.spans, sentinels=np.array(list(marks)), eos=eos)

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        read, labels = _each(hide, rows[:, :-1], seed, after)
        return Batch((read, shifted(labels, start)), labels, after)

    return Objective("cut-out spans", frame, marks)


def _middle(tokenizer: Tokenizer, rate: float, end: int) -> Objective:
    hide = functools.partial(Middle.of(tokenizer, rate, end).frame, pad=tokenizer.pad_id or 0)

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        read, labels = _each(hide, rows, seed, after)
        return Batch((read,), labels, after)

    return Objective("the next token, middles last", frame, is_causal=True)


def _blanks(config: Config, tokenizer: Tokenizer, end: int) -> Objective:
    marks = sentinels(tokenizer)
    corruption.check_sentinels(corruption.blanks_length(config.longest + 1), len(marks))
    ids = np.array(list(marks))
    hide = functools.partial(corruption.blanks, sentinels=ids, eos=end, pad=tokenizer.pad_id or 0)

    def frame(rows: Ids, seed: int, after: int) -> Batch:
        read, labels = _each(hide, rows, seed, after)
        return Batch((read,), labels, after)

    return Objective("blanks to fill in", frame, marks, is_causal=True)


def _apart(frame: Callable[[Ids, int, int], Batch], end: int) -> Callable[[Ids, int, int], Batch]:
    """The same batches with the number of the document that each token is of: how many have ended before it."""

    def framed(rows: Ids, seed: int, after: int) -> Batch:
        batch = frame(rows, seed, after)
        ended = batch.inputs[0] == end
        return replace(batch, documents=np.cumsum(ended, axis=1) - ended)

    return framed


def sentinels(tokenizer: Tokenizer) -> dict[int, str]:
    """<extra_id_0>, <extra_id_1> and so on by id, in this order: in T5's own vocabulary their ids fall."""
    known, names = set(tokenizer.specials), ["<extra_id_0>"]
    while (name := f"<extra_id_{len(names)}>") in known:
        names.append(name)
    return {tokenizer.special(name): name for name in names}


def shifted(labels: Ids, start: int) -> Ids:
    """What the decoder reads to say `labels`, (B, T) -> (B, T): the start token and all labels but the last."""
    return np.concatenate((np.full_like(labels[:, :1], start), labels[:, :-1]), axis=1)


def loss(
    model: Model,
    *tensors: Tensor,
    documents: Tensor | None = None,
    at: Tensor | None = None,
    taught: Tensor | None = None,
    each: Chunk = chunk,
) -> Tensor:
    """Cross-entropy summed over the supervised labels: the inputs of a batch, then its labels -> ().

    labels[:, t] is what the model has to say at position t of its last input. Logits are compared in fp32 under
    autocast too, and only a chunk of them exists at a time (`each`, see `cross_entropy`).

    Args:
        documents: (B, T) of packed sequences: tokens see only those of the same number.
        at: (N,) places in the flattened labels; the others don't count, and their states don't go through the head.
        taught: (B, T, ...) what `each` reads beside the states, see `distillation`.
    """
    *inputs, labels = tensors
    x, labels = states(model, *inputs, documents=documents).flatten(0, 1), labels.flatten()  # (B T, C), (B T,)
    beside = [] if taught is None else [taught.flatten(0, 1)]
    if at is not None:
        x, labels, *beside = (tensor.index_select(0, at) for tensor in (x, labels, *beside))
    if isinstance(model, Encoder):  # its head has layers of its own
        return F.cross_entropy(model.logits(x), labels, ignore_index=IGNORED, reduction="sum")
    cap = model.config.final_logit_softcapping
    return linear_cross_entropy(x, model.head_weight(), labels, *beside, cap=cap, each=each)


def states(model: Model, *inputs: Tensor, documents: Tensor | None = None) -> Tensor:
    """What the head reads, (B, T, C); `documents` as in `loss`."""
    apart = {} if documents is None else {"documents": documents}
    if documents is not None and isinstance(model, Decoder) and model.config.positions == "learned":
        apart["positions"] = restarted(documents)  # other positions count distances, which don't care where they begin
    hidden: Callable[..., Tensor] = model.hidden
    return hidden(*inputs, **apart)


def restarted(documents: Tensor) -> Tensor:
    """Where each token stands in its document, (B, T) -> (B, T), counted from the first that the row has of it."""
    at = torch.arange(documents.shape[1], device=documents.device)
    begins = documents != F.pad(documents, (1, 0), value=-1)[:, :-1]
    return at - torch.where(begins, at, 0).cummax(1).values


class Learner(nn.Module):
    """A model and its loss as one module: what the step calls, and what DDP and FSDP wrap."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.each: Chunk = chunk
        self.taught_by: Config | None = None  # the shape of the model that a student learns from

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        """See `loss`, and `Batch.tensors` for what is named."""
        return loss(self.model, *tensors, each=self.each, **named)
