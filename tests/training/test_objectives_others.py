"""Objectives other than a kind's usual one, documents apart, packing: what each learns, what is refused, and that a
mean over tokens is one however they are shared out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.errors import DataError, RecipeError
from llmctl.finetune.batches import Example, collate, pack
from llmctl.model import hf
from llmctl.text import shards, tokenizer
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import objectives, optim, validation
from llmctl.training.batch import IGNORED, Batch
from llmctl.training.objectives import Objective
from tests.text import kinds
from tests.training.test_loop import trained
from tests.training.test_objectives import LENGTH, TEXT, corpus, model_of


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return tokenizer.train([TEXT], type="char")


OTHERS = {
    "fim": ("qwen3", {"name": "fim"}),
    "blanks": ("qwen3", {"name": "infill"}),
    "blanks of an LSTM": ("lstm", {"name": "infill"}),
    "words": ("bert", {"whole_word": True}),
    "documents": ("qwen3", {"document_mask": True}),
    "documents of middles": ("gpt2", {"name": "fim", "document_mask": True}),
    "documents of words": ("modernbert", {"whole_word": True, "document_mask": True}),
}


def other(which: str, pieces: Tokenizer) -> tuple[hf.Model, Objective]:
    family, keys = OTHERS[which]
    shape: dict[str, Any] = {"hidden_size": None, "head_dim": None} if family == "lstm" else {}
    model = model_of(family, pieces, **shape)
    return model, objectives.of(model.config, pieces, **keys)


@pytest.mark.parametrize("which", OTHERS)
def test_other_objectives_can_be_learned(tmp_path: Path, pieces: Tokenizer, which: str) -> None:
    """A text by heart, measured by its own loss; and figures that all such models have."""
    text, (model, objective) = corpus(tmp_path, pieces), other(which, pieces)
    assert objective.usual is not None
    assert objective.usual.usual is None
    stream = (
        objective.frame(rows, 3, after)
        for rows, after in shards.batches(text, seed=3, max_seq_length=LENGTH, batch_size=16)
    )
    before = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    assert before.loss == pytest.approx(math.log(len(pieces)), rel=0.05)
    trained(model, optim.build(model, "muon", 0.02, 0.0), stream, range(60), micro_batch=16, planned=60)
    after = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    assert after.loss < 0.75 * before.loss


@pytest.mark.parametrize("which", OTHERS)
def test_a_sample_is_framed_alike_in_any_batch(tmp_path: Path, pieces: Tokenizer, which: str) -> None:
    text, (_, objective) = corpus(tmp_path, pieces), other(which, pieces)

    def framed(size: int, count: int, position: int = 0) -> list[list[Any]]:
        found = shards.batches(text, seed=3, max_seq_length=LENGTH, batch_size=size, position=position)
        made = [objective.frame(rows, 3, after) for rows, after in itertools.islice(found, count)]
        parts = [
            [*batch.inputs, batch.labels, *([] if batch.documents is None else [batch.documents])] for batch in made
        ]
        return [np.concatenate(part).tolist() for part in zip(*parts, strict=True)]

    assert framed(6, 1) == framed(2, 3) == [[*a, *b] for a, b in zip(framed(4, 1), framed(2, 1, 4), strict=True)]


REFUSED = {
    "spans of a decoder": ("qwen3", {"name": "spans"}, '"spans" is nothing that a decoder can learn'),
    "the next token of an encoder": ("bert", {"name": "causal"}, "an encoder can learn"),
    "blanks of a T5": ("t5", {"name": "infill"}, "a T5 can learn"),
    "words of a decoder": ("qwen3", {"whole_word": True}, "a decoder has none"),
    "words of spans": ("t5", {"whole_word": True}, "a T5 has none"),
    "documents of a T5": ("t5", {"document_mask": True}, "reads its input as one text"),
    "documents of an LSTM": ("lstm", {"document_mask": True}, "an LSTM reads its input as one text"),
    "documents of blanks": ("qwen3", {"name": "infill", "document_mask": True}, "blanks are filled behind all"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_does_not_go_with_the_model_is_refused(pieces: Tokenizer, which: str) -> None:
    family, keys, why = REFUSED[which]
    shape: dict[str, Any] = {"hidden_size": None, "head_dim": None} if family == "lstm" else {}
    with pytest.raises(RecipeError, match=why) as caught:
        objectives.of(model_of(family, pieces, **shape).config, pieces, **keys)
    assert caught.value.hint


def test_a_vocabulary_without_the_pieces(tmp_path: Path, pieces: Tokenizer) -> None:
    kinds.gpt2().save_pretrained(tmp_path)
    foreign, shape = Tokenizer.load(tmp_path), model_of("gpt2", pieces).config
    for name, piece in (("fim", "fim_prefix"), ("infill", "extra_id_0")):
        with pytest.raises(DataError, match=piece):
            objectives.of(shape, foreign, name)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- documents, accumulation


def gradients(model: hf.Model, batch: Batch, micro_batch: int) -> tuple[float, list[torch.Tensor]]:
    """The loss a supervised token and its gradients, added up over micro-batches as the step does."""
    model.zero_grad()
    total, learner = 0.0, objectives.Learner(model)
    for first in range(0, len(batch), micro_batch):
        tensors, named = batch.rows(slice(first, first + micro_batch)).tensors(torch.device("cpu"))
        part = learner(*tensors, **named)
        (part / batch.supervised).backward()
        total += part.item()
    return total / batch.supervised, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("which", [*OTHERS, "t5"])
def test_the_mean_is_over_tokens_however_they_are_shared_out(tmp_path: Path, pieces: Tokenizer, which: str) -> None:
    """Rows with more labels count more: one at a time or all at once, 1e-6."""
    text = corpus(tmp_path, pieces)
    model = model_of("t5", pieces) if which == "t5" else None
    model, objective = (model, objectives.of(model.config, pieces)) if model else other(which, pieces)
    rows, after = next(shards.batches(text, seed=3, max_seq_length=LENGTH, batch_size=8))
    batch = objective.frame(rows, 3, after)
    if "words" in which:
        assert len(set((batch.labels != IGNORED).sum(1).tolist())) > 1
    whole, at_once = gradients(model, batch, 8)
    for micro_batch in (1, 3):
        mean, added = gradients(model, batch, micro_batch)
        assert mean == pytest.approx(whole, abs=1e-6)
        for one, other_ in zip(at_once, added, strict=True):
            torch.testing.assert_close(one, other_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "modernbert"])
def test_with_document_mask_a_document_is_read_alone(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    """What stands before a document in its window changes nothing of what is said in it; without, it does."""
    model = model_of(family, pieces, dropout=0.0)
    batch = objectives.of(model.config, pieces, document_mask=True).frame(
        corpus(tmp_path, pieces)[40 : 40 + LENGTH + 1][None], 0, 1
    )
    assert batch.documents is not None
    ids, documents = batch.inputs[0].copy(), batch.documents
    assert documents.min() == 0 < documents.max()
    assert (np.flatnonzero(np.diff(documents[0])) == np.flatnonzero(ids[0, :-1] == pieces.end_id)).all()
    begins = int(np.argmax(documents[0] == 1))
    ids[0, 1 : begins - 1] = ids[0, 1 : begins - 1][::-1]
    changed = [torch.from_numpy(part) for part in (batch.inputs[0], ids)]
    apart: dict[str, Any] = {"documents": torch.from_numpy(documents)}
    read: Any = model.hidden
    one, two = (read(part, **apart)[0, begins:] for part in changed)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    one, two = (read(part)[0, begins:] for part in changed)
    assert (one - two).abs().max() > 1e-4


def test_positions_begin_anew_with_a_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1], [4, 2, 2, 0, 0], [0, 0, 0, 0, 0]])
    assert objectives.restarted(documents).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
def test_packed_conversations_teach_what_padded_ones_do(pieces: Tokenizer, family: str) -> None:
    """The same loss and the same gradients, 1e-5: rotary, learned and sliding positions."""
    model, random = model_of(family, pieces, dropout=0.0), np.random.default_rng(0)
    examples = [
        Example(tuple(random.integers(50, len(pieces), n).tolist()), (False,) * (n // 2) + (True,) * (n - n // 2))
        for n in (5, 17, 30, 8, 12, 3)
    ]
    packed, padded = pack(examples, 3, LENGTH), collate(examples, 3, LENGTH)
    assert len(packed) < len(padded)
    assert packed.supervised == padded.supervised
    (mean, ours), (expected, theirs) = gradients(model, packed, 8), gradients(model, padded, 8)
    assert mean == pytest.approx(expected, abs=1e-5)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    alone, _ = gradients(model, dataclasses.replace(packed, documents=None), 8)
    assert abs(alone - expected) > 1e-4  # or the test would see nothing
