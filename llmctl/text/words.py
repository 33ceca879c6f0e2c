"""Which tokens make a word, told from the bytes of their pieces, so for every vocabulary that can be decoded."""

from __future__ import annotations

import unicodedata

import numpy as np
import numpy.typing as npt

from llmctl.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]


class Words:
    """The words of texts in one vocabulary.

    As BERT's basic tokenizer cuts them: runs of letters and digits of any script; a Chinese character, a kana or a
    punctuation mark is a word by itself, and white space begins one. How a vocabulary spells this
    (SentencePiece U+2581, byte-level U+0120, WordPiece ##) makes no difference: its pieces' bytes say it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [tokenizer.token_bytes(index) for index in range(len(tokenizer))]
        self._goes_on = np.array([_goes_on(piece) for piece in pieces])
        self._is_open = np.array([_is_open(piece) for piece in pieces])

    def numbers(self, ids: Ids) -> Ids:
        """The number of the word that each token belongs to, (T,) -> (T,), counted from the first."""
        begins = ~(self._goes_on[ids] & np.concatenate(([False], self._is_open[ids[:-1]])))
        return np.cumsum(begins) - 1


def _goes_on(piece: bytes) -> bool:
    """Whether a piece goes on with a word that stands before it."""
    if not piece or 0x80 <= piece[0] < 0xC0:  # special; the rest of a character that another piece begins
        return bool(piece)
    return _is_letter(piece.decode("utf-8", "ignore")[:1], piece[0])


def _is_open(piece: bytes) -> bool:
    """Whether a word that ends in a piece may go on behind it."""
    text = piece.decode("utf-8", "ignore")
    cut_off = bool(piece) and piece[-1] >= 0x80 and not piece.endswith(text[-1:].encode() or b"\0")
    return cut_off or (bool(piece) and _is_letter(text[-1:], piece[-1]))


def _is_letter(char: str, byte: int) -> bool:
    """Whether a character is one of many in a word. Of one that has only begun: by the byte that begins it."""
    if not char:
        return 0xC3 <= byte < 0xE0  # Latin, Greek, Cyrillic, Hebrew, Arabic
    wide = unicodedata.name(char, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
    return (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")) and not wide
