"""Token shards and the stream of batches: what was written is read, and training can stop at any sample."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import DataError
from llmctl.text import shards
from llmctl.text.shards import Shards, Writer, batches, windows
from llmctl.text.tokenizer import Tokenizer

BOS, EOS = 1, 2


def written(folder: Path, documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 50) -> Shards:
    with Writer(folder, vocab_size, BOS, EOS, shard_tokens) as writer:
        for document in documents:
            writer.add("train", document, len(document))
    return Shards.open(folder, "train")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """997 tokens in shards of about 50: every token is another number."""
    folder, numbers = tmp_path_factory.mktemp("shards"), itertools.count(10)
    lengths = np.random.default_rng(0).integers(1, 40, size=200)
    documents, total = [], 0
    for length in lengths:
        if total + length + 2 > 997:
            break
        documents.append(list(itertools.islice(numbers, int(length))))
        total += int(length) + 2
    documents.append(list(itertools.islice(numbers, 997 - total - 2))) if total < 995 else None
    return written(folder, documents, vocab_size=5000)


def test_what_is_written_is_read_across_the_edges_of_shards(corpus: Shards, tmp_path: Path) -> None:
    assert len(corpus) == 997
    assert len(corpus.parts) > 10
    whole = corpus[0:997]
    assert whole.dtype == np.int64
    for start, stop in [(0, 0), (0, 1), (49, 131), (996, 997), (500, 2000), (997, 1000)]:
        assert corpus[start:stop].tolist() == whole[start:stop].tolist()
    documents = [ids.tolist() for ids in corpus.documents_ids()]
    assert len(documents) == corpus.documents
    assert sum(map(len, documents)) == corpus.bytes
    assert [index for ids in documents for index in [BOS, *ids, EOS]] == whole.tolist()


@given(st.lists(st.lists(st.integers(3, 70_000), max_size=30), min_size=1, max_size=20), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    found = written(tmp_path_factory.mktemp("any"), documents, vocab_size=70_001, shard_tokens=shard_tokens)
    assert found.parts[0].dtype.itemsize == 4
    assert [ids.tolist() for ids in found.documents_ids()] == documents


def test_the_text_comes_back_in_bytes(bpe: Tokenizer, library: list[str], tmp_path: Path) -> None:
    with Writer(tmp_path, len(bpe), bpe.bos_id, bpe.eos_id or 0) as writer:
        for text in library[:10]:
            writer.add("val", bpe.encode(text), len(text.encode()))
    found = Shards.open(tmp_path, "val")
    assert found.text(bpe) == "".join(library[:10]).encode()
    assert found.bytes == len(found.text(bpe))
    assert (tmp_path / "val-00000.bin").stat().st_size == 2 * len(found)


def test_batches_are_the_tokens_and_their_successors(corpus: Shards) -> None:
    whole = corpus[0:997].tolist()
    for rows, _ in itertools.islice(batches(corpus, seed=1, max_seq_length=32, batch_size=4), 40):
        assert rows.shape == (4, 33)
        for row in rows.tolist():
            start = next(at for at in range(997 - 32) if whole[at : at + 33] == row)
            assert start + 33 <= 997


def test_an_epoch_sees_each_window_once_and_each_epoch_is_another(corpus: Shards) -> None:
    count = windows(corpus, 32)
    stream = batches(corpus, seed=1, max_seq_length=32, batch_size=count)
    epochs = [next(stream)[0] for _ in range(3)]
    for rows in epochs:
        targets = np.sort(rows[:, 1:].ravel())
        specials = np.isin(targets, (BOS, EOS))
        assert len(np.unique(targets[~specials])) == np.count_nonzero(~specials)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(np.sort(epochs[0], axis=0), np.sort(epochs[1], axis=0))  # cut at another offset


@given(st.integers(1, 7), st.integers(0, 200), st.integers(8, 995))
@settings(deadline=None, max_examples=60)
def test_resuming_goes_on_with_the_exact_next_sample(corpus: Shards, size: int, position: int, length: int) -> None:
    one = batches(corpus, seed=7, max_seq_length=length, batch_size=1)
    expected = [next(one)[0][0].tolist() for _ in range(position + 2 * size)][position:]
    resumed = batches(corpus, seed=7, max_seq_length=length, batch_size=size, position=position)
    first, after = next(resumed)
    second, end = next(resumed)
    assert [*first.tolist(), *second.tolist()] == expected
    assert (after, end) == (position + size, position + 2 * size)


def test_the_order_depends_on_the_seed(corpus: Shards) -> None:
    one, two = (next(batches(corpus, seed=seed, max_seq_length=32, batch_size=8))[0] for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_a_context_longer_than_the_data_is_an_error(corpus: Shards) -> None:
    assert next(batches(corpus, seed=0, max_seq_length=996, batch_size=1))[0].tolist() == [corpus[0:997].tolist()]
    with pytest.raises(DataError, match="has 997 tokens; a context of 997") as caught:
        next(batches(corpus, seed=0, max_seq_length=997, batch_size=1))
    assert "max_seq_length = 124" in caught.value.hint


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token shards here"):
        Shards.open(tmp_path, "train")
    written(tmp_path, [[5, 6, 7]])
    with pytest.raises(DataError, match="no split 'test'"):
        Shards.open(tmp_path, "test")
    shard = tmp_path / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match="has 8 bytes; the index says 10"):
        Shards.open(tmp_path, "train")
    index = json.loads((tmp_path / shards.INDEX).read_text())
    index["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
    (tmp_path / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        Shards.open(tmp_path, "train")
    assert caught.value.file == str(tmp_path / "passwd")  # a name never leaves the folder
