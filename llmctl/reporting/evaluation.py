"""The section on eval: the table of scores, and the models' answers beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.reporting.markup import Html, join, prose, section, table, tag
from llmctl.reporting.story import Part, number, record, records, word

LEDE = "The same held-out text and questions for every model; untrained is the same shape with its weights at random."
OPEN, FOLDED = 5, 19  # questions that are shown at once, and after a click
# name, how its values are written, whether more is better
METRICS = {
    "val_bits_per_byte": ("held-out text, bits/byte", "{:.3f}", False),
    "val_loss": ("held-out text, nats a token", "{:.3f}", False),
    "val_accuracy": ("held-out text, hidden tokens said right", "{:.1%}", True),
    "val_perplexity": ("held-out text, perplexity", "{:,.1f}", False),
    "answer_bits_per_byte": ("held-out answers, bits/byte", "{:.3f}", False),
    "answers_ended": ("answers that end by themselves", "{:.3g} %", True),
}
EQUAL = 0.002  # a change below this share is none

Columns = Sequence[tuple[str, Mapping[str, Any], str]]  # name, metrics, digest of the weights


def draw(parts: Sequence[Part]) -> Html:
    """The section: one table an evaluation."""
    shown: list[str] = []
    for part in parts:
        title = [tag("h3", part.place)] if len(parts) > 1 else []
        found = records(part.json("results.json").get("columns"))
        columns = [(word(column, "name"), record(column, "metrics"), word(column, "weights")[:8]) for column in found]
        unread = tag("p", f"{part.place}: results.json could not be read.", class_="missing")
        shown += [*title, scores(columns) if columns else unread, *_answers(part)]
    return section("eval", "Evaluation", LEDE, *shown)


def scores(columns: Columns) -> Html:
    """A row a metric, a column a model, and how the last one differs from the one before it."""
    names = list(dict.fromkeys(name for _, metrics, _ in columns for name in metrics if not name.endswith("_stderr")))
    order = [*(name for name in METRICS if name in names), *(name for name in names if name not in METRICS)]
    compared = len(columns) > 1
    rows: list[list[str]] = []
    for name in order:
        title, written, more_is_better = METRICS.get(name, (name.replace("_", " "), "{:.1%}", True))
        if name not in METRICS and not name.endswith("_accuracy"):
            written = "{:.4g}"
        cells = [_cell(metrics, name, written) for _, metrics, _ in columns]
        change = [_change(columns[-2][1], columns[-1][1], name, more_is_better)] if compared else []
        rows.append([title, *cells, *change])
    rows.append(["weights", *(tag("code", weights or "at random") for _, _, weights in columns), *([""] * compared)])
    last = [f"{columns[-2][0]} → {columns[-1][0]}"] if compared else []
    return table(["", *(name for name, _, _ in columns), *last], rows, "scores")


def _cell(metrics: Mapping[str, Any], name: str, written: str) -> str:
    value = number(metrics, name)
    if value is None:
        return "–"
    error = number(metrics, name.replace("_accuracy", "_stderr")) if name.endswith("_accuracy") else None
    value *= 100 if name == "answers_ended" else 1
    return (written.format(value) + (f" ± {error:.1%}" if error is not None else "")).replace("%", " %")


def _change(before: Mapping[str, Any], after: Mapping[str, Any], name: str, more_is_better: bool) -> Html:
    """The change from one model to the next; in colour where it is better or worse."""
    old, new = number(before, name), number(after, name)
    if old is None or new is None:
        return Html("")
    shares = name == "answers_ended" or name.endswith("_accuracy")
    if not shares and not old:
        return Html("")
    size = new - old if shares else new / old - 1
    text = f"{100 * size:+.1f} points" if shares else f"{100 * size:+.1f} %"
    text = text.replace("-", "−")
    if abs(size) < EQUAL:
        return tag("span", text, class_="even")
    return tag("span", text, class_="better" if (size > 0) == more_is_better else "worse")


def _answers(part: Part) -> list[Html]:
    """The first questions with every model's answer; more of them folded."""
    asked: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in part.rows("samples.jsonl"):
        asked.setdefault((word(row, "prompt"), word(row, "reference")), []).append(row)
    if not asked:
        return []
    # The untrained model may have been asked fewer questions than the others: those with all answers come first.
    most = max(map(len, asked.values()))
    ordered = sorted(asked.items(), key=lambda item: len(item[1]) < most)
    cards = [_question(prompt, reference, rows) for (prompt, reference), rows in ordered[: OPEN + FOLDED]]
    folded, left = cards[OPEN:], len(asked) - len(cards)
    beyond = f" ({left:,} others are in samples.jsonl)" if left else ""
    more = [tag("details", tag("summary", f"{len(folded)} more questions{beyond}"), *folded)] if folded else []
    return [tag("h3", "Questions it has not seen, and the answers"), join(cards[:OPEN]), *more]


def _question(prompt: str, reference: str, rows: Sequence[Mapping[str, Any]]) -> Html:
    given = []
    for row in rows:
        reason = word(row, "finish_reason")
        ended = {"stop": "ended by itself", "length": "cut off"}.get(reason, reason)
        head = tag("small", tag("b", word(row, "model")), tag("span", ended, class_=f"ended {_kind(reason)}"))
        given.append(tag("div", head, tag("p", prose(word(row, "answer"), 600))))
    expected = tag("div", tag("small", tag("b", "reference")), tag("p", prose(reference, 600)), class_="reference")
    return tag("article", tag("pre", prose(prompt)), tag("div", expected, *given, class_="answers"), class_="question")


def _kind(reason: str) -> str:
    return reason if reason in ("stop", "length") else "other"
