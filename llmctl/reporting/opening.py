"""The head of the page: what the run is, in one sentence and a handful of figures."""

from __future__ import annotations

import re

from llmctl import console
from llmctl.reporting.charts import small
from llmctl.reporting.markup import Html, join, tag
from llmctl.reporting.story import PLACES, Part, Story, held_out, number, record, say, source_name, word


def head(story: Story) -> Html:
    """Name, when and where, the sentence, the figures, and what is wrong or missing."""
    first, *more = sentences(story) or ["Nothing has been made in this run yet."]
    lead = [tag("p", _unbroken(first), class_="lead")]
    lead += [tag("p", _unbroken(" ".join(more)), class_="more")] if more else []
    where = [tag("span", text) for text in (story.when, device(story), total(story)) if text]
    meta = tag("p", join(where, " · "), class_="meta")
    return tag(
        "header", tag("p", "llmctl report", class_="eyebrow"), tag("h1", story.name), meta, *lead, *warnings(story)
    )


def _unbroken(text: str) -> str:
    """A number stays on the line of its unit."""
    return re.sub(r"(?<=\d) (?=[\w%])|(?<=min) (?=\d)", "\u00a0", text)


def device(story: Story) -> str:
    """What the models were trained on, else what made the last part."""
    parts = [part for part in story.parts.values() if part.manifest]
    chosen = [part for part in parts if part.stage in ("pretrain", "finetune")] or parts[-1:]
    names = []
    for part in chosen:
        found = record(part.manifest, "environment")
        threads = say(found, "threads", " × {} threads") if word(found, "device") else ""
        names.append(word(found, "device") + threads)
    return ", then ".join(dict.fromkeys(filter(None, names)))


def total(story: Story) -> str:
    """The time of all stages together."""
    seconds = sum(part.seconds for part in story.parts.values())
    return f"{console.duration(seconds)} in all stages" if seconds else ""


def sentences(story: Story) -> list[str]:
    """The result, the one that matters first."""
    found = [_pretrained(story.part("pretrain"), story), _imported(story), _finetuned(story.part("finetune"))]
    return [sentence for sentence in [*found, _exported(story)] if sentence]


def _pretrained(part: Part | None, story: Story) -> str:
    """`5.9 M parameters read 2.9 M tokens of Python's standard library in 6 min: 1.36 bits/byte ...`."""
    if part is None or not part.manifest:
        return ""
    metrics, prep = part.metrics, story.part("prep")
    names = [source_name(spec) for spec in prep.sources] if prep is not None else []
    of = f" of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else ""
    read = say(metrics, "tokens", "read {} tokens") + of + say(metrics, "seconds", " in {}", console.duration)
    who = say(metrics, "parameters", "{} parameters") or "A model"
    bits, primed = number(metrics, "val_bits_per_byte"), number(metrics, "xz_primed_bits_per_byte")
    right = say(metrics, "val_accuracy", ": it fills in {} of what is hidden of held-out text", "{:.1%}".format)
    if bits is None:
        return f"{who} {read}{right.replace('%', ' %')}."
    reached = f"{who} {read}: "
    if primed is None:
        return f"{reached}{bits:.2f} bits/byte on held-out text."
    digits = 2 if f"{bits:.2f}" != f"{primed:.2f}" else 4
    side = "below" if bits < primed else "above"
    return f"{reached}{bits:.{digits}f} bits/byte on held-out text, {side} primed xz at {primed:.{digits}f}."


def _imported(story: Story) -> str:
    part = story.part("import")
    if part is None or not part.manifest:
        return ""
    config = part.json("config.json")
    kind = f"{word(config, 'model_type')} model".strip()
    origin = " and ".join(map(source_name, part.sources))
    size = say(part.metrics, "parameters", " of {} parameters")
    return f"A {kind}{size} was brought in{f' from {origin}' if origin else ''}."


def _finetuned(part: Part | None) -> str:
    if part is None or not part.manifest:
        return ""
    metrics = part.metrics
    on = say(metrics, "conversations", " on {} conversations") if number(metrics, "conversations") else " on text"
    key, what = held_out(metrics)
    before, after = number(metrics, f"{key}_before"), number(metrics, key)
    ended = say(metrics, "answers_ended", " and ends {} of its answers by itself", "{:.0%}".format).replace("%", " %")
    if before is None or after is None:
        return f"Finetuned{on}."
    change = f"{abs(after / before - 1):.0%}".replace("%", " %") if before else ""
    fewer = "fewer" if after <= before else "more"
    return (
        f"Finetuned{on}, it needs {change} {fewer} bits for {what} it has not seen "
        f"({before:.2f} to {after:.2f} a byte){ended}."
    )


def _exported(story: Story) -> str:
    for part in story.of("export"):
        error, size = number(part.metrics, "parity_error"), number(part.metrics, "bytes")
        if error is not None and size is not None:
            return f"Its ONNX graph ({console.size(size)}) gives the model's numbers to within {small(error)}."
    return ""


def warnings(story: Story) -> list[Html]:
    """What is damaged, unfinished, out of step or not there: each said once, where it is seen first."""
    said: list[Html] = []
    for part in story.parts.values():
        name = tag("b", part.place)
        if part.damage:
            said.append(join([name, f" is damaged: {part.damage}. What follows shows what could still be read."]))
        elif part.unfinished and part.stage == "export":
            said.append(join([name, " was stopped by its parity gate: nothing was published."]))
        elif part.unfinished:
            said.append(join([name, " is not finished: its curves end where it stands."]))
        elif outdated := story.outdated(part):
            said.append(join([name, f" was made from an older {outdated}: llmctl run makes it again."]))
    missing = [place for place in PLACES[:1] + PLACES[2:] if story.part(place) is None]
    missing += [stage for stage in ("eval", "export") if not story.of(stage)]
    found = [tag("ul", *(tag("li", line) for line in said), class_="warnings")] if said else []
    if missing:
        asked = [stage for stage in missing if stage in story.asked]
        todo = f" The recipe asks for {' and '.join(asked)}: llmctl run makes what is missing." if asked else ""
        found.append(tag("p", f"Not in this run: {', '.join(missing)}.{todo}", class_="missing"))
    return found
