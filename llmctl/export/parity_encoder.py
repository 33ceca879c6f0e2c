"""The gate's questions to encoders and encoder-decoders: the shape of the report is parity.py's.

An encoder is given texts of odd lengths in one batch, padded, and must say of each what torch says of it alone; a model
that fills in masks also reads text with every seventh token masked. An encoder-decoder reads padded sources, writes in
pieces, and goes its own greedy way; its text is windows cut in two, the second half to be said of the first.

B rows, S source tokens, T tokens, C channels, V vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.device import Device
from llmctl.export import parity, tolerance
from llmctl.inference.onnx_encoder import EncoderRunner
from llmctl.inference.onnx_seq2seq import Seq2SeqRunner
from llmctl.model import hf
from llmctl.model.transformer import Encoder, EncoderDecoder

# The lengths of the texts of a batch.
BATCHES: dict[str, tuple[int, ...]] = {
    "one token": (1,),
    "odd length": (7,),
    "long text": (257,),
    "batch": (16, 16, 16),
    "padded batch": (5, 1, 13, 16),
    "texts": (61, 37, 90, 11, 23),
}
# The lengths of the sources of a batch, and the pieces in which tokens are written, all rows alike.
PAIRS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "past 0": ((9,), (1,)),
    "past 1": ((9,), (1, 1)),
    "past N": ((33,), (33, 1, 1)),
    "chunks": ((1,), (1, 8, 13, 2, 33)),
    "long": ((257,), (140, 1)),
    "batch": ((16, 16, 16), (7, 1)),
    "padded sources": ((5, 1, 13, 16), (1, 1, 1)),
    "padded sources, chunks": ((61, 37, 90, 11, 23), (3, 5, 1)),
}
MASKED = 7  # every so many tokens one is masked
WINDOW = 256  # tokens of text that are read at once

Pairs = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
Say = Callable[[Any, np.ndarray], np.ndarray]  # what a torch model says of (T,) tokens: (T, V), or (labels,)


def measure(
    model: Path, folder: Path, device: Device, tokens: np.ndarray, text: str, dtype: str, mask_id: int | None
) -> dict[str, Any]:
    """Every figure of the gate, of the graph in `folder` against the model in `model`; see `parity.measure`.

    Args:
        mask_id: what a masked token reads as; where the vocabulary has none the tokens stay, and are to be said again.
    """
    reference = hf.load(model, device=device.torch)
    if isinstance(reference, EncoderDecoder):
        return seq2seq(reference, Seq2SeqRunner(folder, device), tokens, text, dtype)
    assert isinstance(reference, Encoder)
    return encoder(reference, EncoderRunner(folder, device), tokens, text, dtype, mask_id)


def encoder(
    reference: Encoder, candidate: EncoderRunner, tokens: np.ndarray, text: str, dtype: str, mask_id: int | None
) -> dict[str, Any]:
    """`measure` of an encoder."""
    tokens = enough(reference, tokens)

    said = states if reference.config.task == "embedding" else reading
    natural = natural_error(reference, lambda model, ids: said(model, ids[None])[0], tokens, dtype)
    limit = tolerance.limits(dtype, natural, len(tokens) // MASKED)
    checks = [check for name, sizes in BATCHES.items() for check in batch(reference, candidate, name, sizes, tokens)]
    if reference.config.kind == "decoder":  # places are counted from the first real token
        checks += batch(reference, candidate, "padded on the left", (5, 1, 13, 16), tokens, left=True)
    read = None
    if reference.config.task == "masked-lm":
        read = told(masked(reference, candidate, tokens, mask_id), text)
    report = parity.judge(dtype, checks, text=read, limit=limit, session=candidate.session)
    return report if dtype == "fp32" else report | {"natural": {"error": natural[0], "mean_kl": natural[1]}}


def batch(
    reference: Encoder,
    candidate: EncoderRunner,
    name: str,
    sizes: Sequence[int],
    tokens: np.ndarray,
    left: bool = False,
) -> Iterator[dict[str, Any]]:
    """What is found of each text of a padded batch against what the reference says of it alone."""
    texts = cut(tokens, [min(size, reference.config.longest) for size in sizes])
    width, types = max(map(len, texts)), None
    ids, mask = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), bool)
    places = [slice(width - len(row), width) if left else slice(len(row)) for row in texts]
    for at, (row, place) in enumerate(zip(texts, places, strict=True)):
        ids[at, place], mask[at, place] = row, True
    if candidate.takes_types:
        types = np.broadcast_to((np.arange(width) > width // 3).astype(np.int64), ids.shape)
    whole = reference.config.task in ("embedding", "sequence-classification")
    expected = [reading(reference, row[None], types if types is None else types[:1, : len(row)])[0] for row in texts]
    found = candidate.forward(ids, mask, types)
    rows = [[len(row)] for row in texts]
    parts = [found[at] if whole else found[at, place] for at, place in enumerate(places)]
    yield parity.check(name, parts, expected, rows)
    if reference.config.task == "embedding":
        given = None if types is None else [types[:1, : len(row)] for row in texts]
        hidden = [
            states(reference, row[None], given if given is None else given[at])[0] for at, row in enumerate(texts)
        ]
        given_states = candidate.run(ids, mask, types, ["last_hidden_state"])[0]
        yield parity.check(
            f"{name}, states", [given_states[at, place] for at, place in enumerate(places)], hidden, rows
        )


def masked(reference: Encoder, candidate: EncoderRunner, tokens: np.ndarray, mask_id: int | None) -> Pairs:
    """Logits of both at the masked tokens of each window of a text, and those tokens."""
    for part in windows(tokens, candidate.config.longest, candidate.config.vocab_size):
        at, ids = np.arange(MASKED // 2, len(part), MASKED), part.copy()
        if mask_id is not None:
            ids[at] = mask_id
        found = candidate.forward(ids[None], np.ones((1, len(ids)), bool))[0]
        yield reading(reference, ids[None])[0][at], found[at], part[at]


def seq2seq(
    reference: EncoderDecoder, candidate: Seq2SeqRunner, tokens: np.ndarray, text: str, dtype: str
) -> dict[str, Any]:
    """`measure` of an encoder-decoder."""
    tokens = enough(reference, tokens)
    start = np.array(candidate.start_ids, np.int64)

    def said(model: EncoderDecoder, ids: np.ndarray) -> np.ndarray:
        """Of the second half of a text, once the first was read."""
        source, target = np.array_split(ids, 2)
        return written(model, source, np.concatenate([start, target[:-1]]))

    natural = natural_error(reference, said, tokens, dtype)
    limit = tolerance.limits(dtype, natural, len(tokens) // 2)
    checks = [arriving(reference, candidate, name, *pair, tokens) for name, pair in PAIRS.items()]
    run = greedy(reference, candidate, tokens[: min(24, candidate.max_length)], limit.logits)
    pairs = halves(reference, said, candidate, tokens)
    report = parity.judge(dtype, checks, greedy=run, text=told(pairs, text), limit=limit, session=candidate.session)
    return report if dtype == "fp32" else report | {"natural": {"error": natural[0], "mean_kl": natural[1]}}


def arriving(
    reference: EncoderDecoder,
    candidate: Seq2SeqRunner,
    name: str,
    sizes: Sequence[int],
    pieces: Sequence[int],
    tokens: np.ndarray,
) -> dict[str, Any]:
    """The logits of what is written in pieces after padded sources against those of each pair by itself."""
    pieces = parity.shortened(tuple(pieces), min(candidate.max_length, len(tokens)))
    sources = cut(tokens, [min(size, candidate.max_length) for size in sizes])
    targets = cut(tokens[::-1], [sum(pieces)] * len(sources))  # backwards: not what the sources say
    starts = np.full((len(sources), 1), candidate.start_ids[0])
    ids = np.concatenate([starts, np.stack(targets)[:, :-1]], axis=1)
    expected = [written(reference, source, row) for source, row in zip(sources, ids, strict=True)]
    padded, mask = np.zeros((len(sources), max(map(len, sources))), np.int64), None
    for at, source in enumerate(sources):
        padded[at, : len(source)] = source
    if len(set(map(len, sources))) > 1:
        mask = np.arange(padded.shape[1]) < np.array([[len(source)] for source in sources])
    cache, ends = candidate.read(padded, mask), np.cumsum([0, *pieces])
    parts = [candidate.forward(ids[:, begin:end], cache, last_only=False) for begin, end in itertools.pairwise(ends)]
    rows = [[len(source), *pieces] for source in sources]
    return parity.check(name, list(np.concatenate(parts, axis=1)), expected, rows)


def greedy(reference: EncoderDecoder, candidate: Seq2SeqRunner, source: np.ndarray, limit: float) -> dict[str, Any]:
    """See `parity.greedy`: the answer to a source, ends of the text no end to it."""
    count = min(parity.GREEDY, candidate.max_length - 1)
    cache, ids = candidate.begin(source.tolist(), count)
    for _ in range(count):
        ids.append(int(candidate.forward(np.array([ids[-1:]]), cache)[0, -1].argmax()))
    expected = written(reference, source, np.array(ids[:-1]))
    return parity.partings(expected, np.array(ids[1:]), limit)


def halves(reference: EncoderDecoder, said: Say, candidate: Seq2SeqRunner, tokens: np.ndarray) -> Pairs:
    """Logits of both for the second half of each window of a text, read its first, and those tokens."""
    start = np.array(candidate.start_ids, np.int64)
    for part in windows(tokens, candidate.max_length, candidate.vocab_size):
        source, target = np.array_split(part, 2)
        ids, cache = np.concatenate([start, target[:-1]]), candidate.read(source[None])
        yield said(reference, part), candidate.forward(ids[None], cache, last_only=False)[0], target


def told(pairs: Pairs, text: str) -> dict[str, Any]:
    """What `parity.on_text` gives, of logits (T, V) of the reference and of the candidate, and what was right (T,)."""
    sums, count, differences, largest = np.zeros(4), 0, [0.0], 0.0
    for expected, found, right in pairs:
        sums += parity.beside(expected, found, right)
        count += len(right)
        differences.append(float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return parity.told(sums, count, float(np.max(differences)), largest, text)


def natural_error(
    reference: Encoder | EncoderDecoder, said: Say, tokens: np.ndarray, dtype: str
) -> tuple[float, float]:
    """See `parity.natural_error`; the divergence is of logits of tokens alone."""
    if dtype == "fp32":
        return 0.0, 0.0
    longest = reference.config.longest
    texts = cut(tokens, [min(size, longest) for size in (WINDOW, *BATCHES["texts"])])
    expected = [said(reference, text) for text in texts]
    with tolerance.rounding(reference, dtype) as twin:
        found = [said(twin, text) for text in texts]
    error: float = parity.check("", found, expected)["error"]
    if reference.config.task not in ("masked-lm", "seq2seq-lm"):
        return error, 0.0
    sums = [parity.beside(a, b, np.zeros(len(a), np.int64)) for a, b in zip(expected, found, strict=True)]
    return error, float(sum(part[2] for part in sums) / sum(map(len, expected)))


def enough(reference: Encoder | EncoderDecoder, tokens: np.ndarray) -> np.ndarray:
    """As much of a text as the gate may take time for."""
    return tokens[: min(parity.TEXT, max(512, int(parity.TEXT_FLOPS / (2 * reference.config.parameters))))]


def windows(tokens: np.ndarray, longest: int, vocab_size: int) -> Iterator[np.ndarray]:
    """A text in pieces of an even length, what is left over at the end aside unless it is all there is."""
    size = min(WINDOW, longest, max(32, parity.LOGITS // vocab_size), len(tokens)) // 2 * 2
    for start in range(0, len(tokens) - size + 1, size):
        yield tokens[start : start + size]


def cut(tokens: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Pieces of a text of so many tokens, from places spread over it."""
    sizes = [min(size, len(tokens)) for size in sizes]
    starts = np.linspace(0, len(tokens) - max(sizes), len(sizes)).astype(int)
    return [tokens[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def reading(reference: Encoder, ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    """What the reference says of (1, T) ids."""
    with torch.inference_mode():
        given = None if types is None else torch.from_numpy(types.copy()).to(reference.device)
        return np.asarray(
            reference(torch.from_numpy(ids).to(reference.device), token_types=given).float().cpu().numpy()
        )


def states(reference: Encoder, ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    """The last states of (1, T) ids, (1, T, C)."""
    with torch.inference_mode():
        given = None if types is None else torch.from_numpy(types.copy()).to(reference.device)
        found = reference.hidden(torch.from_numpy(ids).to(reference.device), token_types=given)
        return np.asarray(found.float().cpu().numpy())


def written(reference: EncoderDecoder, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The logits of each of (T,) tokens written after a source (S,): (T, V)."""
    pair = [torch.from_numpy(np.ascontiguousarray(part))[None].to(reference.device) for part in (source, target)]
    with torch.inference_mode():
        return np.asarray(reference(*pair)[0].float().cpu().numpy())
