"""The gate: an exported graph gives the model's numbers, or it is not published.

    measure(reference, candidate, tokens, text, dtype="fp32", original=None, max_increase=0.0) -> report
    gate(report, path)

Is the graph the model it was written from? Three questions, each to the graph as it will be served (cached, by its
runner) and to the torch model, which always runs whole sequences without a cache: do the logits agree however the
tokens arrive; does a greedy run stay on the model's path; is real text as probable. Of a quantised graph that model is
the quantised one, and a fourth is asked: is it still the original, by perplexity, best tokens and divergence. What a
graph may be off by is in tolerance.py. parity.json holds every figure with its limit.

B rows, T tokens, V vocabulary
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch

from llmctl import console
from llmctl.errors import GateError
from llmctl.export import reports, tolerance
from llmctl.export.tolerance import FP32, Limits
from llmctl.export.tolerance import allowed_increase as allowed_increase
from llmctl.inference.sampling import log_softmax
from llmctl.model.hf import Causal

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
    "prompts": ((61, 1, 1, 1), (37, 1, 1), (90, 1), (11, 1, 1, 1), (23,)),
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
    reference: Causal,
    candidate: Candidate,
    tokens: np.ndarray,
    text: str,
    dtype: str = "fp32",
    *,
    original: Causal | None = None,
    max_increase: float = 0.0,
) -> dict[str, Any]:
    """Every figure of the gate.

    Args:
        reference: the torch model whose weights the graph has, fp32: of a quantised graph the quantised model.
        candidate: the exported graph.
        tokens: ids of real text, at least two; prompts are cut from it too.
        text: what text that is.
        dtype: what the graph computes in: "fp32", "fp16", "bf16", or "int8" where products round what they read.
        original: of a quantised graph, the model before.
        max_increase: what the perplexity may rise by over the original's, as a share; see `allowed_increase`.

    Returns: what parity.json holds; `passed` is the verdict, `worst` the figure nearest to its limit or past it.
    """
    tokens = enough(reference, tokens)
    natural = natural_error(reference, tokens, dtype)
    limit = tolerance.limits(dtype, natural, len(tokens) - 1)
    checks = [compare(reference, candidate, name, rows, tokens) for name, rows in CASES.items()]
    run = greedy(reference, candidate, tokens[: min(16, candidate.max_length // 2)], limit.logits)
    read = on_text(reference, candidate, tokens, text)
    report = judge(dtype, checks, greedy=run, text=read, limit=limit, session=candidate.session)
    if dtype != "fp32":
        report["natural"] = {"error": natural[0], "mean_kl": natural[1]}
    return report if original is None else both(report, quality(original, candidate, tokens, text, max_increase))


def quality(original: Causal, candidate: Reader, tokens: np.ndarray, text: str, max_increase: float) -> dict[str, Any]:
    """Whether a quantised model is still the one it was made from; the arguments are those of `measure`.

    Returns: what parity.json holds of it, under "original".
    """
    read = on_text(original, candidate, enough(original, tokens), text)
    limit = tolerance.quality(max_increase)
    kept = {name: read[name] for name in ("name", "tokens", "change", "top1_agreement", "mean_kl")}
    figures = [
        ("perplexity above the original's", float(np.maximum(read["change"], 0.0)), limit.increase),
        ("divergence from the original", read["mean_kl"], limit.kl),
        ("best tokens other than the original's", 1 - read["top1_agreement"], limit.lost),
    ]
    perplexities = {"original_perplexity": read["torch_perplexity"], "perplexity": read["onnx_perplexity"]}
    return verdict(figures) | {"original": {**kept, **perplexities, "limits": limit._asdict()}}


def enough(reference: Causal, tokens: np.ndarray) -> np.ndarray:
    """As many of the tokens as reading them twice may cost."""
    return tokens[: min(TEXT, max(512, int(TEXT_FLOPS / (2 * reference.config.parameters)))) + 1]


def both(report: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two reports on one graph: it passes if it passes both, and the worse of the two worst figures is named."""
    reports = (other, report)
    worst = max((found["worst"] for found in reports), key=lambda worst: strain(worst["value"], worst["limit"]))
    return {**other, **report, "passed": all(found["passed"] for found in reports), "worst": worst}


def natural_error(reference: Causal, tokens: np.ndarray, dtype: str) -> tuple[float, float]:
    """What computing in `dtype` does to the model in torch: the worst logit, as a share, and the mean divergence."""
    if dtype == "fp32":
        return 0.0, 0.0
    ids = tokens[: min(tolerance.TOKENS, reference.config.max_position_embeddings)]
    expected = torch_logits(reference, ids)
    with tolerance.rounding(reference, dtype) as twin:
        found = torch_logits(twin, ids)
    error: float = check("", [found], [expected])["error"]
    return error, float(beside(expected, found, ids)[2] / len(ids))


def judge(
    dtype: str,
    checks: Sequence[dict[str, Any]],
    *,
    greedy: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    limit: Limits = FP32,
    session: ort.InferenceSession | None = None,
) -> dict[str, Any]:
    """The report on a graph whose outputs were compared: see `check`, `partings` and `on_text` for the parts."""
    figures = [(f"logits, {found['case']}", found["error"], limit.logits) for found in checks]
    if text is not None:
        figures.append(("logits on text", text["error"], limit.logits))
    error = max((value for _, value, _ in figures), key=lambda value: strain(value, 1.0))
    for parting in greedy["partings"] if greedy is not None else []:
        figures.append((f"greedy token {parting['token']}", parting["gap"], parting["limit"]))
    if text is not None:
        figures.append(("perplexity", abs(text["change"]), limit.perplexity))
        figures.append(("divergence on text", text["mean_kl"], limit.kl))
    run = {} if greedy is None else {"greedy": greedy}
    read = {} if text is None else {"text": text}
    provider = session.get_providers()[0] if session is not None else "CPUExecutionProvider"
    return {
        "dtype": dtype,
        **verdict(figures),
        "error": error,
        "limits": limit._asdict(),
        "logits": list(checks),
        **run,
        **read,
        "reference": f"torch {torch.__version__}, fp32, whole sequences",
        "candidate": f"onnxruntime {ort.__version__}, {provider}",
    }


def verdict(figures: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Whether every (name, value, limit) is within its limit, and the one that is nearest to it or farthest past it."""
    name, value, limit = max(figures, key=lambda figure: strain(*figure[1:]))
    return {"passed": strain(value, limit) <= 1, "worst": {"figure": name, "value": value, "limit": limit}}


def strain(value: float, limit: float) -> float:
    """A figure as a share of its limit; what is no number is beyond every limit."""
    if math.isnan(value) or math.isnan(limit):
        return math.inf
    return value / limit if limit > 0 else math.inf if value > 0 else 0.0


def gate(report: dict[str, Any], path: Path) -> None:
    """Writes parity.json to `path`; beyond a limit it stays there and nothing is published. `-v` prints every figure.

    Raises:
        GateError: naming the worst figure, the node to blame where `bisect.blame` found one, and the file.
    """
    path.write_text(json.dumps(console.finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if console.verbose():
        console.table("", ("parity", "off by", "allowed"), reports.table(report))
    if report["passed"]:
        return
    worst, first = report["worst"], report.get("nodes", {}).get("first")
    found, allowed = f"{worst['value']:.2g}", f"{worst['limit']:.2g}"
    blame = f"; the first node that is: {first['name']} ({first['op']}), by {first['error']:.2g}" if first else ""
    if "original" in report and worst["figure"].endswith(("original", "original's")):
        raise GateError(
            f"the quantised model is not the original any more: {worst['figure']}: {found}, allowed {allowed}",
            hint="quantize_method gptq or awq, a smaller block_size or int8 keep more; [export] max_ppl_increase moves "
            f"the limit; nothing was published; every figure is in {path}",
        )
    raise GateError(
        f"the exported graph is not the model: {worst['figure']}: off by {found}, allowed {allowed}{blame}",
        hint=f"nothing was published; every figure is in {path}",
    )


def compare(
    reference: Causal, candidate: Candidate, name: str, rows: tuple[tuple[int, ...], ...], tokens: np.ndarray
) -> dict[str, Any]:
    """The logits of one case against those of each row by itself, as a share of the largest."""
    room = min(candidate.max_length, len(tokens))
    rows = tuple(sorted((shortened(row, room) for row in rows), key=len, reverse=True))  # the last ones end first
    texts = cut(tokens, rows)
    expected = [torch_logits(reference, text) for text in texts]
    found = arriving(candidate, texts, rows)
    return check(name, found, expected, rows)


def check(
    name: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], rows: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    """One case: arrays of the same shapes, and how far apart the worst of their values are; `rows` says how the tokens
    of each came."""
    difference = np.max([np.abs(a - b).max() for a, b in zip(found, expected, strict=True)])  # NaN stays NaN
    return {"case": name, "rows": [list(row) for row in rows], **shares(float(difference), expected)}


def cut(tokens: np.ndarray, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """A piece of the text for each row, from all over it."""
    starts = np.linspace(0, len(tokens) - max(map(sum, rows)), len(rows)).astype(int)
    return [tokens[start : start + sum(row)] for start, row in zip(starts, rows, strict=True)]


def shortened(row: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The pieces of a row that fit in `room`; the piece that does not is cut."""
    ends = np.minimum(np.cumsum(row), room)
    pieces = np.diff(ends, prepend=0)
    return tuple(int(piece) for piece in pieces if piece)


def arriving(candidate: Candidate, texts: list[np.ndarray], rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
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
    return partings(expected, np.array(ids[len(prompt) :]), limit)


def partings(expected: np.ndarray, chosen: np.ndarray, limit: float) -> dict[str, Any]:
    """Where a greedy run took other tokens, (T,), than the best of the reference's logits, (T, V), before each."""
    gaps = expected.max(-1) - expected[np.arange(len(chosen)), chosen]
    allowed = 2 * limit * max(1.0, float(np.abs(expected).max()))
    found = [{"token": int(i), "gap": float(gaps[i]), "limit": allowed} for i in np.flatnonzero(gaps > 0)]
    return {"tokens": len(chosen), "equal": len(chosen) - len(found), "partings": found}


def on_text(reference: Causal, candidate: Reader, tokens: np.ndarray, text: str) -> dict[str, Any]:
    """The perplexity of both on the same text, read in windows of the model's whole context where memory allows.

    `worst` is where the largest difference was: from the first token of its window up to its own.
    """
    window = window_of(candidate)
    sums, difference, worst, largest, count = np.zeros(4), -1.0, [0, 1], 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        expected, found = torch_logits(reference, part[:-1]), candidate.forward(part[None, :-1], last_only=False)[0]
        off = np.abs(found - expected).max(-1)
        at = int(off.argmax())  # NaN counts as the largest
        if not off[at] <= difference and not math.isnan(difference):
            difference, worst = float(off[at]), [start, start + at + 1]
        largest = max(largest, float(np.abs(expected).max()))
        sums += beside(expected, found, part[1:])
        count += len(part) - 1
    return told(sums, count, difference, largest, text) | {"worst": worst}


def told(sums: np.ndarray, count: int, difference: float, largest: float, text: str) -> dict[str, Any]:
    """What a report says of a text.

    Args:
        sums: of `beside`, over `count` tokens.
        difference: the largest of two logits.
        largest: the largest logit of the reference.
    """
    means = [float(mean) for mean in sums / count]
    with np.errstate(over="ignore"):
        torch_perplexity, onnx_perplexity = (float(value) for value in np.exp(means[:2]))
    return {
        "name": text,
        "tokens": count,
        "torch_perplexity": torch_perplexity,
        "onnx_perplexity": onnx_perplexity,
        "change": onnx_perplexity / torch_perplexity - 1,
        "mean_kl": means[2],
        "top1_agreement": means[3],
        **shares(difference, [np.array(largest)]),
    }


def torch_logits(reference: Causal, ids: np.ndarray) -> np.ndarray:
    """(T,) -> (T, V), without a cache."""
    device = next(reference.parameters()).device
    with torch.inference_mode():
        return np.asarray(reference(torch.from_numpy(ids)[None].to(device))[0].cpu().numpy())


def window_of(candidate: Reader) -> int:
    """Tokens read at once."""
    return min(candidate.max_length, max(32, LOGITS // candidate.vocab_size))


def beside(expected: np.ndarray, found: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Sums over (T,) targets under two models' (T, V) logits: the nats of each, the Kullback-Leibler divergence of the
    second from the first, and where both have the same best token. A few rows at a time, in float64."""
    sums = np.zeros(4)
    for start in range(0, len(targets), rows := max(1, (LOGITS >> 4) // expected.shape[-1])):
        part = slice(start, start + rows)
        ours, theirs, wanted = log_softmax(expected[part]), log_softmax(found[part]), targets[part]
        at = np.arange(len(wanted))
        kl = np.abs((np.exp(ours) * (ours - theirs)).sum(-1))  # below 0 by rounding alone
        same = ours.argmax(-1) == theirs.argmax(-1)
        sums += [-ours[at, wanted].sum(), -theirs[at, wanted].sum(), kl.sum(), same.sum()]
    return sums


def shares(difference: float, expected: Sequence[np.ndarray]) -> dict[str, float]:
    """A difference, the largest logit, and the one as a share of the other: fp32 rounds in proportion to the value."""
    largest = max(float(np.abs(logits).max()) for logits in expected)
    return {"difference": difference, "largest_logit": largest, "error": difference / max(1.0, largest)}
