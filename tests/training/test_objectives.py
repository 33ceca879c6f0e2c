"""What each kind of model learns: transformers' loss on the same ids, resumed bitwise, and it does learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from llmctl.errors import UsageError
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.families import FAMILIES
from llmctl.recipe import ModelSection
from llmctl.recipe.schema import DECODERS, ENCODER_DECODERS, ENCODERS
from llmctl.text import shards, tokenizer
from llmctl.text.shards import Shards, Windows, Writer
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import checkpoint, corruption, objectives, optim, validation
from llmctl.training.batch import IGNORED, Batch
from llmctl.training.checkpoint import State
from llmctl.training.loop import Step
from tests.training.test_loop import STEPS, same, trained

FILLING = ("bert", "modernbert", "t5")
LENGTH = 32
TEXT = "".join(f"def add_{name}(a, b):\n    return a + b  # {name}\n\n\n" for name in ("one", "two", "three", "four"))


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return tokenizer.train([TEXT], type="char")


def model_of(family: str, pieces: Tokenizer, **keys: Any) -> hf.Model:
    section = ModelSection.model_validate(
        {"family": family, "depth": 2, "hidden_size": 32, "head_dim": 16, "max_seq_length": LENGTH} | keys
    )
    ids = {"bos": pieces.bos_id, "eos": pieces.eos_id, "pad": pieces.pad_id}
    return hf.random(shapes.derive(section, len(pieces), **ids)[0], seed=1)


def corpus(folder: Path, pieces: Tokenizer) -> Shards:
    with Writer(folder, len(pieces), pieces.bos_id, pieces.eos_id or 0) as writer:
        for start in range(0, len(TEXT), 60):
            text = TEXT[start : start + 60]
            writer.add("train", pieces.encode(text), len(text))
    return Shards.open(folder, "train")


def batches(text: Shards, model: hf.Model, pieces: Tokenizer, position: int = 0, size: int = 4) -> Iterator[Batch]:
    frame = objectives.of(model.config, pieces).frame
    for rows, after in shards.batches(text, seed=3, max_seq_length=LENGTH, batch_size=size, position=position):
        yield frame(rows, 3, after)


# -------------------------------------------------------------------------------------------------------- the loss


def test_the_recipe_knows_every_family() -> None:
    families = get_args(ModelSection.model_fields["family"].annotation)
    assert set(families) == set(FAMILIES)
    kinds = {"decoder": DECODERS, "encoder": ENCODERS, "encoder-decoder": ENCODER_DECODERS, "recurrent": ("lstm",)}
    for kind, names in kinds.items():
        assert {name for name, family in FAMILIES.items() if family.kind == kind} == set(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_learn(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    """A new model of each: the surprise of knowing nothing, and a gradient for every weight."""
    keys: dict[str, Any] = {"hidden_size": None, "head_dim": None} if family == "lstm" else {}
    model = model_of(family, pieces, **keys)
    batch = next(batches(corpus(tmp_path, pieces), model, pieces))
    loss = objectives.loss(model, *(torch.from_numpy(part) for part in (*batch.inputs, batch.labels)))
    loss.backward()
    assert loss.item() / batch.supervised == pytest.approx(math.log(len(pieces)), rel=0.05)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("family", FILLING)
def test_the_loss_is_transformers_loss(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    """On the same ids and labels: 1e-5 nats a token in fp32, gradients 1e-4."""
    transformers = pytest.importorskip("transformers")
    model = model_of(family, pieces, dropout=0.0)
    hf.save(model, pieces, tmp_path)
    batch = next(batches(corpus(tmp_path, pieces), model, pieces))
    *inputs, labels = (torch.from_numpy(part) for part in (*batch.inputs, batch.labels))

    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForMaskedLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32).eval()  # no dropout of its own
    said = theirs(input_ids=inputs[0], labels=labels)  # T5 shifts the labels right by itself
    said.loss.backward()

    ours = objectives.loss(model, *inputs, labels) / batch.supervised
    ours.backward()
    assert ours.item() == pytest.approx(said.loss.item(), abs=1e-5)
    embedding = model.embed_tokens if family == "t5" else model.model.embed_tokens
    theirs_embedding = theirs.get_input_embeddings().weight
    torch.testing.assert_close(embedding.weight.grad, theirs_embedding.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "t5", "bert"])
def test_states_that_nobody_asks_for_need_no_head(pieces: Tokenizer, family: str) -> None:
    """Loss and gradients with the places of the labels that count are those without, 1e-6 of them."""
    model = model_of(family, pieces, dropout=0.0)
    random = np.random.default_rng(0)
    labels = np.where(random.random((3, LENGTH)) < 0.2, random.integers(100, 200, (3, LENGTH)), IGNORED)
    labels[1] = IGNORED  # nothing of one sequence
    inputs = tuple(random.integers(100, 200, (3, LENGTH)) for _ in range(2 if family == "t5" else 1))
    tensors, named = Batch(inputs, labels).tensors(torch.device("cpu"))
    assert len(named["at"]) == (labels != IGNORED).sum()
    assert not Batch(inputs, np.abs(labels)).tensors(torch.device("cpu"))[1]
    found = []
    for more in ({}, named):
        model.zero_grad()
        loss = objectives.loss(model, *tensors, **more)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    _, nothing = Batch(inputs, np.full_like(labels, IGNORED)).tensors(torch.device("cpu"))
    assert objectives.loss(model, *tensors, **nothing).item() == 0.0


def test_a_decoder_learns_what_comes_next(pieces: Tokenizer) -> None:
    objective = objectives.of(model_of("qwen3", pieces).config, pieces)
    batch = objective.frame(np.array([[5, 6, 7, 8]]), 0, 1)
    assert objective.is_causal
    assert (batch.inputs[0].tolist(), batch.labels.tolist()) == ([[5, 6, 7]], [[6, 7, 8]])


def test_the_decoder_reads_its_targets_one_late(pieces: Tokenizer) -> None:
    model = model_of("t5", pieces)
    objective = objectives.of(model.config, pieces)
    ids, decoder_ids = objective.frame(np.arange(100, 100 + LENGTH + 1)[None], 0, 1).inputs
    labels = objective.frame(np.arange(100, 100 + LENGTH + 1)[None], 0, 1).labels
    assert decoder_ids[0].tolist() == [pieces.pad_id, *labels[0, :-1].tolist()]
    assert labels[0, 0] == ids[0, ids[0] < 100][0] == pieces.special("<extra_id_0>")
    assert labels[0, -1] == pieces.eos_id


@pytest.mark.parametrize("family", FILLING)
def test_what_is_hidden_does_not_depend_on_the_batch(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    text, model = corpus(tmp_path, pieces), model_of(family, pieces)
    by_two, by_six = batches(text, model, pieces, size=2), batches(text, model, pieces, size=6)
    small, large = [next(by_two) for _ in range(3)], next(by_six)
    for part in range(len(large.inputs)):
        assert np.concatenate([batch.inputs[part] for batch in small]).tolist() == large.inputs[part].tolist()
    assert np.concatenate([batch.labels for batch in small]).tolist() == large.labels.tolist()
    later = next(batches(text, model, pieces, position=4, size=2))
    assert later.labels.tolist() == small[2].labels.tolist()


def test_another_epoch_hides_other_tokens(tmp_path: Path, pieces: Tokenizer) -> None:
    text, model = corpus(tmp_path, pieces), model_of("bert", pieces)
    every = Windows(0, len(text), LENGTH, (3,)).count
    stream = batches(text, model, pieces, size=every)
    first, second = (next(stream).labels for _ in range(2))
    assert ((first != IGNORED) != (second != IGNORED)).any()


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("family", FILLING)
def test_twenty_steps_equal_ten_and_ten(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    """With dropout, accumulation and epoch boundaries, bitwise, through the files of a checkpoint."""
    text = corpus(tmp_path, pieces)

    def run(model: Any, optimizers: Any, position: int, steps: range) -> list[Step]:
        return trained(model, optimizers, batches(text, model, pieces, position), steps, 2, loss=objectives.loss)

    torch.manual_seed(11)
    whole = model_of(family, pieces, dropout=0.2)
    every = run(whole, optim.build(whole, "muon", 0.01, 0.1), 0, range(STEPS))

    torch.manual_seed(11)
    half = model_of(family, pieces, dropout=0.2)
    optimizers = optim.build(half, "muon", 0.01, 0.1)
    first = run(half, optimizers, 0, range(10))
    checkpoint.Saver(tmp_path / "work", half, optimizers).finish(State(10, first[-1].position))

    torch.manual_seed(99)  # another process
    other = model_of(family, pieces, dropout=0.2)
    optimizers = optim.build(other, "muon", 0.01, 0.1)
    found = checkpoint.newest(tmp_path / "work")
    assert found is not None
    checkpoint.restore(found[0], other, optimizers)
    second = run(other, optimizers, found[1].position, range(10, STEPS))
    assert same(whole, other)
    assert [(s.loss, s.gradient_norm, s.position) for s in every] == [
        (s.loss, s.gradient_norm, s.position) for s in first + second
    ]


# What is left of the surprise after 120 steps. A BERT of this width knows by then how often each character occurs, and
# little more: it leaves that plateau late, as BERTs do.
LEFT = {"bert": 0.5, "modernbert": 0.25, "t5": 0.4}


@pytest.mark.parametrize("family", FILLING)
def test_it_learns(tmp_path: Path, pieces: Tokenizer, family: str) -> None:
    """A text by heart, asked for tokens that were never hidden in this way."""
    text, model = corpus(tmp_path, pieces), model_of(family, pieces)
    objective = objectives.of(model.config, pieces)
    before = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    assert before.loss == pytest.approx(math.log(len(pieces)), rel=0.05)
    stream, optimizers = batches(text, model, pieces, size=16), optim.build(model, "muon", 0.02, 0.0)
    steps = trained(model, optimizers, stream, range(120), micro_batch=16, planned=120)
    after = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    assert steps[-1].loss < LEFT[family] * steps[0].loss
    assert after.loss < LEFT[family] * before.loss
    assert after.accuracy > 0.3 > 0.1 > before.accuracy


@pytest.mark.parametrize("family", FILLING)
def test_validation_asks_for_the_same_tokens_however_many_at_a_time(
    tmp_path: Path, pieces: Tokenizer, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, model = corpus(tmp_path, pieces), model_of(family, pieces, dropout=0.5).train()
    objective = objectives.of(model.config, pieces)
    whole = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    monkeypatch.setattr(validation, "LOGITS", 1)
    single = validation.validate(model, objective, text[:], max_seq_length=LENGTH)
    assert (single.targets, single.hidden, single.correct) == (whole.targets, whole.hidden, whole.correct)
    assert single.window_nats == pytest.approx(whole.window_nats)
    assert whole.nats == pytest.approx(whole.window_nats.sum())
    assert model.training
    windows = (len(text) - 1) // LENGTH
    assert len(whole.window_nats) == windows
    extra = windows * (corruption.span_count(LENGTH) + 1) if family == "t5" else 0  # the sentinels and the end
    assert whole.targets - extra <= whole.hidden <= whole.targets


def test_too_short_a_text_to_hide_anything(pieces: Tokenizer) -> None:
    model = model_of("bert", pieces)
    for text in ([], [5], [pieces.bos_id, pieces.eos_id, pieces.bos_id]):
        with pytest.raises(UsageError, match="too few to hide"):
            validation.validate(
                model, objectives.of(model.config, pieces), np.array(text, np.int64), max_seq_length=LENGTH
            )
