"""Beam search: the likeliest texts as a whole, not token by token; translation and summaries want it.

The reference is transformers' `generate(num_beams=...)` (ids equal in tests/parity), its stopping rules included.
"""

# N beams, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmctl.errors import UsageError
from llmctl.inference.generate import pieces, room
from llmctl.inference.runners import Runner
from llmctl.inference.sampling import Sampling, log_softmax


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that the search found.

    Attributes:
        ids: what was written, with the end of the text where it has one.
        score: its log-probability divided by its length to the power of `length_penalty`.
    """

    ids: tuple[int, ...]
    score: float


def search(
    runner: Runner,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_tokens: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[Hypothesis]:
    """The `num_beams` best continuations of a prompt (answers to it, of an encoder-decoder), best first.

    Args:
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: True ends with the `num_beams`-th finished text; False where the best open beam, were it to end
            now, is worse than all of them; "never" where it is even at the best length it may still reach.

    Raises:
        UsageError: `num_beams` is below 1, or the prompt does not fit (as in `generate.room`).
    """
    if num_beams < 1:
        raise UsageError(f"num_beams is {num_beams}, but it must be at least 1")
    limit = room(runner, prompt, Sampling(max_tokens=max_tokens))
    if not limit:
        return [Hypothesis((), 0.0)]
    cache, first = runner.begin(prompt, limit)
    for piece in pieces(first):
        logits = runner.forward(piece, cache)  # (1, 1, V)
    open_ids, open_scores = [()], np.zeros(1)
    finished: list[Hypothesis] = []
    # One open beam has one continuation for each end of the text: so many candidates leave N to go on with.
    kept = max(2, 1 + len(runner.eos_ids)) * num_beams
    for length in range(1, limit + 1):
        totals = (log_softmax(logits[:, -1]) + open_scores[:, None]).ravel()  # (N V,)
        best = np.argpartition(-totals, min(kept, len(totals)) - 1)[:kept]
        best = best[np.argsort(-totals[best], kind="stable")]
        rows, tokens = np.divmod(best, runner.vocab_size)
        ends = np.isin(tokens, runner.eos_ids) | (length == limit)
        for i in np.flatnonzero(ends[:num_beams]):
            ids = (*open_ids[rows[i]], int(tokens[i]))
            finished.append(Hypothesis(ids, float(totals[best[i]]) / length**length_penalty))
        finished = sorted(finished, key=lambda found: -found.score)[:num_beams]
        going = np.flatnonzero(~ends)[:num_beams]
        full = len(finished) == num_beams
        if not len(going) or (full and early_stopping is True):
            break
        reached = limit if early_stopping == "never" and length_penalty > 0 else length
        if full and totals[best[going[0]]] / reached**length_penalty <= finished[-1].score:
            break
        open_ids = [(*open_ids[rows[i]], int(tokens[i])) for i in going]
        open_scores = totals[best[going]]
        cache = runner.select(cache, rows[going].tolist())
        logits = runner.forward(tokens[going, None].astype(np.int64), cache)
    return finished
