"""What happens to a document before it is tokenised: one way to write newlines and characters, nothing twice."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["nfc", "none"]


def normalise(text: str, form: Form) -> str:
    """The text with \\n for newlines, without NUL, and in Unicode's composed form (NFC) if asked for."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        text = text.replace("\0", "")
    if form == "none" or text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


@dataclass
class Cleaner:
    """Cleans documents and counts what it drops, by reason."""

    form: Form
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set)  # 16 bytes a document: a collision among 10^9 has odds of 10^-21

    def clean(self, text: str) -> str | None:
        """The document as it will be, or None where it is empty or was here before."""
        text = normalise(text, self.form)
        if not text or text.isspace():
            self.dropped["empty"] += 1
            return None
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self._seen:
            self.dropped["duplicate"] += 1
            return None
        self._seen.add(digest)
        self.kept += 1
        return text
