"""Token shards and the stream of batches: what was written is read, and training can stop at any sample."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import DataError
from llmctl.text import shards
from llmctl.text.shards import Shards, Windows, Writer, batches
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
    count = Windows(0, len(corpus), 32, (1,)).count
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
    """Fault 5."""
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


def test_the_order_takes_no_memory_of_the_corpus() -> None:
    """A terabyte of tokens: the windows of a sample in the middle of the tenth epoch, at once and for nothing."""
    windows = Windows(0, 1 << 40, 1024, (3,))
    numbers = np.arange(64) + 9 * windows.count + 12_345_678
    tracemalloc.start()
    starts = windows.starts(numbers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(np.unique(starts)) == 64
    assert starts.min() >= 0
    assert starts.max() + 1025 <= 1 << 40
    assert len(np.unique(starts % 1024)) == 1  # one offset an epoch


# ------------------------------------------------------------------------------------------------------------ mixtures

MIXTURE = {"poems": 3.0, "code": 1.0, "junk": 0.0}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Poems from 1000, code from 2000, junk from 3000; several shards, and a source in more than one of them."""
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    with Writer(folder, 5000, BOS, EOS, 90) as writer:
        for number, (source, documents) in enumerate({"poems": 12, "code": 30, "junk": 5}.items(), 1):
            for length in random.integers(5, 25, documents):
                writer.add("train", (1000 * number + random.integers(0, 999, length)).tolist(), int(length), source)
    return Shards.open(folder, "train")


def drawn(shards: Shards, count: int, position: int = 0, size: int = 1) -> list[list[int]]:
    stream = batches(shards, seed=5, max_seq_length=16, batch_size=size, position=position, mixture=MIXTURE)
    return [row for rows, _ in itertools.islice(stream, count // size) for row in rows.tolist()]


def source_of(row: list[int]) -> int:
    """Of a window, which is of one source alone: documents are shorter than it, so it holds a border of two."""
    (found,) = {token // 1000 for token in row} - {0}
    return found


def test_the_index_says_where_each_source_lies(mixed: Shards) -> None:
    assert [name for name, _ in mixed.sources] == ["poems", "code", "junk"]
    assert sum(tokens for _, tokens in mixed.sources) == len(mixed)
    assert sum(tokens for name, tokens in mixed.sources if name == "poems") == np.argmax(mixed[:] >= 2000) - 1


def test_sources_are_drawn_by_their_weights_and_never_mixed_in_a_window(mixed: Shards) -> None:
    found = [source_of(row) for row in drawn(mixed, 400)]
    assert (found.count(1), found.count(2)) == (300, 100)
    for first in range(0, 400, 8):
        assert found[first : first + 8].count(1) == 6  # in every batch


def test_each_source_has_its_own_epochs(mixed: Shards) -> None:
    """Between two passes over the poems the code is not yet through; each pass sees each window once."""
    windows = Windows(0, dict(mixed.sources)["poems"], 16, (5, 0)).count
    rows = [row for row in drawn(mixed, 400) if source_of(row) == 1]
    for first in range(0, len(rows) - windows, windows):
        epoch = np.array(rows[first : first + windows])[:, 1:]
        text = epoch[epoch >= 1000]
        known = mixed[0 : dict(mixed.sources)["poems"]]
        assert all((epoch == token).sum() <= (known == token).sum() for token in np.unique(text))


@given(st.integers(1, 7), st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_a_mixture_resumes_on_the_exact_next_sample(mixed: Shards, size: int, position: int) -> None:
    """Fault 5."""
    expected = drawn(mixed, position + 2 * size)[position:]
    assert drawn(mixed, 2 * size, position, size) == expected


def test_a_mixture_of_what_is_not_there(mixed: Shards) -> None:
    for name, why in (("songs", "no training text of 'songs'"), ("poems", "poems has")):
        stream = batches(mixed, seed=0, max_seq_length=16 if name == "songs" else 300, batch_size=1, mixture={name: 1})
        with pytest.raises(DataError, match=why):
            next(stream)


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
