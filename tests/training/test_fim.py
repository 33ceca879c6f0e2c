"""Fill-in-the-middle: every document can be put together again, in both orders, within the window."""

from __future__ import annotations

import numpy as np
import pytest

from llmctl.text import tokenizer
from llmctl.text.tokenizer import Tokenizer
from llmctl.training.batch import IGNORED, Ids
from llmctl.training.corruption import generator
from llmctl.training.fim import Middle

TEXTS = [
    f"def add_{name}(a, b):\n    return a + b  # {name}: größer, 更大\n" for name in ("one", "two", "three", "four")
]
PAD = 3


@pytest.fixture(scope="module", params=["bpe", "char", "byte"])
def pieces(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer.train(TEXTS * 20, type=request.param, vocab_size=380)


def marks(pieces: Tokenizer) -> tuple[int, int, int]:
    prefix, suffix, middle = (pieces.special(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle"))
    return prefix, suffix, middle


def together(piece: list[int], pieces: Tokenizer) -> tuple[str, str]:
    """The text of a document as it was, and in which order it came."""
    prefix, suffix, middle = marks(pieces)
    if piece[:1] == [pieces.begin_id]:
        piece = piece[1:]
    if prefix not in piece:
        return pieces.decode(piece), "as it is"
    assert piece[0] == prefix
    assert [piece.count(mark) for mark in (prefix, suffix, middle)] == [1, 1, 1]
    at, last = piece.index(suffix), piece.index(middle)
    before, behind, said = (pieces.decode(part) for part in (piece[1:at], piece[at + 1 : last], piece[last + 1 :]))
    return (before + said + behind, "PSM") if before else (said + behind, "SPM")


def window(pieces: Tokenizer, length: int) -> Ids:
    ids: list[int] = []
    while len(ids) < length:
        ids += [*pieces.prompt(TEXTS[len(ids) % 4]), pieces.end_id or 0]
    return np.array(ids[:length])


def documents(read: Ids, labels: Ids, pieces: Tokenizer) -> list[list[int]]:
    """What a batch's row holds, cut behind each end of text; what is read is what was to be said before."""
    whole = [*read.tolist(), int(labels[-1])]
    assert all(label in (following, IGNORED) for label, following in zip(labels.tolist(), whole[1:], strict=True))
    count = int((labels != IGNORED).sum()) + 1
    assert (labels[: count - 1] != IGNORED).all()  # every token counts; padding, behind them, does not
    assert set(whole[count:]) <= {PAD, IGNORED}
    ids = np.array(whole[:count])
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == pieces.end_id) + 1) if len(part)]


def test_every_document_can_be_put_together_again(pieces: Tokenizer) -> None:
    """Of each that the window holds whole; a later one may be cut off, or no longer fit."""
    hide, seen = Middle.of(pieces, 0.7, pieces.end_id or 0), list[str]()
    ids = window(pieces, 700 if len(pieces) < 310 else 400)
    for sample in range(60):
        read, labels = hide.frame(ids, generator(1, sample), PAD)
        assert len(read) == len(labels) == len(ids) - 1
        found = documents(read, labels, pieces)
        for number, part in enumerate(found[:-1]):
            text, how = together([id for id in part if id != pieces.end_id], pieces)
            assert part[0] == pieces.begin_id
            assert part[-1] == pieces.end_id
            seen.append(how)
            if number < len(found) - 2:
                assert text in TEXTS
    shares = {how: seen.count(how) / len(seen) for how in ("as it is", "PSM", "SPM")}
    assert shares["as it is"] == pytest.approx(0.3, abs=0.1)
    assert shares["SPM"] == pytest.approx(0.35, abs=0.12)  # a PSM whose prefix is empty looks like one
    assert shares["PSM"] == pytest.approx(0.35, abs=0.12)


def test_a_document_that_is_cut_off_has_an_end_and_its_middle(pieces: Tokenizer) -> None:
    """Only its suffix is shorter: the text goes on where the window ends anyhow."""
    hide, text = Middle.of(pieces, 1.0, pieces.end_id or 0), TEXTS[0] * 3
    ids = np.array(pieces.encode(text)[20:60])  # neither its beginning nor its end
    expected, left = pieces.decode(ids.tolist()), 0
    for sample in range(40):
        read, labels = hide.frame(ids, generator(2, sample), PAD)
        (part,) = documents(read, labels, pieces)
        if part == ids.tolist():  # cut into three it takes more tokens, and its suffix is too short to be cut
            left += 1
            continue
        assert (part[0], part[-1]) == (marks(pieces)[0], pieces.end_id)
        text, _ = together(part[:-1], pieces)
        assert expected.startswith(text)
        assert len(text) > 0.6 * len(expected)
    assert left < 10


def test_middles_begin_inside_words(pieces: Tokenizer) -> None:
    """Cut by characters: every place of a text is as likely, not only those between two tokens."""
    hide, places = Middle.of(pieces, 1.0, pieces.end_id or 0), set[int]()
    ids = np.array([*pieces.prompt(TEXTS[0]), pieces.end_id, *pieces.prompt(TEXTS[1])])
    for sample in range(300):
        read, labels = hide.frame(ids, generator(3, sample), PAD)
        part = documents(read, labels, pieces)[0]
        prefix, suffix, _ = marks(pieces)
        places.add(len(pieces.decode(part[part.index(prefix) + 1 : part.index(suffix)])))
    assert len(places) > 0.8 * len(TEXTS[0])


def test_what_must_not_be_moved(pieces: Tokenizer) -> None:
    hide = Middle.of(pieces, 1.0, pieces.end_id or 0)
    for ids in ([5, 6, 7], pieces.encode("abcdefg")[:7], []):
        assert hide.moved(ids, generator(1, 1), 100) == ids


def test_a_window_may_begin_and_end_inside_a_character(pieces: Tokenizer) -> None:
    """The halves are left out: they are no text."""
    hide, ids = Middle.of(pieces, 1.0, pieces.end_id or 0), pieces.encode("\U0001f600" * 8)
    if len(ids) > 8:  # spelled in bytes
        part = hide.moved(ids[1:-1], generator(1, 1), 100)
        assert together(part[:-1], pieces)[0] == "\U0001f600" * 6


def test_a_sample_is_rearranged_in_the_same_way_every_time(pieces: Tokenizer) -> None:
    hide, ids = Middle.of(pieces, 0.5, pieces.end_id or 0), window(pieces, 200)
    one, same, sample, seed = (
        hide.frame(ids, generator(*at), PAD)[0].tolist() for at in ((1, 7), (1, 7), (1, 8), (2, 7))
    )
    assert one == same
    assert one != sample
    assert one != seed
