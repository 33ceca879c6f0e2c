"""The stage on real text: what it publishes, that it is repeatable, and what it says of text it can't use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl import console, device, recipe
from llmctl.artifact import Artifact, Job, Run, Settings
from llmctl.errors import DataError, TimeUp
from llmctl.prep import corpus, stage
from llmctl.text import builtin
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer


def job(folder: Path, prep: str, run: str = "run") -> Job:
    """A job as the chain makes it, for a recipe whose [prep] section is `prep`."""
    path = folder / "recipe.toml"
    path.write_text(f"[prep]\n{prep}\n", encoding="utf-8")
    made = recipe.load(path)
    settings = Settings("tokens", "prep", 1, made.seed, {"prep": made.section("prep").declared()}, {})
    return Job(made, Run(folder / run), "prep", settings, {}, device.Device("cpu", "test", 2, frozenset()))


def write(folder: Path, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())


@pytest.fixture(scope="module")
def modules() -> list[str]:
    """Modules of Python's own library: real text that every machine has."""
    return [text for text, _, _ in builtin.texts(builtin.STDLIB)][:240]


@pytest.fixture(scope="module")
def published(modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("prep")
    write(folder / "data", modules)
    return stage.prep(job(folder, 'sources = ["data"]\nval_percent = 10\ntokenizer.vocab_size = 1000'))


def test_the_artifact_holds_every_token_of_every_document(published: Artifact, modules: list[str]) -> None:
    kept = [text for text in dict.fromkeys(modules) if text.strip()]
    tokenizer = Tokenizer.load(published.path)
    train, val = (Shards.open(published.path, split) for split in ("train", "val"))
    decoded = {tokenizer.decode(ids.tolist()) for split in (train, val) for ids in split.documents_ids()}
    assert decoded == set(kept)
    assert 0.03 < val.documents / len(kept) < 0.2
    assert len(tokenizer) == train.vocab_size == 1000


def test_the_index_says_which_tokens_are_of_which_source(tmp_path: Path) -> None:
    """In the order of the sources; a duplicate counts for the first; a source that adds nothing has no entry."""
    write(tmp_path / "a", [f"a{number}\n" * 5 for number in range(70)])
    write(tmp_path / "b", [f"b{number}\n" * 5 for number in range(60)] + ["a3\n" * 5])
    write(tmp_path / "again", ["a7\n" * 5])
    made = stage.prep(job(tmp_path, 'sources = ["b", "again", "a"]\nval_percent = 10\ntokenizer.type = "byte"'))
    assert made.metrics["dropped"] == {"duplicate": 2}
    for split in ("train", "val"):
        found = Shards.open(made.path, split)
        tokenizer, first = Tokenizer.load(made.path), 0
        assert [name for name, _ in found.sources] == (["b", "again", "a"] if split == "train" else ["b", "a"])
        for name, tokens in found.sources:
            texts = tokenizer.decode(found[first : first + tokens].tolist()).split()
            assert {text[0] for text in texts if text not in ("a3", "a7")} <= {name[0]}
            first += tokens
        assert first == len(found)


def test_the_metrics_add_up(published: Artifact, modules: list[str]) -> None:
    metrics = published.metrics
    train, val = (Shards.open(published.path, split) for split in ("train", "val"))
    assert metrics["documents_read"] + metrics["files_passed_over"][".txt (empty)"] == len(modules)
    assert metrics["documents"] == metrics["documents_read"] - sum(metrics["dropped"].values())
    assert metrics["documents"] == metrics["train_documents"] + metrics["val_documents"]
    assert metrics["tokens"] == len(train) + len(val) == metrics["train_tokens"] + metrics["val_tokens"]
    assert metrics["bytes"] == train.bytes + val.bytes == metrics["train_bytes"] + metrics["val_bytes"]
    assert metrics["bytes_per_token"] == pytest.approx(metrics["bytes"] / metrics["tokens"], abs=1e-4)
    assert metrics["longest_document"] == max(len(ids) for split in (train, val) for ids in split.documents_ids())
    assert metrics["split"] == "hash"
    samples = [json.loads(line) for line in (published.path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == stage.SHOWN
    assert all(sample["text"] in "".join(modules) for sample in samples)


def test_twice_gives_the_same_bytes(published: Artifact, tmp_path: Path, modules: list[str]) -> None:
    write(tmp_path / "data", modules)
    again = stage.prep(job(tmp_path, 'sources = ["data"]\nval_percent = 10\ntokenizer.vocab_size = 1000'))
    assert again.manifest["files"] == published.manifest["files"]
    assert again.identity == published.identity


def test_cleaning_and_duplicates(tmp_path: Path) -> None:
    texts = [f"line {number}\r\nsecond line\r" for number in range(150)]
    write(tmp_path / "data", [*texts, "line 3\nsecond line\n", "e\u0301tude", " \n\t"])
    (tmp_path / "data" / "zero.jsonl").write_text('{"text": "\\u00e9tu\\u0000de"}\n')
    made = stage.prep(job(tmp_path, 'sources = "data"\ntokenizer.type = "byte"'))
    tokenizer = Tokenizer.load(made.path)
    decoded = [
        tokenizer.decode(ids.tolist())
        for split in ("train", "val")
        for ids in Shards.open(made.path, split).documents_ids()
    ]
    assert made.metrics["dropped"] == {"duplicate": 2, "empty": 1}
    assert sorted(decoded) == sorted([f"line {number}\nsecond line\n" for number in range(150)] + ["étude"])


@pytest.mark.parametrize("normalize", ["nfc", "none"])
def test_normalisation_can_be_turned_off(tmp_path: Path, normalize: str) -> None:
    (tmp_path / "a.txt").write_text("e\u0301tude " * 100, encoding="utf-8")
    made = stage.prep(job(tmp_path, f'sources = "a.txt"\nnormalize = "{normalize}"\ntokenizer.type = "byte"'))
    text = Shards.open(made.path, "train").text(Tokenizer.load(made.path)).decode()
    assert text.startswith("étude" if normalize == "nfc" else "e\u0301tude")


def test_few_documents_hold_out_the_tail_of_the_text(tmp_path: Path) -> None:
    lines = [f"This is line {number} of the only document.\n" for number in range(2000)]
    text = "".join(lines)
    (tmp_path / "a.txt").write_text(text)
    made = stage.prep(job(tmp_path, 'sources = "a.txt"\ntokenizer.vocab_size = 350'))
    tokenizer = Tokenizer.load(made.path)
    train, val = (Shards.open(made.path, split).text(tokenizer).decode() for split in ("train", "val"))
    assert train + val == text
    assert train.endswith(".\n")  # cut between lines
    assert 0.09 < len(val) / len(text) < 0.11
    assert made.metrics["split"] == "tail"
    assert made.metrics["documents"] == 1


def test_the_tail_may_begin_inside_a_document_or_with_one(tmp_path: Path) -> None:
    for length in (200, 300, 5000):
        write(tmp_path / "data", ["a" * length, "b" * (length // 9), "c"])
        made = stage.prep(job(tmp_path, 'sources = "data"\ntokenizer.type = "byte"'))
        tokenizer = Tokenizer.load(made.path)
        train, val = (Shards.open(made.path, split).text(tokenizer).decode() for split in ("train", "val"))
        assert train + val == "a" * length + "b" * (length // 9) + "c"
        assert val


def test_too_little_text_to_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 199)
    with pytest.raises(DataError, match="199 characters are too little text"):
        stage.prep(job(tmp_path, 'sources = "a.txt"\ntokenizer.type = "byte"'))


def test_a_hash_that_holds_nothing_out_falls_back_to_the_tail(tmp_path: Path) -> None:
    write(tmp_path / "data", [f"document {number}\n" * 10 for number in range(120)])
    made = stage.prep(job(tmp_path, 'sources = "data"\nval_percent = 0.001\ntokenizer.type = "byte"'))
    assert made.metrics["split"] == "tail"
    assert made.metrics["val_tokens"] > 0


def test_the_vocabulary_is_trained_on_training_text_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words to learn, again and again. " * 500 + "\n" + "unseenword " * 200)
    made = stage.prep(job(tmp_path, 'sources = "a.txt"\ntokenizer.vocab_size = 350'))
    tokenizer = Tokenizer.load(made.path)
    assert len(tokenizer.encode(" words")) == 1
    assert len(tokenizer.encode(" unseenword")) > 4


def test_a_large_corpus_is_sampled_evenly_for_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 100)
    with corpus.Corpus(tmp_path / "documents") as made:
        for number in range(200):
            text = f"{number:03} " * 250
            made.add(corpus.Document(text, ""), text, 10.0)
    blocks = list(made.blocks(10_000))
    assert 8_000 < sum(map(len, blocks)) < 11_000
    assert len({block[:3] for block in blocks}) > 80
    assert sum(map(len, made.blocks(10**9))) == sum(len(entry.text) for entry in made if not entry.held_out)


def test_a_tokenizer_can_be_taken_from_elsewhere(published: Artifact, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text of my own, encoded with pieces of another.\n" * 20)
    made = stage.prep(job(tmp_path, f'sources = "a.txt"\ntokenizer.from = "{published.path}"'))
    assert Tokenizer.load(made.path).digest() == Tokenizer.load(published.path).digest()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        stage.prep(job(tmp_path, 'sources = "a.txt"\ntokenizer.from = "."'))


def test_errors_publish_nothing_and_keep_what_was_there(published: Artifact, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Too little text for so many pieces.\n" * 20)
    made = stage.prep(job(tmp_path, 'sources = "a.txt"\ntokenizer.type = "byte"'))
    with pytest.raises(DataError, match="too little text for a vocabulary of 4,096") as caught:
        stage.prep(job(tmp_path, 'sources = "a.txt"'))
    assert "vocab_size = 3" in caught.value.hint
    assert Artifact.open(tmp_path / "run" / "prep").identity == made.identity
    late = job(tmp_path, 'sources = "a.txt"\ntokenizer.type = "byte"')
    late.deadline = 0.0
    with pytest.raises(TimeUp):
        stage.prep(late)
    Artifact.open(tmp_path / "run" / "prep").verify()


def test_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", ["same text\n" * 20, "same text\n" * 20, "other text\n" * 20])
    (tmp_path / "data" / "x.png").write_bytes(b"\x89PNG")
    (tmp_path / "b.jsonl").write_text('{"content": "a text in a line"}\nno json\n')
    console.configure()
    stage.prep(job(tmp_path, 'sources = ["data", "b.jsonl"]\non_error = "skip"\ntokenizer.type = "byte"'))
    printed = capsys.readouterr().out
    assert "data, b.jsonl    636 bytes, 4 documents" in printed
    assert "files passed over: .png 1" in printed
    assert 'lines left out (on_error = "skip"): 1' in printed
    assert "b.jsonl: the text is under 'content' (a guess; [prep] text_key says otherwise)" in printed
    assert "kept 3 · duplicate 1" in printed
    assert "(the tail of the text)" in printed
    assert "very little text" in printed


def test_preview_shows_documents_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", ["one\r\ntwo", "one\ntwo", "x" * 5000, "never shown"])
    made = job(tmp_path, 'sources = "data"').recipe
    console.configure()
    stage.preview(made, 2)
    printed = capsys.readouterr().out
    assert "data/0000.txt · 7 characters\none\ntwo\n" in printed
    assert "... and 4,000 characters more" in printed
    assert "never shown" not in printed
    assert "2 documents shown · left out so far: duplicate 1" in printed
    assert not (tmp_path / "run").exists()
