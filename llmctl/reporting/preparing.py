"""The section on prep: the funnel from documents to tokens, and a few documents as they were read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl import console
from llmctl.reporting.markup import Html, facts, join, named, prose, section, tag
from llmctl.reporting.story import Part, number, record, say, source_name, word

SHOWN = 4  # documents
TONES = ("drop-a", "drop-b", "drop-c")  # reasons to drop a document, in turn
LEDE = "How much text came in, what was left out and why, and how the rest was split and cut into tokens."

Segment = tuple[str, float, str]  # name, amount, tone


def draw(part: Part) -> Html:
    """The section."""
    rows = funnel(part.metrics)
    origin = named((source_name(name), word(found, "sha256")) for name, found in part.sources.items())
    metrics = part.metrics
    known = facts(
        [
            ("sources", origin),
            ("vocabulary", say(metrics, "vocab_size", "{} pieces")),
            ("a token is", say(metrics, "bytes_per_token", "{} bytes on average", "{:.2f}".format)),
            ("longest document", say(metrics, "longest_document", "{} tokens")),
            ("passed over", _counted(record(metrics, "files_passed_over"))),
            ("lines left out", say(metrics, "lines_left_out") if number(metrics, "lines_left_out") else ""),
        ]
    )
    return section("prep", "Text", LEDE, *rows, known, *_documents(part))


def funnel(metrics: Mapping[str, Any]) -> list[Html]:
    """Bars: read, kept and dropped, the split in documents, the split in tokens; a bar without figures is left out."""
    read, kept = number(metrics, "documents_read"), number(metrics, "documents")
    dropped = record(metrics, "dropped")
    reasons = [(name, number(dropped, name) or 0.0) for name in sorted(dropped)]
    lost: list[Segment] = [
        (name, amount, TONES[index % len(TONES)]) for index, (name, amount) in enumerate(reasons) if amount > 0
    ]
    split = [
        ("training", number(metrics, "train_documents"), "train"),
        ("held out", number(metrics, "val_documents"), "val"),
    ]
    tokens = [
        ("training", number(metrics, "train_tokens"), "train"),
        ("held out", number(metrics, "val_tokens"), "val"),
    ]
    whole = read or (kept or 0.0) + sum(amount for _, amount, _ in lost)
    rows = [
        ("read", "documents", say(metrics, "bytes_read", "{}", console.size), whole, [("documents", read, "all")]),
        ("kept", "documents", say(metrics, "bytes", "{}", console.size), whole, [("kept", kept, "kept"), *lost]),
        ("split", "documents", _split(metrics), kept, split),
        ("encoded", "tokens", say(metrics, "tokens", "{} tokens"), sum(amount or 0 for _, amount, _ in tokens), tokens),
    ]
    made = []
    for name, unit, beside, limit, segments in rows:
        known = [(title, amount, tone) for title, amount, tone in segments if amount is not None]
        if known and limit:
            made.append(_bar(name, unit, beside, limit, known))
    return [tag("div", *made, class_="funnel")] if made else []


def _split(metrics: Mapping[str, Any]) -> str:
    return {"tail": "the end of the text is held out", "hash": "by a hash of each document"}.get(
        word(metrics, "split"), ""
    )


def _bar(name: str, unit: str, beside: str, whole: float, segments: Sequence[Segment]) -> Html:
    """A bar of segments, and below it what each one is."""
    drawn = [
        tag("i", class_=tone, style=f"width:{amount / whole:.3%}", title=f"{title} {amount:,.0f} {unit}")
        for title, amount, tone in segments
        if amount > 0
    ]
    total = sum(amount for _, amount, _ in segments)
    named = []
    for title, amount, tone in segments:
        share = f" {amount / total:.1%}".replace("%", " %") if len(segments) > 1 and total else ""
        words = [tag("i", class_=tone), f"{title} "] if len(segments) > 1 else []
        figure = tag("b", console.count(amount))
        named.append(tag("span", *words, figure, share if len(segments) > 1 else f" {title}"))
    bar = tag("div", *drawn, class_="bar")
    return tag("div", tag("b", name), tag("div", bar, tag("p", *named)), tag("small", beside), class_="row")


def _counted(found: Mapping[str, Any]) -> str:
    counts = sorted(((number(found, kind) or 0.0, kind) for kind in found), key=lambda pair: (-pair[0], pair[1]))
    return " · ".join(f"{kind} {amount:,.0f}" for amount, kind in counts[:8])


def _documents(part: Part) -> list[Html]:
    """The first documents of samples.jsonl, each one folded."""
    shown = []
    for row in itertools.islice(part.rows("samples.jsonl"), SHOWN):
        size = say(row, "bytes", " · {}", console.size) + say(row, "tokens", " · {} tokens")
        split = {"train": "training", "val": "held out"}.get(word(row, "split"), "")
        head = tag("summary", tag("code", word(row, "origin") or "a document"), tag("small", f"{split}{size}"))
        shown.append(tag("details", head, tag("pre", prose(word(row, "text")))))
    return [tag("h3", "Documents as they were read"), join(shown)] if shown else []
