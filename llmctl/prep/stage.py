"""`llmctl prep`: text in, token shards and a vocabulary out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, TimeUp
from llmctl.prep.cleaning import Cleaner
from llmctl.prep.corpus import Corpus, Entry
from llmctl.recipe import PrepSection, Recipe
from llmctl.text import extension, shards, sources, tokenizer
from llmctl.text.chat import ChatTemplate
from llmctl.text.sources import Document, Tally
from llmctl.text.tokenizer import Tokenizer

SAMPLES = "samples.jsonl"
SHOWN = 12  # documents in samples.jsonl
EXCERPT = 1_000  # characters of a document that are shown
VOCABULARY_TEXT = 32_000_000  # bytes: more text hardly changes the pieces, and the trainer holds it in memory
EXTENSION_TEXT = 8_000_000  # bytes: takes about 15 seconds
BATCH = 4 << 20  # characters encoded at a time
LITTLE = 100_000  # tokens: a model learns so few by heart


def prep(job: Job) -> Artifact:
    """Cleans `[prep] sources`, trains (or takes) the tokenizer, and publishes the tokens of two splits."""
    section, started = job.recipe.section("prep"), time.monotonic()
    tally, cleaner = Tally(), Cleaner(section.normalize)

    with Corpus(job.work / "documents.jsonl") as corpus, console.progress("prep", unit="documents") as live:
        for source, document in _read(section, job.recipe.root, tally):
            text = cleaner.clean(document.text)
            if text is not None:
                corpus.add(document, text, section.val_percent, source)
            if tally.documents % 256 == 0:
                live.update(tally.documents, f"reading · {tally.documents:,} documents · {console.size(tally.bytes)}")
                _keep_time(job)
    _say_what_was_read(section, tally)

    vocabulary = _tokenizer(section, job.recipe.root, corpus)
    with job.publishing() as staging:
        every, longest, lossy, samples = max(1, corpus.documents // SHOWN), 0, 0, list[str]()
        writer = shards.Writer(staging.path, len(vocabulary), vocabulary.begin_id, _end(vocabulary, section))
        with writer, console.progress("prep", total=corpus.bytes, unit="bytes") as live:
            for number, encoded in enumerate(_encode(corpus, vocabulary, job)):
                writer.add(encoded.split, encoded.ids, encoded.bytes, encoded.source)
                longest = max(longest, len(encoded.ids))
                if number % every == 0 and len(samples) < SHOWN:
                    samples.append(_sample(encoded))
                    lossy += vocabulary.decode(encoded.ids) != encoded.text
                live.update(writer.bytes, f"encoding · {console.size(writer.bytes)} of {console.size(corpus.bytes)}")
        vocabulary.save(staging.path)
        if section.tokenizer.source and (template := ChatTemplate.load(_folder(section, job.recipe.root))):
            template.save(staging.path)
        (staging.path / SAMPLES).write_text("".join(samples), encoding="utf-8")

        metrics = _metrics(tally, cleaner, writer.index) | {"longest_document": longest, "split": corpus.split.name}
        metrics["round_trip"] = 1 - lossy / len(samples)  # of the documents in samples.jsonl
        if lossy:
            console.detail(f"the tokenizer does not give back every text: {lossy} of {len(samples)} samples differ")
        _say_what_was_made(metrics, time.monotonic() - started)
        return staging.seal(metrics | {"seconds": round(time.monotonic() - started, 3)})


def preview(recipe: Recipe, count: int) -> None:
    """Shows the first `count` documents as they will be, cleaned; writes nothing."""
    section, tally = recipe.section("prep"), Tally()
    cleaner = Cleaner(section.normalize)
    for _, document in _read(section, recipe.root, tally):
        text = cleaner.clean(document.text)
        if text is None:
            continue
        console.say(f"--- {document.origin} · {len(text):,} characters", style="bold")
        console.say(text[:EXCERPT].rstrip("\n"))
        if len(text) > EXCERPT:
            console.say(f"... and {len(text) - EXCERPT:,} characters more", style="dim")
        if cleaner.kept == count:
            break
    dropped = " · ".join(f"{reason} {number:,}" for reason, number in sorted(cleaner.dropped.items()))
    console.say(
        f"--- {cleaner.kept:,} documents shown" + (f" · left out so far: {dropped}" if dropped else ""), style="bold"
    )


def _read(section: PrepSection, root: Path, tally: Tally) -> Iterator[tuple[str, Document]]:
    """The documents of all sources, one after the other, each with its source."""
    for source in section.sources:
        found = sources.documents(source, root, text_key=section.text_key, on_error=section.on_error, tally=tally)
        for document in found:
            yield source, document


def _tokenizer(section: PrepSection, root: Path, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the recipe takes from elsewhere, perhaps extended; else one trained on the training split."""
    if section.tokenizer.source:
        base = Tokenizer.load(_folder(section, root))
        if not section.tokenizer.extend:
            return base
        extended = extension.extend(base, corpus.blocks(EXTENSION_TEXT), section.tokenizer.extend)
        _say_what_was_learned(base, extended, corpus)
        return extended
    return tokenizer.train(corpus.blocks(VOCABULARY_TEXT), section.tokenizer.type, section.tokenizer.vocab_size)


def _folder(section: PrepSection, root: Path) -> Path:
    return root / Path(section.tokenizer.source).expanduser()


def _end(vocabulary: Tokenizer, section: PrepSection) -> int:
    if vocabulary.end_id is None:
        raise DataError(
            "the tokenizer names no eos_token: documents could not be told apart", file=section.tokenizer.source
        )
    return vocabulary.end_id


class Encoded(NamedTuple):
    """A document of the corpus and its ids."""

    text: str
    origin: str
    source: str
    split: str
    ids: list[int]

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def _encode(corpus: Corpus, vocabulary: Tokenizer, job: Job) -> Iterator[Encoded]:
    """The corpus, a batch at a time encoded on all threads."""
    for batch in _batches(corpus):
        _keep_time(job)
        encoded = vocabulary.encode_batch([document.text for document in batch], job.device.threads)
        for (text, origin, source, held_out), ids in zip(batch, encoded, strict=True):
            yield Encoded(text, origin, source, "val" if held_out else "train", ids)


def _batches(corpus: Corpus) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    characters = 0
    for document in corpus:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _sample(document: Encoded) -> str:
    """A line of samples.jsonl."""
    shown = {"split": document.split, "origin": document.origin, "bytes": document.bytes, "tokens": len(document.ids)}
    return json.dumps(shown | {"text": document.text[:EXCERPT]}, ensure_ascii=False) + "\n"


def _keep_time(job: Job) -> None:
    if job.out_of_time():
        raise TimeUp("--max-time is over before prep is done", hint="prep starts over each time: give it more")


def _metrics(tally: Tally, cleaner: Cleaner, index: dict[str, Any]) -> dict[str, Any]:
    """The funnel from files to tokens. Token counts include the `<s>` and `</s>` of each document."""
    train, val = index["splits"]["train"], index["splits"]["val"]
    tokens, bytes_ = train["tokens"] + val["tokens"], train["bytes"] + val["bytes"]
    return {
        "files_read": tally.files,
        "files_passed_over": dict(sorted(tally.passed_over.items())),
        "lines_left_out": tally.bad_lines,
        "documents_read": tally.documents,
        "bytes_read": tally.bytes,
        "dropped": dict(sorted(cleaner.dropped.items())),
        "documents": cleaner.kept,
        "bytes": bytes_,
        "tokens": tokens,
        "train_tokens": train["tokens"],
        "train_documents": train["documents"],
        "train_bytes": train["bytes"],
        "val_tokens": val["tokens"],
        "val_documents": val["documents"],
        "val_bytes": val["bytes"],
        "vocab_size": index["vocab_size"],
        "bytes_per_token": round(bytes_ / tokens, 4),
    }


def _say_what_was_read(section: PrepSection, tally: Tally) -> None:
    console.stage("prep", f"{', '.join(section.sources)}    {console.size(tally.bytes)}, {tally.documents:,} documents")
    if tally.passed_over:
        kinds = " · ".join(f"{kind} {number:,}" for kind, number in tally.passed_over.most_common())
        console.detail(f"files passed over: {kinds}")
    if tally.bad_lines:
        console.detail(f'lines left out (on_error = "skip"): {tally.bad_lines:,}')
    for file, key in tally.text_keys.items():
        console.detail(f"{file}: the text is under {key!r} (a guess; [prep] text_key says otherwise)")


def _say_what_was_learned(base: Tokenizer, extended: Tokenizer, corpus: Corpus) -> None:
    text = "".join(corpus.blocks(EXTENSION_TEXT // 16))
    size, before, after = len(text.encode()), len(base.encode(text)), len(extended.encode(text))
    console.detail(
        f"vocabulary {len(base):,} + {len(extended) - len(base):,} pieces: {size / before:.2f} bytes a token before, "
        f"{size / after:.2f} now"
    )


def _say_what_was_made(metrics: dict[str, Any], seconds: float) -> None:
    dropped = "".join(f" · {reason} {number:,}" for reason, number in metrics["dropped"].items())
    console.detail(
        f"kept {metrics['documents']:,}{dropped}    vocabulary {metrics['vocab_size']:,} · "
        f"{metrics['bytes_per_token']:.2f} bytes a token",
        console.duration(seconds),
    )
    train, val = console.count(metrics["train_tokens"]), console.count(metrics["val_tokens"])
    held_out = "the tail of the text" if metrics["split"] == "tail" else f"{metrics['val_documents']:,} documents"
    console.detail(f"{train} tokens to train on · {val} held out ({held_out})")
    if metrics["train_tokens"] < LITTLE:
        console.warn(f"{metrics['train_tokens']:,} tokens are very little text: a model will learn them by heart")
