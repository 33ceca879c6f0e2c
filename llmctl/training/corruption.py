"""What is hidden from a model that learns by filling in: tokens or words (BERT), spans (T5), blanks (GLM).

Everything random follows from (seed, number of the sample), so a resumed run, another batch size and a validation
with its fixed seed hide the same tokens.
"""

# T tokens of a window

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from llmctl.errors import RecipeError
from llmctl.text.words import Words
from llmctl.training.batch import IGNORED, Ids

Flags = npt.NDArray[np.bool_]

DENSITY = 0.15  # share of the tokens that are hidden, in BERT (arXiv:1810.04805) as in T5 (arXiv:1910.10683)
MEAN_SPAN = 3.0  # tokens of a span: T5, section 3.3.4
REPLACED, SWAPPED = 0.8, 0.1  # BERT, section 3.1: by the mask, by a random token; the rest stays as it is


def generator(seed: int, sample: int) -> np.random.Generator:
    """The randomness of one sample; of another stream than the order of samples, which (seed, epoch) decides."""
    return np.random.default_rng([sample, seed, 0xC0FFEE])


def mask(
    ids: Ids,
    random: np.random.Generator,
    *,
    mask_id: int,
    special: Ids,
    ordinary: Ids,
    words: Words | None = None,
) -> tuple[Ids, Ids]:
    """BERT's masking of a window, (T,) -> what the model reads and its labels, (T,) each.

    `DENSITY` of the tokens that are not `special`, at least one, are to be predicted. A random token is one of
    `ordinary`. With `words` the tokens of a word are chosen together, so that none gives the others away: no more than
    as many tokens, and what each then reads is drawn apart (BERT's "Whole Word Masking" models of May 2019).
    """
    candidates = np.flatnonzero(~np.isin(ids, special))
    count = min(len(candidates), max(1, round(len(candidates) * DENSITY)))
    chosen = random.permutation(candidates)[:count]
    if words is not None:
        chosen = _whole(candidates, words.numbers(ids)[candidates], count, random)
        count = len(chosen)
    labels = np.full_like(ids, IGNORED)
    labels[chosen] = ids[chosen]
    fate = random.random(count)
    read = ids.copy()
    read[chosen[fate < REPLACED]] = mask_id
    swapped = chosen[(fate >= REPLACED) & (fate < REPLACED + SWAPPED)]
    read[swapped] = random.choice(ordinary, len(swapped))
    return read, labels


def _whole(candidates: Ids, numbers: Ids, count: int, random: np.random.Generator) -> Ids:
    """Those of the candidates, `numbers` of whose words are given, that are in words drawn until `count` is full."""
    _, word, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    fitting = np.flatnonzero(sizes <= count)
    drawn = random.permutation(fitting)
    drawn = drawn[np.cumsum(sizes[drawn]) <= count]
    return candidates[np.isin(word, drawn)] if len(fitting) else random.permutation(candidates)[:count]


def spans(ids: Ids, random: np.random.Generator, *, sentinels: Ids, eos: int) -> tuple[Ids, Ids]:
    """T5's span corruption of a window, (T,) -> inputs and targets, whose lengths depend on T alone.

    Inputs: the text with each hidden span replaced by a sentinel of its own. Targets: each sentinel and the span it
    stands for, then `eos`. Text between two documents is hidden like any other: a span may hold the end of one.
    """
    hidden = noise(len(ids), random)
    return _without(ids, hidden, sentinels), np.append(_without(ids, ~hidden, sentinels), eos)


def blanks(ids: Ids, random: np.random.Generator, *, sentinels: Ids, eos: int, pad: int) -> tuple[Ids, Ids]:
    """Blank infilling of a window for a decoder, (T + 1,) -> what it reads and its labels, (T,) each.

    As in GLM (Du et al. 2021, arXiv:2103.10360, section 2.1): spans are cut out of a text and follow it in a random
    order; only they are supervised. Each is replaced by a sentinel of its own, which it then follows, and `eos` ends
    it: GLM's one [MASK], [START] and [END], and its second position encoding, which says to which blank a span belongs.
    Unlike there the text with its blanks is read causally, since a decoder's attention is: from left to right.

    The text is as long as leaves room for the spans, which take three more tokens each; what is left over is padding.
    """
    text = ids[: blanks_length(len(ids))]
    hidden = noise(len(text), random)
    edges = np.flatnonzero(np.diff(hidden, prepend=False, append=False)).reshape(-1, 2)
    said, counts = (
        [_without(text, hidden, sentinels)],
        [np.zeros(len(text) - hidden.sum() + len(edges), dtype=np.bool_)],
    )
    for span in random.permutation(len(edges)):
        first, end = edges[span]
        said += [sentinels[span : span + 1], text[first:end], np.array([eos])]
        counts += [np.array([False]), np.ones(end - first + 1, dtype=np.bool_)]
    whole, supervised = np.concatenate(said), np.concatenate(counts)
    left = len(ids) - len(whole)
    read = np.concatenate((whole[:-1], np.full(left, pad)))
    return read, np.concatenate((np.where(supervised[1:], whole[1:], IGNORED), np.full(left, IGNORED)))


@functools.cache
def blanks_length(room: int) -> int:
    """The longest text that, with blanks and what fills them, takes at most `room` tokens."""
    return next(length for length in range(room, 1, -1) if length + 3 * span_count(length) <= room)


def noise(length: int, random: np.random.Generator) -> Flags:
    """Which of `length` tokens are hidden: spans of random lengths that begin after the first token and never touch.

    The numbers of tokens and of spans are fixed (`random_spans_noise_mask` of T5's preprocessors).
    """
    tokens = min(max(round(length * DENSITY), 1), length - 1)
    count = span_count(length)
    kept, gone = _partition(length - tokens, count, random), _partition(tokens, count, random)
    return np.repeat(np.tile([False, True], count), np.stack((kept, gone), axis=1).ravel())


def span_count(length: int) -> int:
    """How many spans of a window of `length` tokens are hidden."""
    tokens = min(max(round(length * DENSITY), 1), length - 1)
    return min(max(round(tokens / MEAN_SPAN), 1), length - tokens)


def check_sentinels(length: int, sentinels: int) -> None:
    """Raises RecipeError where a window has more spans than the vocabulary has sentinels."""
    if span_count(length) > sentinels:
        most = max(fits for fits in range(2, length) if span_count(fits) <= sentinels)
        raise RecipeError(
            f"[model] max_seq_length = {length:,} hides {span_count(length)} spans of a text, but the vocabulary has "
            f"{sentinels} sentinels (<extra_id_0> and so on) to mark them",
            hint=f"set max_seq_length = {most} or less",
        )


def _partition(total: int, parts: int, random: np.random.Generator) -> Ids:
    """`total` as `parts` positive numbers, every way equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def _without(ids: Ids, gone: Flags, sentinels: Ids) -> Ids:
    """The ids with each run of `gone` ones replaced by the next sentinel."""
    first = gone & ~np.concatenate(([False], gone[:-1]))
    marked = np.where(first, sentinels[np.maximum(np.cumsum(first) - 1, 0)], ids)
    return marked[~gone | first]
