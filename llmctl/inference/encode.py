"""Texts as vectors: a sentence encoder over batches of texts of like length.

A text's vector does not depend on its neighbours: padding is masked, and what is left (the order of sums) is below
1e-6. Vectors have length 1, so that a dot product is a cosine.
"""

# N texts, B batch, T tokens, C channels, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.model import hf, packed
from llmctl.model.config import Config
from llmctl.model.jsonfile import read_json
from llmctl.model.transformer import Encoder
from llmctl.text.tokenizer import Tokenizer

Row = npt.NDArray[np.int32]  # the ids of a text, (T,)
Vectors = npt.NDArray[np.float32]  # (N, C)

# Tokens a batch, padding included. all-MiniLM-L6-v2 on one core: 5,700 tokens/s in batches of 128, 8,400 of 1,024,
# 8,300 of 2,048; and a request that is cancelled ends within one batch.
BATCH = 1024
# Characters a token that are read at most. Words that no vocabulary has, and spaces, may be longer than that; but the
# tokenizer takes a second for 2 MB, whatever the model reads of them.
CHARACTERS = 64
TRAINED = "sentence_bert_config.json"  # where sentence-transformers keeps how long the texts of its training were


class Embedder:
    """A sentence encoder.

    Attributes:
        vocab_size: V.
        dimensions: C.
        max_length: tokens that the model reads of a text: as many as it was trained with, where its folder says so.
        longest: tokens that it has positions for.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        """Loads a model folder, to compute in fp32.

        Raises:
            DataError: the folder is damaged, or its model is for something else.
        """
        torch.set_num_threads(device.threads)
        model = hf.load(folder, "fp32", device.torch, mapped=True)
        config = model.config
        if not isinstance(model, Encoder) or config.task != "embedding":
            raise DataError(f"is a {config.family} {config.kind} for {config.task}, not for embeddings", file=folder)
        packed.pack(model)
        self.model = model
        self._take(folder, config)

    def _take(self, folder: Path, config: Config) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.vocab_size, self.dimensions, self.longest = config.vocab_size, config.hidden_size, config.longest
        trained = read_json(folder / TRAINED) if (folder / TRAINED).is_file() else {}
        length = trained.get("max_seq_length")
        self.max_length = min(length, self.longest) if type(length) is int and length > 0 else self.longest
        self._lower = trained.get("do_lower_case") is True

    def ids(self, text: str, max_length: int | None = None) -> tuple[Row, bool]:
        """The ids of a text with all that the tokenizer puts around it, and whether the text had to be cut."""
        limit = max_length or self.max_length
        part = text[: CHARACTERS * limit]
        part = part.lower() if self._lower else part
        ids, _ = self.tokenizer.encode_for_model(part)
        cut = len(ids) > limit
        if cut:
            ids, _ = self.tokenizer.encode_for_model(part, max_length=limit)
        return np.array(ids, np.int32), cut or len(text) > CHARACTERS * limit

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[int]]:
        """The vectors (N, C) of texts, and the places of those that were cut to `max_length`."""
        rows, cut = zip(*map(self.ids, texts), strict=True) if texts else ((), ())
        vectors = np.empty((len(rows), self.dimensions), np.float32)
        for places, found in self.batches(rows):
            vectors[places] = found
        return vectors, [place for place, shortened in enumerate(cut) if shortened]

    def batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Vectors]]:
        """The vectors of ids (N rows, each at least one id), a batch of like length at a time: places and (B, C)."""
        batch: list[int] = []
        for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
            if batch and (len(batch) + 1) * len(rows[place]) > BATCH:
                yield batch, self._forward([rows[place] for place in batch])
                batch = []
            batch.append(place)
        if batch:
            yield batch, self._forward([rows[place] for place in batch])

    def _forward(self, rows: Sequence[Row]) -> Vectors:
        """One batch, padded on the right."""
        if any(not len(row) or row.min() < 0 or row.max() >= self.vocab_size for row in rows):
            raise ValueError(f"token ids lie outside 0 .. {self.vocab_size - 1}, or there are none")
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros(ids.shape, bool)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, True
        return self._run(ids, mask)

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> Vectors:
        """The vectors of (B, T) ids; `mask` (B, T) is false at padding."""
        device = self.model.device
        with torch.inference_mode():
            found = self.model(torch.from_numpy(ids).to(device), mask=torch.from_numpy(mask).to(device))
            vectors: Vectors = found.cpu().numpy()
        return vectors
