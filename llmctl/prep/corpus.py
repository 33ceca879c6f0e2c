"""The cleaned documents, on disk between reading and encoding: a corpus larger than memory can be split and sampled.

One JSON line a document: the text, where it came from (the file, and the source that named it), and whether the split's
hash holds it out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from llmctl.errors import DataError
from llmctl.text.sources import Document, is_held_out

FEW = 100  # documents: below this the hash splits too unevenly, so the tail of the text is held out
TAIL = 0.1  # of the text
LEAST = 200  # characters that can be split into something to train and something to validate on
BLOCK = 1 << 16  # characters: a vocabulary is trained on blocks from all over the corpus


@dataclass(frozen=True)
class Split:
    """How the corpus is split: by each document's hash, or at a character of the whole text."""

    by_hash: bool
    cut: int = 0  # where the tail begins, in characters from the start of the first document

    @property
    def name(self) -> str:
        return "hash" if self.by_hash else "tail"


class Entry(NamedTuple):
    """A document of the corpus."""

    text: str
    origin: str  # the file as shown
    source: str  # of [prep] sources
    held_out: bool


class Corpus:
    """Documents in the order they were read: `with` it they are written, after it they can be read several times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.documents = self.characters = self.bytes = self.held_out = 0
        self._stream: IO[str] | None = None

    def __enter__(self) -> Corpus:
        self._stream = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *reason: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def add(self, document: Document, text: str, val_percent: float, source: str = "") -> None:
        """Appends a document of a source, whose text is now `text`."""
        held_out = is_held_out(document, val_percent)
        assert self._stream is not None
        self._stream.write(json.dumps([text, document.origin, source, held_out], ensure_ascii=False) + "\n")
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode())
        self.held_out += held_out

    @functools.cached_property
    def split(self) -> Split:
        """By hash where there are documents enough for both sides, else the tail of the text.

        Raises:
            DataError: too little text to hold anything out.
        """
        if self.documents >= FEW and 0 < self.held_out < self.documents:
            return Split(by_hash=True)
        if self.characters < LEAST:
            message = (
                f"{self.characters:,} characters are too little text to train and to validate on; {LEAST} are the least"
            )
            raise DataError(message, hint="add text to [prep] sources")
        target = self.characters - int(self.characters * TAIL)
        return Split(by_hash=False, cut=self._after_newline(target))

    def _after_newline(self, target: int) -> int:
        """The end of a line near `target`, at most a quarter of the tail away; else `target` itself."""
        reach, start = (self.characters - target) // 4, 0
        for text, _, _, _ in self._read():
            if start + len(text) >= target:
                here = target - start
                before = text.rfind("\n", max(0, here - reach), here)
                return start + before + 1 if before >= 0 else target
            start += len(text)
        return target

    def __iter__(self) -> Iterator[Entry]:
        """Each document, in the split that `split` chose."""
        split, start = self.split, 0
        for entry in self._read():
            if split.by_hash:
                yield entry
                continue
            text = entry.text
            here = min(max(split.cut - start, 0), len(text))
            if here:
                yield entry._replace(text=text[:here], held_out=False)
            if here < len(text):
                yield entry._replace(text=text[here:], held_out=True)
            start += len(text)

    def blocks(self, limit: int) -> Iterator[str]:
        """The training text, or blocks spread evenly over it that come to about `limit` bytes."""
        share = min(1.0, limit / max(1, self.bytes))
        number = 0
        for text, _, _, held_out in self:
            if held_out:
                continue
            if share == 1.0:
                yield text
                continue
            for start in range(0, len(text), BLOCK):
                number += 1
                if int(number * share) > int((number - 1) * share):
                    yield text[start : start + BLOCK]

    def _read(self) -> Iterator[Entry]:
        with self._path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield Entry(*json.loads(line))
