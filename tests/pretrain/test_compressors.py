"""The yardstick: what zlib and xz themselves make of the same bytes."""

from __future__ import annotations

import lzma
import random
import zlib

import pytest

from llmctl.pretrain import compressors

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "return", "None"]


def text(seed: int, words: int) -> bytes:
    return " ".join(random.Random(seed).choices(WORDS, k=words)).encode()


def test_bits_a_byte_of_the_validation_text() -> None:
    validation, training = text(1, 2_000), text(2, 8_000)
    found = compressors.bits_per_byte(validation, lambda: training)
    assert found["zlib_bits_per_byte"] == 8 * len(zlib.compress(validation, 9)) / len(validation)
    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(validation, preset=9)) / len(validation)
    both, alone = len(lzma.compress(training + validation, preset=9)), len(lzma.compress(training, preset=9))
    assert found["xz_primed_bits_per_byte"] == 8 * (both - alone) / len(validation)
    assert found["xz_primed_bits_per_byte"] < found["xz_bits_per_byte"]


def test_a_text_that_was_seen_costs_next_to_nothing() -> None:
    seen = text(3, 3_000)
    assert compressors.bits_per_byte(seen, lambda: seen)["xz_primed_bits_per_byte"] < 0.1


def test_only_what_xz_can_look_back_at_is_primed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressors, "PRIMING_BYTES", 5_000)
    validation, training = text(1, 1_000), text(2, 8_000)
    tail = compressors.bits_per_byte(validation, lambda: training[-5_000:])
    assert compressors.bits_per_byte(validation, lambda: training) == tail


def test_in_the_background_it_is_the_same() -> None:
    validation, training = text(1, 500), text(2, 2_000)
    waited = compressors.InBackground(lambda: validation, lambda: training).wait()
    assert waited == compressors.bits_per_byte(validation, lambda: training)


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for() -> None:
    def broken() -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        compressors.InBackground(broken, lambda: b"x").wait()
