"""The gate: an exported graph gives the model's numbers, or it is not published.

Three questions, each to the graph as it will be served (cached, by its runner) and to the torch model, which always
runs whole sequences without a cache: do the logits agree however the tokens arrive; does a greedy run stay on the
model's path; is real text as probable. parity.json holds every figure with its limit.

B rows, T tokens, V vocabulary
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch

from llmctl.errors import GateError
from llmctl.model.hf import Causal

# By the dtype of the exported weights: the largest difference of two logits, as a share of the largest logit (at least
# 1), and the largest change of the perplexity, as a share of it. fp32 kernels that merely sum in another order stay one
# to two decades below.
TOLERANCE = {"fp32": (1e-4, 1e-4)}

# How tokens may arrive. A case is the pieces of each row: ((5, 1), (13, 1)) prefills two rows, the shorter one padded
# on the right, then gives each one token more.
CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "one token": ((1,),),
    "odd prefill": ((7,),),
    "long prefill": ((257,),),
    "past 1": ((1, 1),),
    "past N": ((33, 1, 1),),
    "chunks": ((1, 8, 13, 2, 33),),
    "batch": ((16,), (16,), (16,)),
    "padded batch": ((5,), (1,), (13,), (16,)),
    "padded batch, steps": ((5, 1, 1), (1, 1, 1), (13, 1, 1)),
    "padded batch, chunks": ((5, 3, 1), (1, 4, 1), (13, 2, 1)),
}
GREEDY = 256  # tokens of the greedy run
TEXT = 8_192  # tokens of text; fewer where the model is large
TEXT_FLOPS = 5e11  # what the text may cost, 2 a parameter and token, for each of the two
LOGITS = 1 << 24  # logits held at once


class Reader(Protocol):
    """Anything that gives the logits of whole texts."""

    vocab_size: int
    max_length: int

    def forward(self, ids: np.ndarray, cache: Any = None, last_only: bool = True) -> np.ndarray: ...


class Candidate(Protocol):
    """An exported graph under its runner, `OnnxRunner` or `RecurrentRunner`."""

    session: ort.InferenceSession
    vocab_size: int
    max_length: int

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> Any: ...

    def forward(
        self, ids: np.ndarray, cache: Any = None, last_only: bool = True, new: np.ndarray | None = None
    ) -> np.ndarray: ...


def measure(
    reference: Causal, candidate: Candidate, tokens: np.ndarray, text: str, dtype: str = "fp32"
) -> dict[str, Any]:
    """Every figure of the gate.

    Args:
        reference: the torch model, fp32.
        candidate: the exported graph.
        tokens: ids of real text, at least two; prompts are cut from it too.
        text: what text that is.

    Returns: what parity.json holds; `passed` is the verdict, `worst` the figure nearest to its limit or past it.
    """
    logit_limit, perplexity_limit = TOLERANCE[dtype]
    text_limit = max(512, int(TEXT_FLOPS / (2 * reference.config.parameters)))
    logits = [compare(reference, candidate, name, rows, tokens) for name, rows in CASES.items()]
    run = greedy(reference, candidate, tokens[: min(16, candidate.max_length // 2)], logit_limit)
    read = on_text(reference, candidate, tokens[: min(TEXT, text_limit)], text)

    figures = [(f"logits, {check['case']}", check["error"], logit_limit) for check in logits]
    figures.append(("logits on text", read["error"], logit_limit))
    figures += [(f"greedy token {parting['token']}", parting["gap"], parting["limit"]) for parting in run["partings"]]
    figures.append(("perplexity", abs(read["change"]), perplexity_limit))
    name, value, limit = max(figures, key=lambda figure: math.inf if math.isnan(figure[1]) else figure[1] / figure[2])
    return {
        "dtype": dtype,
        "passed": value <= limit,
        "worst": {"figure": name, "value": value, "limit": limit},
        "error": max(error for _, error, _ in figures[: len(logits) + 1]),
        "limits": {"logits": logit_limit, "perplexity": perplexity_limit},
        "logits": logits,
        "greedy": run,
        "text": read,
        "reference": f"torch {torch.__version__}, fp32, whole sequences",
        "candidate": f"onnxruntime {ort.__version__}, {candidate.session.get_providers()[0]}",
    }


def gate(report: dict[str, Any], path: Path) -> None:
    """Writes parity.json to `path`; beyond a limit it stays there and nothing is published.

    Raises:
        GateError: naming the worst figure and the file.
    """
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not report["passed"]:
        worst = report["worst"]
        found, allowed = f"{worst['value']:.2g}", f"{worst['limit']:.2g}"
        raise GateError(
            f"the exported graph is not the model: {worst['figure']}: off by {found}, allowed {allowed}",
            hint=f"nothing was published; every figure is in {path}",
        )


def compare(
    reference: Causal, candidate: Candidate, name: str, rows: tuple[tuple[int, ...], ...], tokens: np.ndarray
) -> dict[str, Any]:
    """The logits of one case against those of each row by itself, as a share of the largest."""
    room = min(candidate.max_length, len(tokens))
    rows = tuple(sorted((shortened(row, room) for row in rows), key=len, reverse=True))  # the last ones end first
    starts = np.linspace(0, len(tokens) - max(map(sum, rows)), len(rows)).astype(int)
    texts = [tokens[start : start + sum(row)] for start, row in zip(starts, rows, strict=True)]
    expected = [torch_logits(reference, text) for text in texts]
    found = arriving(candidate, texts, rows)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    return {"case": name, "rows": [list(row) for row in rows], **shares(difference, expected)}


def shortened(row: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The pieces of a row that fit in `room`; the piece that does not is cut."""
    ends = np.minimum(np.cumsum(row), room)
    pieces = np.diff(ends, prepend=0)
    return tuple(int(piece) for piece in pieces if piece)


def arriving(candidate: Candidate, texts: list[np.ndarray], rows: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """Logits (T, V) of each text when its tokens arrive in the pieces of its row, all rows in one batch."""
    cache = candidate.new_cache(len(texts), max(map(sum, rows)))
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for step in range(max(map(len, rows))):
        active = [b for b, row in enumerate(rows) if step < len(row)]  # 0, 1, ...: rows with more pieces come first
        new = np.array([rows[b][step] for b in active])
        ids = np.zeros((len(active), int(new.max())), np.int64)
        for b in active:
            start = sum(rows[b][:step])
            ids[b, : new[b]] = texts[b][start : start + new[b]]
        logits = candidate.forward(ids, cache.rows(0, len(active)), last_only=False, new=new)
        for b in active:
            found[b].append(logits[b, : new[b]])
    return [np.concatenate(pieces) for pieces in found]


def greedy(reference: Causal, candidate: Candidate, prompt: np.ndarray, limit: float) -> dict[str, Any]:
    """A cached greedy run of the candidate, and where the reference, reading the same tokens, would have turned off.

    Two paths may part only where the two tokens are as good as equal to the reference: closer than twice the tolerance.
    """
    count = min(GREEDY, candidate.max_length - len(prompt))
    cache = candidate.new_cache(1, len(prompt) + count)
    ids = [int(id) for id in prompt]
    new = np.array([ids])
    for _ in range(count):
        ids.append(int(candidate.forward(new, cache)[0, -1].argmax()))
        new = np.array([ids[-1:]])
    expected = torch_logits(reference, np.array(ids[:-1]))[len(prompt) - 1 :]
    chosen = expected[np.arange(count), ids[len(prompt) :]]
    gaps = expected.max(-1) - chosen
    allowed = 2 * limit * max(1.0, float(np.abs(expected).max()))
    partings = [{"token": int(i), "gap": float(gaps[i]), "limit": allowed} for i in np.flatnonzero(gaps > 0)]
    return {"tokens": count, "equal": count - len(partings), "partings": partings}


def on_text(reference: Causal, candidate: Reader, tokens: np.ndarray, text: str) -> dict[str, Any]:
    """The perplexity of both on the same text, read in windows of the model's whole context where memory allows."""
    window = min(candidate.max_length, max(32, LOGITS // candidate.vocab_size))
    nats, differences, largest, same, count = np.zeros(2), [0.0], 0.0, 0, 0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        expected, found = torch_logits(reference, part[:-1]), candidate.forward(part[None, :-1], last_only=False)[0]
        nats += [surprise(expected, part[1:]), surprise(found, part[1:])]
        differences.append(float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        count += len(part) - 1
    torch_perplexity, onnx_perplexity = (float(value) for value in np.exp(nats / count))
    return {
        "name": text,
        "tokens": count,
        "torch_perplexity": torch_perplexity,
        "onnx_perplexity": onnx_perplexity,
        "change": onnx_perplexity / torch_perplexity - 1,
        "top1_agreement": same / count,
        **shares(float(np.max(differences)), [np.array(largest)]),
    }


def torch_logits(reference: Causal, ids: np.ndarray) -> np.ndarray:
    """(T,) -> (T, V), without a cache."""
    device = next(reference.parameters()).device
    with torch.inference_mode():
        return np.asarray(reference(torch.from_numpy(ids)[None].to(device))[0].cpu().numpy())


def surprise(logits: np.ndarray, targets: np.ndarray) -> float:
    """Nats of (T,) targets under (T, V) logits, summed in float64."""
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1, dtype=np.float64)) + top[:, 0]
    return float((total - logits[np.arange(len(targets)), targets]).sum())


def shares(difference: float, expected: list[np.ndarray]) -> dict[str, float]:
    """A difference, the largest logit, and the one as a share of the other: fp32 rounds in proportion to the value."""
    largest = max(float(np.abs(logits).max()) for logits in expected)
    return {"difference": difference, "largest_logit": largest, "error": difference / max(1.0, largest)}
