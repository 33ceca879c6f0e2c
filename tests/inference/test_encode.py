"""Sentence encoders of every family against transformers: text in, vector out; alone and in batches, short and cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl import device
from llmctl.errors import DataError
from llmctl.inference import encode
from llmctl.inference.encode import Embedder
from llmctl.model import hf
from tests import folders
from tests.inference.encoders import CONTEXT, MADE, TEXTS, expected, write

CPU = device.pick("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write(folder, "bert")
    return folder


@pytest.mark.parametrize("name", MADE)
def test_a_text_is_the_vector_that_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, name)
    if name == "qwen3":  # what Qwen3-Embedding's config.json says, though its weights have no head
        folders.edit(tmp_path, architectures=["Qwen3ForCausalLM"])
    ours = Embedder(tmp_path, CPU)
    found, cut = ours.embed(TEXTS)
    assert cut == [len(TEXTS) - 1]
    for text, vector in zip(TEXTS, found, strict=True):
        assert np.abs(vector - expected(name, *theirs, text).numpy()).max() < 1e-5
        assert np.abs(vector - ours.embed([text])[0][0]).max() < 1e-6


def test_a_batch_holds_texts_of_like_length(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Embedder(bert, CPU)
    shapes: list[tuple[int, ...]] = []
    forward = ours.model.forward
    monkeypatch.setattr(
        ours.model, "forward", lambda ids, mask: (shapes.append(tuple(ids.shape)), forward(ids, mask=mask))[1]
    )
    rows = [np.full(length, 7, np.int32) for length in (CONTEXT, 3, 4, CONTEXT, *[5] * 300)]
    places = [place for batch, _ in ours.batches(rows) for place in batch]
    assert sorted(places) == list(range(len(rows)))
    assert all(rows_ * length <= encode.BATCH for rows_, length in shapes)
    assert shapes[-1] == (2, CONTEXT)
    assert len(shapes) == 3


def test_no_texts_no_vectors(bert: Path) -> None:
    vectors, cut = Embedder(bert, CPU).embed([])
    assert (vectors.shape, cut) == ((0, 48), [])


def test_a_text_that_spells_a_special_token_has_none(bert: Path) -> None:
    ours = Embedder(bert, CPU)
    row, _ = ours.ids("one [SEP] two [PAD]")
    ends = [ours.tokenizer.special("[CLS]"), ours.tokenizer.special("[SEP]")]
    assert [id for id in row.tolist() if id in ours.tokenizer.special_ids] == ends


def test_what_is_cut_is_told(bert: Path) -> None:
    ours = Embedder(bert, CPU)
    for words, cut in ((CONTEXT - 2, False), (CONTEXT - 1, True)):
        row, found = ours.ids("a " * words)
        assert (len(row), found) == (CONTEXT, cut)
    row, found = ours.ids("a" + " " * 10**7)  # few tokens, but nobody waits for a tokenizer to find that out
    assert (len(row), found) == (3, True)
    row, found = ours.ids("a b c d", 4)
    assert (len(row), found) == (4, True)


@pytest.mark.parametrize(
    ("stated", "length"), [({"max_seq_length": 12}, 12), ({"max_seq_length": 10**6}, CONTEXT), ({}, CONTEXT)]
)
def test_the_length_of_sentence_transformers(stated: dict[str, int], length: int, bert: Path, tmp_path: Path) -> None:
    for path in bert.rglob("*.*"):
        target = tmp_path / path.relative_to(bert)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(stated))
    ours = Embedder(tmp_path, CPU)
    assert (ours.max_length, ours.longest) == (length, CONTEXT)


def test_lower_case_where_sentence_transformers_makes_it(tmp_path: Path) -> None:
    write(tmp_path, "roberta")
    for lower in (False, True):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lower}))
        loud, quiet = (Embedder(tmp_path, CPU).ids(text)[0].tolist() for text in ("LOUD", "loud"))
        assert (loud == quiet) == lower


def test_ids_that_are_none_of_the_models(bert: Path) -> None:
    ours = Embedder(bert, CPU)
    for row in ([], [-1], [ours.vocab_size]):
        with pytest.raises(ValueError, match="token ids"):
            list(ours.batches([np.array(row, np.int32)]))


def test_a_model_for_something_else_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="llama decoder for causal-lm, not for embeddings"):
        Embedder(folders.write(tmp_path), CPU)


def test_what_llmctl_writes_of_it_it_reads(bert: Path, tmp_path: Path) -> None:
    hf.save(hf.load(bert), bert, tmp_path)
    one, other = (Embedder(folder, CPU).embed(TEXTS)[0] for folder in (bert, tmp_path))
    assert torch.equal(torch.from_numpy(one), torch.from_numpy(other))
