"""How likely a text is to a model: loss, perplexity, bits per byte, and the likelihood of an answer.

Every token but the first is a target exactly once, whatever the windows, so that figures with different contexts are
about the same text.
"""

# B batch, T time, C channels, V vocabulary

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from llmctl.errors import UsageError
from llmctl.inference.runners import Ids, Runner
from llmctl.inference.sampling import log_softmax
from llmctl.model.hf import Causal

Nats = npt.NDArray[np.float64]
# ids (B, T), targets (B, T) -> the surprise at each target, (B, T), in nats
Surprise = Callable[[Ids, Ids], Nats]

LOGITS = 1 << 24  # logits held at once: 64 MB in fp32


@dataclass(frozen=True)
class Score:
    """The surprise of a model at a text.

    Attributes:
        nats: in all. tokens: targets. bytes: of the text in UTF-8, 0 if unknown.
        window_nats: (windows,) the nats of each window's targets, for comparing two models on the same text in pairs.
    """

    nats: float
    tokens: int
    bytes: int = 0
    window_nats: Nats = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The figure that models with different tokenizers share; NaN where the bytes are unknown."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def bits_per_byte_of(self, text: str) -> float:
        """Bits per byte, when the targets spell `text`."""
        return self.nats / math.log(2) / max(1, len(text.encode()))


def score(
    model: Causal | Runner,
    tokens: Ids,
    *,
    max_seq_length: int,
    stride: int | None = None,
    bytes_: int = 0,
    batch_size: int | None = None,
    autocast: bool = False,
) -> Score:
    """Scores a text in windows.

    Args:
        model: a torch model is scored in torch, on its device; a Runner through its logits.
        tokens: (N,) ids.
        max_seq_length: ids a window gives the model.
        stride: targets a window adds. The default, `max_seq_length`, reads every token once; fewer give each target at
            least `max_seq_length - stride` tokens before it, where the text has them, at max_seq_length / stride times
            the cost (the sliding window of transformers' perplexity guide).
        bytes_: of the text in UTF-8, for bits per byte.
        batch_size: windows at a time; by default as many as `LOGITS` allows.
        autocast: bf16 matrix products over fp32 weights, as in training (torch only).

    Raises:
        UsageError: fewer than two tokens, or a stride that skips some.
    """
    stride = max_seq_length if stride is None else stride
    if len(tokens) < 2:
        raise UsageError(
            f"{len(tokens)} tokens are too few to score", hint="give two or more: the first is never a target"
        )
    if not 1 <= stride <= max_seq_length:
        raise UsageError(f"a stride of {stride} does not lie between 1 and max_seq_length = {max_seq_length}")
    surprise = of_decoder(model, autocast) if isinstance(model, Causal) else of_runner(model)
    vocab_size = model.config.vocab_size if isinstance(model, Causal) else model.vocab_size
    rows = batch_size or max(1, LOGITS // (min(max_seq_length, len(tokens)) * vocab_size))
    windows = list(_windows(len(tokens), max_seq_length, stride))
    found: list[float] = []
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        width = max(stop - start for start, _, stop in batch) - 1
        ids, targets = np.zeros((2, len(batch), width), np.int64)  # zeros on the right: nothing before depends on them
        for row, (start, _, stop) in enumerate(batch):
            ids[row, : stop - start - 1] = tokens[start : stop - 1]
            targets[row, : stop - start - 1] = tokens[start + 1 : stop]
        nats = surprise(ids, targets)
        found += [
            float(nats[row, counted - start - 1 : stop - start - 1].sum())
            for row, (start, counted, stop) in enumerate(batch)
        ]
    return Score(math.fsum(found), len(tokens) - 1, bytes_, np.asarray(found))


def _windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, counted, stop): tokens[start:stop] is read, and tokens[counted:stop] are the targets that count."""
    counted = 1
    while counted < total:
        stop = min(total, length + 1) if counted == 1 else min(total, counted + stride)
        yield max(0, stop - 1 - length), counted, stop
        counted = stop


def of_decoder(model: Causal, autocast: bool = False) -> Surprise:
    """Surprise computed in torch: the head runs over a few positions at a time, and no logits leave the device."""
    device = model.device
    positions = max(1, LOGITS // model.config.vocab_size)

    def surprise(ids: Ids, targets: Ids) -> Nats:
        precision: contextlib.AbstractContextManager[Any] = (
            torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
        )
        was_training = model.training
        model.eval()
        with torch.inference_mode(), precision:
            hidden = model.hidden(torch.from_numpy(ids).to(device)).flatten(0, 1)  # (B T, C)
            wanted = torch.from_numpy(targets).to(device).flatten()
            parts = [
                F.cross_entropy(model.logits(part), target, reduction="none")
                for part, target in zip(torch.split(hidden, positions), torch.split(wanted, positions), strict=True)
            ]
        model.train(was_training)
        nats: Nats = torch.cat(parts).cpu().numpy().astype(np.float64).reshape(ids.shape)
        return nats

    return surprise


def of_runner(runner: Runner) -> Surprise:
    """Surprise from a runner's logits, summed up in float64."""

    def surprise(ids: Ids, targets: Ids) -> Nats:
        logits = runner.forward(ids, None, last_only=False)  # (B, T, V)
        rows = zip(logits, targets, strict=True)
        return np.stack([-log_softmax(row)[np.arange(len(wanted)), wanted] for row, wanted in rows])

    return surprise


def loglikelihood(runner: Runner, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """The log-probability in nats of `continuation` after `context`, at most 0, and whether greedy decoding gives it.

    What does not fit the model is cut off at the left, as lm-evaluation-harness does.

    Raises:
        UsageError: an empty context or continuation, or a continuation longer than the model's context.
    """
    if not context or not continuation:
        raise UsageError("a likelihood needs a context and a continuation of at least one token each")
    if len(continuation) > runner.max_length:
        raise UsageError(f"the continuation has {len(continuation):,} tokens; the model holds {runner.max_length:,}")
    ids = np.asarray([*context, *continuation], np.int64)[-runner.max_length - 1 :]
    logits = runner.forward(ids[None, :-1], None, last_only=False)[0, -len(continuation) :]
    logprobs = log_softmax(logits)[np.arange(len(continuation)), list(continuation)]
    return float(logprobs.sum()), bool((logits.argmax(-1) == continuation).all())
