"""Fill-in-the-middle (Bavarian et al. 2022, arXiv:2207.14255): a text with its middle moved to its end, so that a model
that reads from left to right learns to say what stands between two texts.

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle </s>
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle </s>

Applied inside the window, document by document ("context level", which the paper finds better than before documents are
packed), to characters, so that a blank may begin inside a token; half of them as PSM, half as SPM (the paper's second
variant of it, which it trains jointly with PSM). Every token is supervised, as there. The end of text says that the
middle has met the suffix, so a document that the window cuts off has one, too.
"""

# T tokens of a window

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmctl.text.tokenizer import Tokenizer
from llmctl.text.vocabulary import FIM
from llmctl.training.batch import IGNORED, Ids

SHORTEST = 8  # tokens: what is shorter stays as it is


@dataclass(frozen=True)
class Middle:
    """How the texts of one vocabulary are rearranged, `rate` of them."""

    tokenizer: Tokenizer
    rate: float
    prefix: int
    middle: int
    suffix: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, end: int) -> Middle:
        """Raises DataError where the vocabulary has no pieces for it."""
        prefix, middle, suffix = map(tokenizer.special, FIM)
        return cls(tokenizer, rate, prefix, middle, suffix, end)

    def frame(self, ids: Ids, random: np.random.Generator, pad: int) -> tuple[Ids, Ids]:
        """A window, (T + 1,) -> what the model reads and its labels, (T,) each. What no longer fits is cut off."""
        made: list[int] = []
        for piece in np.split(ids, np.flatnonzero(ids == self.end) + 1):
            room = len(ids) - len(made)
            made += self.moved(piece.tolist(), random, room) if random.random() < self.rate else piece.tolist()[:room]
        short = len(ids) - len(made)  # rarely: a part of a text may take fewer tokens than it took within the whole
        labels = np.array([*made[1:], *[IGNORED] * short])
        return np.array([*made, *[pad] * short])[:-1], labels

    def moved(self, ids: list[int], random: np.random.Generator, room: int) -> list[int]:
        """A document, or what a window has of one, rearranged to at most `room` tokens."""
        head = ids[:1] if ids[:1] == [self.tokenizer.begin_id] else []
        body = [id for id in ids[len(head) :] if id != self.end][: max(0, room - len(head) - 4)]
        text = self.tokenizer.decode(body).strip("\ufffd")  # without the halves of characters that were cut
        if len(body) < SHORTEST:
            return ids[:room]
        first, last = sorted(random.integers(0, len(text) + 1, 2).tolist())
        prefix, middle, suffix = map(self.tokenizer.encode, (text[:first], text[first:last], text[last:]))
        over = max(0, len(head) + len(prefix) + len(middle) + len(suffix) + 4 - room)
        if over > len(suffix):
            return ids[:room]
        suffix = suffix[: len(suffix) - over]  # its end may as well be where the window's was
        if random.random() < 0.5:
            said = [self.prefix, *prefix, self.suffix, *suffix, self.middle, *middle]
        else:
            said = [self.prefix, self.suffix, *suffix, self.middle, *prefix, *middle]
        return [*head, *said, self.end]
