"""Ids to text, by the bytes that each piece stands for.

Four kinds of vocabulary are in use, told apart by the decoder that tokenizer.json names:

    ByteLevel            bytes spelled as printable characters: GPT-2, RoBERTa, Llama 3, Qwen, SmolLM, ModernBERT
    Replace, Fuse ...    U+2581 for a space, `<0x..>` for bytes that have no piece: Llama 2, Mistral, Gemma
    Metaspace            U+2581 for a space, no bytes: T5
    WordPiece            `##` goes on with a word, anything else begins one: BERT

The text is what `tokenizers`' decode gives with special tokens skipped, with two exceptions, both on purpose: bytes
that are no UTF-8 become one U+FFFD for each broken sequence (`ByteFallback` makes a whole run of them U+FFFD, the good
ones too), and an added token is the text that it spells (`ByteLevel` takes an added "é" for a byte).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.text.vocabulary import SPACE

_BYTE = re.compile("<0x([0-9A-F]{2})>")
MOST = 1 << 22  # pieces; the largest vocabularies have 262,144
_TIDY = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip"}


class Pieces:
    """The bytes of each piece, in the middle of a text (`table`) and at its beginning (`first`); special ones: none."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        decoder: Any,
        special: Collection[int],
        added: Mapping[int, str],
        shown: Path,
    ) -> None:
        """From the vocabulary (piece to id), tokenizer.json's `decoder`, and the other added pieces by id.

        Raises:
            DataError: a decoder of another kind.
        """
        decoder = decoder or {}
        steps = [decoder] if "decoders" not in decoder else list(decoder["decoders"])
        kinds = {step.get("type") for step in steps}
        size = max(vocabulary.values(), default=-1) + 1
        if size > MOST:
            raise DataError(f"ids up to {size - 1:,}; {MOST:,} pieces are read", file=shown / "tokenizer.json")
        self.table = [b""] * size
        if kinds == {"ByteLevel"}:
            spell = _byte_level
        elif kinds == {"WordPiece"}:
            spell = _word_piece(steps[0])
        elif kinds == {"Metaspace"} or (kinds and kinds <= _SENTENCEPIECE):
            spell = _sentencepiece(kinds)
        else:
            names = ", ".join(sorted(map(str, kinds - {None}))) or "none"
            raise DataError(
                f"tokenizers with this decoder are not supported: {names}",
                file=shown / "tokenizer.json",
                hint="ByteLevel (GPT-2), Replace with ByteFallback (Llama 2), Metaspace (T5), WordPiece (BERT) are",
            )
        for piece, index in vocabulary.items():
            self.table[index] = spell(piece)
        for index, text in added.items():
            self.table[index] = text.encode() if spell is _byte_level else spell(text)
        for index in special:
            self.table[index] = b""
        self.first = self.table
        if kinds == {"WordPiece"}:
            self.first = self.table.copy()
            for piece, index in vocabulary.items():
                self.first[index] = piece.encode()
        elif any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps):
            self.first = [piece.replace(b" ", b"") for piece in self.table]
        elif any(step["type"] == "Strip" and step.get("start") for step in steps):
            self.first = [piece.removeprefix(b" ") for piece in self.table]


class Stream:
    """Ids to text, one at a time: `push` gives what is complete, `flush` the rest."""

    def __init__(self, pieces: Pieces, after: Sequence[int] = ()) -> None:
        """`after` are the ids before: where they end in text, the first piece is not at a beginning."""
        self._table = pieces.table
        going_on = bool(after) and 0 <= after[-1] < len(self._table) and bool(self._table[after[-1]])
        self._now = pieces.table if going_on else pieces.first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that this id completes: never half a character. Special and unknown ids give nothing."""
        if not 0 <= index < len(self._table) or not self._table[index]:
            return ""
        piece, self._now = self._now[index], self._table
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left when no id follows."""
        return self._decoder.decode(b"", final=True)


def _byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for: printable Latin-1 itself, the others U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


ALPHABET = _byte_level_alphabet()
# For str.translate, which is five times faster than a loop; Latin-1 outside the alphabet must fail to encode below.
_TO_LATIN_1 = {ord(char): byte for char, byte in ALPHABET.items()} | {
    code: 0xFFFF for code in range(256) if chr(code) not in ALPHABET
}


def _byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:  # not spelled in the alphabet: itself
        return piece.encode()


def _sentencepiece(kinds: set[Any]) -> Any:
    spelled, bytes_ = bool(kinds & {"Replace", "Metaspace"}), "ByteFallback" in kinds

    def spell(piece: str) -> bytes:
        if bytes_ and (byte := _BYTE.fullmatch(piece)) is not None:
            return bytes.fromhex(byte[1])
        return (piece.replace(SPACE, " ") if spelled else piece).encode()

    return spell


def _word_piece(step: Mapping[str, Any]) -> Any:
    """Spells a piece as it stands after another; `cleanup` is what tokenizers' decoders/wordpiece.rs does to each."""
    prefix, cleanup = step.get("prefix", "##"), step.get("cleanup", True)

    def spell(piece: str) -> bytes:
        text = piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
        if cleanup:
            for mark in _TIDY:
                text = text.replace(f" {mark}", mark)
        return text.encode()

    return spell
