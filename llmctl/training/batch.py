"""What one optimiser step learns from."""

# B batch, T time

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]

IGNORED = -100  # a label that is not supervised (torch's and Hugging Face's convention)
FEW = 0.75  # share of the labels that count, below which only their states go through the head
AHEAD = 2  # batches that are ready before they are asked for


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimiser step, and where the loader stands after them."""

    inputs: tuple[Ids, ...]  # what the model reads, (B, T) each: ids, and for an encoder-decoder the decoder's ids
    labels: Ids  # (B, T) of the last input, IGNORED where nothing is supervised
    position: int = 0
    documents: Ids | None = None  # (B, T) of packed sequences: tokens see only those of the same number

    def __len__(self) -> int:
        """Sequences."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """Positions that go through the model."""
        return sum(part.size for part in self.inputs)

    @property
    def supervised(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())

    def rows(self, which: slice) -> Batch:
        """Some of the sequences."""
        return dataclasses.replace(
            self,
            inputs=tuple(part[which] for part in self.inputs),
            labels=self.labels[which],
            documents=None if self.documents is None else self.documents[which],
        )

    def tensors(self, device: torch.device) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The arguments of `objectives.Learner`, on a device; where few labels count, with the places of those."""

        def moved(part: Ids) -> torch.Tensor:
            there = torch.from_numpy(part)
            return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)

        named = {} if self.documents is None else {"documents": moved(self.documents)}
        if self.supervised < FEW * self.labels.size:
            named["at"] = moved(np.flatnonzero(self.labels != IGNORED))
        return [moved(part) for part in (*self.inputs, self.labels)], named


def ahead(batches: Iterator[Batch], count: int = AHEAD) -> Iterator[Batch]:
    """The same batches, made by a thread while the step computes. What goes wrong there is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(count)
    over = threading.Event()

    def put(what: Batch | BaseException | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(what, timeout=0.1)
                break

    def make() -> None:
        try:
            for batch in batches:
                put(batch)
                if over.is_set():
                    return
            put(None)
        except BaseException as problem:
            put(problem)

    worker = threading.Thread(target=make, daemon=True, name="batches")
    worker.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        over.set()
        worker.join()
