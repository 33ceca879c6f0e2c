"""What general-purpose compressors make of the validation text: the yardstick a language model has to beat.

A model has read the training text, so the fair opponent has too: `xz primed` is the size of training and validation
text
compressed together, less the size of the training text alone.
"""

from __future__ import annotations

import lzma
import threading
import zlib
from collections.abc import Callable

PRIMING_BYTES = 64 * 2**20  # xz -9 looks no further back than its 64 MiB dictionary


def bits_per_byte(validation: bytes, training: Callable[[], bytes]) -> dict[str, float]:
    """zlib, xz and primed xz, each at level 9, in bits a byte of the validation text."""
    tail = training()[-PRIMING_BYTES:]
    primed = len(_xz(tail + validation)) - len(_xz(tail))
    sizes = {"zlib": len(zlib.compress(validation, 9)), "xz": len(_xz(validation)), "xz_primed": primed}
    return {f"{name}_bits_per_byte": 8 * size / len(validation) for name, size in sizes.items()}


def _xz(data: bytes) -> bytes:
    """As `xz -9`; a dictionary longer than the text would find nothing more, and take 12 bytes for each of its own."""
    longest = min(PRIMING_BYTES, max(4096, len(data)))
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": longest}])


class InBackground:
    """The same, on a thread of its own: liblzma lets go of the interpreter, and training need not wait for it."""

    def __init__(self, validation: Callable[[], bytes], training: Callable[[], bytes]) -> None:
        self._found: dict[str, float] = {}
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(validation, training), daemon=True)
        self._thread.start()

    def _work(self, validation: Callable[[], bytes], training: Callable[[], bytes]) -> None:
        try:
            self._found = bits_per_byte(validation(), training)
        except Exception as problem:
            self._problem = problem

    def wait(self) -> dict[str, float]:
        """The figures, when they are there; what went wrong in the background is raised here."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        return self._found
