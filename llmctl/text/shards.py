"""Tokens on disk, and the endless, exactly resumable stream of batches that training reads from them.

    index.json       {"dtype", "vocab_size", "bos", "eos", "splits": {split: {"tokens", "documents", "bytes", "shards",
                     "sources": [{"source", "tokens"}]}}}, a split's documents lying source after source
    train-00000.bin  little-endian uint16 (uint32 above 65,536 pieces): a document is `<s> ids </s>`
                     (or other marks, as the tokenizer has them: text/tokenizer.py says who adds what)

Shards are memory-mapped: a corpus of any size costs no memory. B batch, T max_seq_length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmctl.errors import DataError
from llmctl.text import order

if TYPE_CHECKING:
    from llmctl.text.tokenizer import Tokenizer

INDEX = "index.json"
SHARD_TOKENS = 64 << 20  # a shard is closed at the first document that ends beyond this

Ids = npt.NDArray[np.int64]
Bytes = bytes  # where `bytes` names a count


class Writer:
    """Writes the splits of a corpus: `add` documents, then `close`; as a context it closes itself."""

    def __init__(
        self, folder: Path, vocab_size: int, bos: int | None, eos: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._limit = folder, shard_tokens
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._bos, self._eos = [] if bos is None else [bos], [eos]
        self._splits: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Any] = {}
        self.bytes = 0  # of text so far
        self.index = {
            "dtype": self._dtype.name,
            "vocab_size": vocab_size,
            "bos": bos,
            "eos": eos,
            "splits": self._splits,
        }

    def add(self, split: str, ids: Sequence[int], bytes_: int, source: str = "") -> None:
        """Appends a document to a split; `bytes_` is the size of its text in UTF-8."""
        entry = self._splits.setdefault(split, {"tokens": 0, "documents": 0, "bytes": 0, "shards": [], "sources": []})
        if split not in self._open:
            name = f"{split}-{len(entry['shards']):05}.bin"
            self._open[split] = (self._folder / name).open("wb")
            entry["shards"].append({"file": name, "tokens": 0, "documents": 0})
        document = np.array([*self._bos, *ids, *self._eos], dtype=self._dtype)
        self._open[split].write(document.tobytes())
        shard = entry["shards"][-1]
        if not entry["sources"] or entry["sources"][-1]["source"] != source:
            entry["sources"].append({"source": source, "tokens": 0})
        for counts in (entry, shard, entry["sources"][-1]):
            counts["tokens"] += len(document)
        for counts in (entry, shard):
            counts["documents"] += 1
        entry["bytes"] += bytes_
        self.bytes += bytes_
        if shard["tokens"] >= self._limit:
            self._open.pop(split).close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the shards and writes the index."""
        while self._open:
            self._open.popitem()[1].close()
        (self._folder / INDEX).write_text(json.dumps(self.index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Shards:
    """One split of a corpus as one long sequence of tokens."""

    parts: tuple[npt.NDArray[np.unsignedinteger[Any]], ...]
    starts: tuple[int, ...]  # of each part in the sequence, and the end
    vocab_size: int
    bos: int | None
    eos: int
    documents: int
    bytes: int  # of the text in UTF-8: what bits per byte divides by
    sources: tuple[tuple[str, int], ...] = ()  # of [prep] sources in the order of the tokens, and how many of each

    @classmethod
    def open(cls, folder: Path, split: str) -> Shards:
        """Maps a split of a tokens artifact.

        Raises:
            DataError: no index, no such split, or a shard that is not as long as the index says.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            entry = index["splits"][split]
            dtype = np.dtype(index["dtype"]).newbyteorder("<")
            shards = [(str(shard["file"]), int(shard["tokens"])) for shard in entry["shards"]]
            sources = tuple((str(run["source"]), int(run["tokens"])) for run in entry.get("sources", []))
        except FileNotFoundError:
            raise DataError(
                "no token shards here (index.json is missing)", file=folder, hint="llmctl prep makes them"
            ) from None
        except (ValueError, KeyError, TypeError) as reason:
            raise DataError(
                f"the index is damaged or has no split {split!r} ({reason})",
                file=path,
                hint="llmctl prep makes it anew",
            ) from None
        parts: list[npt.NDArray[np.unsignedinteger[Any]]] = []
        for name, tokens in shards:
            file = folder / Path(name).name
            size = file.stat().st_size if file.is_file() else 0
            if size != tokens * dtype.itemsize:
                message = f"the shard has {size:,} bytes; the index says {tokens * dtype.itemsize:,}"
                raise DataError(message, file=file, hint="llmctl prep makes it anew")
            parts.append(np.memmap(file, dtype=dtype, mode="r"))
        starts = tuple(int(start) for start in np.cumsum([0, *(len(part) for part in parts)]))
        bos, eos, documents, bytes_ = index["bos"], index["eos"], entry["documents"], entry["bytes"]
        return cls(tuple(parts), starts, index["vocab_size"], bos, eos, documents, bytes_, sources)

    def __len__(self) -> int:
        """Tokens, with the `<s>` and `</s>` of each document."""
        return self.starts[-1]

    def __getitem__(self, span: slice) -> Ids:
        """Tokens [a:b] as int64, across the edges of shards."""
        start, stop, step = span.indices(len(self))
        assert step == 1
        found = [
            part[max(0, start - first) : max(0, stop - first)]
            for part, first in zip(self.parts, self.starts, strict=False)
            if first < stop and start < first + len(part)
        ]
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, dtype=np.int64)

    def documents_ids(self) -> Iterator[Ids]:
        """The ids of each document, without its `<s>` and `</s>`."""
        for part in self.parts:  # a document lies in one shard
            start = 0
            for end in np.flatnonzero(part == self.eos):
                begin = start + (self.bos is not None and part[start] == self.bos)
                yield part[begin:end].astype(np.int64)
                start = int(end) + 1

    def text(self, tokenizer: Tokenizer) -> Bytes:
        """The split's text in UTF-8, one document after the other, as far as the tokenizer gives back what it read."""
        return b"".join(tokenizer.decode(ids.tolist()).encode() for ids in self.documents_ids())


@dataclass(frozen=True)
class Windows:
    """The windows of T + 1 tokens that a stretch of a split is cut into, neighbours sharing one.

    Each epoch cuts at another offset and shuffles, both drawn from the seed and the epoch. Nothing is kept of it.
    """

    first: int  # token
    tokens: int
    length: int  # T
    seed: tuple[int, ...]

    @property
    def count(self) -> int:
        """Windows in an epoch: those that fit at every offset, at least one."""
        return max(1, (self.tokens - self.length) // self.length)

    def starts(self, numbers: Ids) -> Ids:
        """The first token of each window, by its number since the first of the first epoch."""
        epochs, within = np.divmod(numbers, self.count)
        found = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            random, here = np.random.default_rng([*self.seed, int(epoch)]), epochs == epoch
            offset = random.integers(min(self.length, self.tokens - self.count * self.length))
            keys = random.integers(2**63 - 1, size=order.ROUNDS)
            found[here] = self.first + offset + order.shuffled(within[here], self.count, keys) * self.length
        return found


def batches(
    shards: Shards,
    *,
    seed: int,
    max_seq_length: int,
    batch_size: int,
    position: int = 0,
    mixture: Mapping[str, float] | None = None,
) -> Iterator[tuple[Ids, int]]:
    """Samples (B, T+1) without end, with the position after them: the next T tokens and, shifted by one, their targets.

    `position` counts samples since the start, and everything follows from it, so a run resumes on the exact next
    sample, and the order of samples is the same whatever the batch size.

    Args:
        mixture: how much is drawn of each source, in any unit; 0 draws none. A sample is then of one source. Left out:
            the split as it is, from one end to the other.

    Raises:
        DataError: the split, or a source of the mixture, is shorter than one window; or prep knows no such source.
    """
    if mixture is None:
        parts, mixed = [Windows(0, _long_enough(len(shards), max_seq_length), max_seq_length, (seed,))], None
    else:
        drawn = {name: weight for name, weight in mixture.items() if weight > 0}
        parts = [
            Windows(first, _long_enough(tokens, max_seq_length, name), max_seq_length, (seed, number))
            for number, (name, (first, tokens)) in enumerate((name, _stretch(shards, name)) for name in drawn)
        ]
        mixed = order.Mixture(list(drawn.values()))
    while True:
        numbers = np.arange(position, position + batch_size)
        owner, numbers = (np.zeros_like(numbers), numbers) if mixed is None else mixed(numbers)
        batch = np.empty((batch_size, max_seq_length + 1), dtype=np.int64)
        for index, part in enumerate(parts):
            rows = np.flatnonzero(owner == index)
            for row, start in zip(rows, part.starts(numbers[rows]), strict=True):
                batch[row] = shards[int(start) : int(start) + max_seq_length + 1]
        position += batch_size
        yield batch, position


def _stretch(shards: Shards, source: str) -> tuple[int, int]:
    """The first token of a source, and how many there are."""
    first = 0
    for name, tokens in shards.sources:
        if name == source:
            return first, tokens
        first += tokens
    raise DataError(
        f"prep has no training text of {source!r}", hint="see its funnel: perhaps every document of it is a duplicate"
    )


def _long_enough(tokens: int, max_seq_length: int, source: str = "") -> int:
    if tokens < max_seq_length + 1:
        raise DataError(
            f"{source or 'the split'} has {tokens:,} tokens; a context of {max_seq_length:,} needs one more than "
            "itself",
            hint=f"set [model] max_seq_length = {max(8, tokens // 8)} or less, or add text to [prep] sources",
        )
    return tokens
