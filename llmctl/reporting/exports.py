"""The section on export: how near each exported form is to its model, and what it weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl import console
from llmctl.reporting.charts import figure, small
from llmctl.reporting.markup import Html, facts, join, section, table, tag
from llmctl.reporting.story import Part, number, record, records, say, word

LEDE = (
    "What another runtime loads. A graph is published only if its numbers are the model's: however the tokens arrive, "
    "over a greedy run with a cache, and on real text."
)
WORTH = 0.005  # of the whole: smaller files are told together
FLOOR = 1e-9  # errors below this share of a logit are drawn here


def draw(parts: Sequence[Part]) -> Html:
    """The section: one block a variant."""
    return section("export", "Export", LEDE, *(_variant(part) for part in parts))


def _variant(part: Part) -> Html:
    parity = part.json("parity.json")
    name, _, variant = part.place.removeprefix("export/").partition("/")
    title = tag("h3", f"{variant or name} ", tag("small", f"of {name}"))
    if part.unfinished:
        worst = record(parity, "worst")
        off = say(worst, "value", ": off by {}", figure) + say(worst, "limit", ", allowed {}", figure)
        stopped = f"Stopped by its parity gate, nothing was published. {word(worst, 'figure')}{off}."
        return join([title, tag("p", stopped + _blame(parity), class_="worse"), *_parity(parity)])
    if not parity:
        plain = "A copy of the model's own files; there is no graph to hold against it."
        return join([title, tag("p", plain, class_="lede"), _files(part)])
    return join([title, _verdict(parity), *_parity(parity), _files(part)])


def _verdict(parity: Mapping[str, Any]) -> Html:
    greedy, text, original = record(parity, "greedy"), record(parity, "text"), record(parity, "original")
    equal, tokens = number(greedy, "equal"), number(greedy, "tokens")
    run = f"{equal:,.0f} of {tokens:,.0f} tokens equal" if equal is not None and tokens is not None else ""
    partings = len(records(greedy.get("partings")))
    ties = f"; {partings} where the model's two best logits are as good as equal" if partings else ""
    perplexity = _change(text, "torch_perplexity", "onnx_perplexity")
    length = say(text, "tokens", " on {} tokens of ") + word(text, "name")
    allowed = record(original, "limits")
    return facts(
        [
            ("verdict", "passed" if parity.get("passed") is True else "not passed"),
            ("largest error", say(parity, "error", "{} of the largest logit", small)),
            ("greedy run", run + ties if run else ""),
            ("perplexity", perplexity + length if perplexity else ""),
            ("same best token", _percent(text, "top1_agreement")),
            ("divergence", say(text, "mean_kl", "{} nats a token", small)),
            (
                "perplexity, quantised",
                _change(original, "original_perplexity", "perplexity")
                + _percent(allowed, "increase", ", up to {} allowed"),
            ),
            (
                "best token of the original",
                _percent(original, "top1_agreement") + _percent(allowed, "lost", ", {} may be lost"),
            ),
            (
                "divergence from the original",
                say(original, "mean_kl", "{} nats a token", small) + say(allowed, "kl", ", up to {} allowed", small),
            ),
            ("held against", word(parity, "reference")),
            ("graph run by", word(parity, "candidate")),
            ("computes in", word(parity, "dtype")),
        ]
    )


def _change(of: Mapping[str, Any], before: str, after: str) -> str:
    """`12.3456 → 12.3460 (+0.0032 %)`."""
    both = [say(of, name, "{}", "{:,.4f}".format) for name in (before, after)]
    change = say(of, "change", " ({} %)", lambda value: f"{round(100 * value, 4) + 0.0:+.4f}".replace("-", "−"))
    return " → ".join(both) + change if all(both) else ""


def _percent(of: Mapping[str, Any], key: str, said: str = "{}") -> str:
    return say(of, key, said, "{:.2%}".format).replace("%", " %")


def _blame(parity: Mapping[str, Any]) -> str:
    """The node that `bisect.blame` found."""
    first = record(record(parity, "nodes"), "first")
    name, op = word(first, "name"), word(first, "op")
    return f" The first node that differs is {name} ({op}){say(first, 'error', ', by {}', figure)}." if name else ""


def _parity(parity: Mapping[str, Any]) -> list[Html]:
    """A row a way in which tokens may arrive, with the error drawn on a logarithmic scale up to its limit."""
    limit = number(record(parity, "limits"), "logits")
    cases = [(word(case, "case"), _arrival(case.get("rows")), case) for case in records(parity.get("logits"))]
    text = record(parity, "text")
    cases += [("real text", say(text, "tokens", "{} tokens"), text)] if text else []
    rows: list[list[str]] = []
    for name, arrival, case in cases:
        error = number(case, "error")
        drawn = _strip(error, limit) if error is not None and limit and limit > FLOOR else Html("")
        values = [say(case, "difference", "{}", small), say(case, "largest_logit", "{}", "{:.2f}".format)]
        rows.append([name, arrival, *values, small(error) if error is not None else "–", drawn])
    if not rows:
        return []
    allowed = f"log scale, up to the limit {figure(limit)}" if limit else ""
    header = ["tokens arrive as", "pieces", "difference", "largest logit", "error", allowed]
    return [table(header, rows, "parity")]


def _arrival(rows: object) -> str:
    """`33+1+1` for pieces one after the other; rows of a batch apart."""
    if not isinstance(rows, list):
        return ""
    return " · ".join("+".join(str(piece) for piece in row) for row in rows if isinstance(row, list))


def _strip(error: float, limit: float) -> Html:
    """A dot on a logarithmic line that ends at the limit."""
    share = math.log(max(error, FLOOR) / FLOOR) / math.log(limit / FLOOR)
    kind = "strip" if error <= limit else "strip beyond"
    return tag("div", tag("i", style=f"left:{min(max(share, 0.0), 1.0):.1%}"), class_=kind)


def _files(part: Part) -> Html:
    files = part.files
    whole = sum(files.values())
    large = {name: size for name, size in files.items() if size >= WORTH * whole}
    rows = [[tag("code", name), console.size(size), _share(size, whole)] for name, size in large.items()]
    if rest := len(files) - len(large):
        size = whole - sum(large.values())
        rows.append([f"{rest} {'other' if rest == 1 else 'others'}", console.size(size), _share(size, whole)])
    rows.append([tag("b", "together"), tag("b", console.size(whole)), ""])
    return table(["file", "size", ""], rows, "files")


def _share(size: float, whole: float) -> Html:
    return tag("div", tag("i", style=f"width:{size / whole if whole else 0:.1%}"), class_="amount")
