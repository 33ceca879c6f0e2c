"""From logits to the next token, in NumPy alone, so that torch and ONNX Runtime share it.

The order is transformers': bias and penalties on the logits, then temperature, top-k, top-p, min-p, and a draw from
what is left. Log-probabilities are the model's own, of the logits before any of that.
"""

# V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmctl.errors import RunError, UsageError

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is continued, under the names of the OpenAI and vLLM APIs. The defaults draw from the plain model.

    Attributes:
        temperature: 0 takes the likeliest token (greedy).
        top_k: only the k likeliest; 0 for all.
        top_p: only the likeliest that together reach this probability (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: only those at least this share of the likeliest's probability (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: divides positive logits of tokens in prompt or output, multiplies negative ones (Keskar et
            al. 2019, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once, and for each time.
        logit_bias: added to the logit of an id.
        seed: draws the same tokens again; None draws anew.
        max_tokens: at most this many; None for as many as fit.
        stop: strings that end the text and are no part of it.
        ignore_eos: goes on after the end of the text (for load tests).
        logprobs: how many alternatives to report at each token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError naming the field that is out of range."""
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise UsageError(f"{name} is {value}, but it must lie between {low:g} and {high:g}")
        if self.repetition_penalty == 0:
            raise UsageError("repetition_penalty is 0, but it must be above 0")
        if self.top_p == 0:
            raise UsageError("top_p is 0, but it must be above 0", hint="temperature = 0 takes the likeliest token")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise UsageError("logit_bias holds a value that is no finite number")
        if "" in self.stop:
            raise UsageError("stop holds an empty string, which is found everywhere")


RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_k", 0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("max_tokens", 0, math.inf),
    ("logprobs", 0, math.inf),
    ("seed", 0, 2**64 - 1),
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token with the model's own log-probability of it, and the likeliest ones at its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class History:
    """What came before: penalties tell the prompt from the output."""

    prompt: Sequence[int]
    output: list[int] = field(default_factory=list)


def generator_of(sampling: Sampling) -> np.random.Generator:
    """The source of randomness of one text."""
    return np.random.default_rng(sampling.seed)


def pick(logits: Logits, sampling: Sampling, generator: np.random.Generator, history: History) -> Token:
    """The next token from logits (V,).

    Raises:
        RunError: a logit is NaN, or all are minus infinity.
        UsageError: `logit_bias` names an id outside the vocabulary.
    """
    chosen = choose(adjusted(logits, sampling, history), sampling, generator)
    return token(log_softmax(logits), chosen, sampling.logprobs)


def choose(scores: npt.NDArray[np.float64], sampling: Sampling, generator: np.random.Generator) -> int:
    """An id drawn from adjusted logits (V,): their likeliest at temperature 0."""
    if not np.isfinite(scores.max()):
        raise RunError("the model's logits are no numbers", hint="its weights may be damaged; try: llmctl verify")
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = truncated(scores / sampling.temperature, sampling)
    ends = probabilities.cumsum()
    # The last end stands for 1, so that rounding in the sum never draws an id past those that are left.
    return int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))


def adjusted(logits: Logits, sampling: Sampling, history: History) -> npt.NDArray[np.float64]:
    """Logits (V,) with bias and penalties applied, in float64."""
    scores = logits.astype(np.float64)
    for index, bias in sampling.logit_bias.items():
        if not 0 <= index < len(scores):
            raise UsageError(f"logit_bias names the token {index}, but ids end at {len(scores) - 1}")
        scores[index] += bias
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.fromiter((*history.prompt, *history.output), np.int64))
        penalty = sampling.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and history.output:
        said, times = np.unique(np.asarray(history.output, np.int64), return_counts=True)
        scores[said] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return scores


def truncated(scores: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities (V,) of the tokens that top-k, top-p and min-p leave; they need not add up to 1."""
    if 0 < sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < kth, -np.inf, scores)
    probabilities: npt.NDArray[np.float64] = np.exp(scores - scores.max())
    if sampling.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")  # scores: two that differ may have one probability
        ends = probabilities[order].cumsum()
        # A token stays where those before it do not yet reach top_p: the first always does.
        beyond = ends - probabilities[order] >= sampling.top_p * ends[-1]
        probabilities[order[beyond]] = 0.0
    if sampling.min_p > 0.0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
    return probabilities


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64; exact to 1e-7, for the exponentials are taken in float32."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    shares = np.exp(wide.astype(np.float32)).sum(-1, keepdims=True, dtype=np.float64)
    result: npt.NDArray[np.float64] = wide - np.log(shares)
    return result


def token(logprobs: npt.NDArray[np.float64], chosen: int, top: int = 0) -> Token:
    """The token `chosen` with its log-probability and the `top` likeliest, from log-probabilities (V,)."""
    if not top:
        return Token(chosen, float(logprobs[chosen]))
    count = min(top, len(logprobs))
    least = np.partition(logprobs, -count)[-count]
    best = np.flatnonzero(logprobs >= least)  # more than `count` where some are equal
    best = best[np.argsort(-logprobs[best], kind="stable")][:count]  # the lower id goes first, as in argmax
    return Token(chosen, float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in best))
