"""The sections on pretraining and finetuning: how the learning went, and what the model wrote on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmctl import console
from llmctl.reporting.charts import Level, Line, Point, chart
from llmctl.reporting.charts import figure as shown
from llmctl.reporting.markup import Html, compact, data, facts, named, prose, section, tag
from llmctl.reporting.story import Part, Story, held_out, number, records, say, source_name, word

PRETRAIN = (
    "Bits per byte: how many bits the model needs for a byte of text it has never seen, so fewer is better and 8 is no "
    "compression. zlib and xz pack the same bytes; primed xz has seen the training text first, as the model has."
)
FILLING = (
    "Some of the text is hidden, and the model fills it in: the share it says right, of text it has not seen. It reads "
    "what stands around, before and behind, so this is no compression and has no bits per byte."
)
FINETUNE = (
    "The model goes on learning, now only the assistant's side of conversations. Bits per byte are those of held-out "
    "answers; the first point is the model before."
)
STEPS = 60  # of samples that the slider holds
TEXT = 600  # characters of a sample
NAMES = {"zlib_bits_per_byte": "zlib", "xz_bits_per_byte": "xz", "xz_primed_bits_per_byte": "primed xz"}

THREE = "{:.3f}".format

Rows = Sequence[Mapping[str, Any]]


def pretrain(part: Part, story: Story) -> Html:
    """The section on pretraining."""
    rows, metrics = list(part.rows("metrics.jsonl")), part.metrics
    end = number(metrics, "steps")
    filling = number(metrics, "val_accuracy") is not None
    key, unit = ("val_accuracy", "of the hidden tokens") if filling else ("val_bits_per_byte", "bits/byte")
    held_out = _with_ends(_points(rows, key), None, metrics, key)
    loss = _with_ends(_points(rows, "val_loss"), None, metrics, "val_loss")
    levels = [
        Level(name, value, "primed" if "primed" in key else "reference")
        for key, name in NAMES.items()
        if (value := number(metrics, key)) is not None
    ]
    hero = chart("Held-out text", [Line("this model", held_out, dots=True)], levels, unit=unit, end=end, written=THREE)
    losses = [Line("training", _points(rows, "train_loss"), "train"), Line("held out", loss, dots=True)]
    second = chart("Loss", losses, unit="nats a token", end=end, written=THREE)
    charts = [tag("div", hero, second, class_="pair"), _small(rows, part, "pretrain")]
    plain = [] if rows else [tag("p", "metrics.jsonl could not be read: there are no curves.", class_="missing")]
    drawn = [tag("div", *charts, class_="charts")] if rows else plain
    lede = FILLING if filling else PRETRAIN
    return section("pretrain", "Pretraining", lede, *drawn, _pretrain_facts(part, story), *_samples(part, rows))


def finetune(part: Part) -> Html:
    """The section on finetuning."""
    rows, metrics = list(part.rows("metrics.jsonl")), part.metrics
    key, what = held_out(metrics)
    end = number(metrics, "steps")
    bits = _with_ends(_points(rows, key), number(metrics, f"{key}_before"), metrics, key)
    before = number(metrics, f"{key}_before")
    levels = [Level("before", before)] if before is not None else []
    hero = chart(
        f"Held-out {what}", [Line("this model", bits, dots=True)], levels, unit="bits/byte", end=end, written=THREE
    )
    loss = chart(
        "Loss", [Line("training", _points(rows, "train_loss"), "train")], unit="nats a token", end=end, written=THREE
    )
    charts = [tag("div", hero, loss, class_="pair"), _small(rows, part, "finetune")]
    plain = [] if rows else [tag("p", "metrics.jsonl could not be read: there are no curves.", class_="missing")]
    drawn = [tag("div", *charts, class_="charts")] if rows else plain
    return section("finetune", "Finetuning", FINETUNE, *drawn, _finetune_facts(part), *_samples(part, rows))


def imported(part: Part) -> Html:
    """The section on a model that was brought in."""
    origin = ", ".join(map(source_name, part.sources))
    licences = ", ".join(filter(None, (word(entry, "licence") for entry in part.sources.values())))
    size = console.size(sum(part.files.values()))
    known = [("from", origin), ("licence", licences), *shape(part), ("size", size)]
    return section("import", "Imported model", "Brought in as it was: its weights, config and tokenizer.", facts(known))


def _points(rows: Rows, key: str) -> list[Point]:
    """The values of `key` by step, in order."""
    found = []
    for row in rows:
        step, value = number(row, "step"), number(row, key)
        if step is not None and value is not None:
            found.append((step, value))
    return sorted(found, key=lambda point: point[0])


def _with_ends(points: list[Point], first: float | None, metrics: Mapping[str, Any], key: str) -> list[Point]:
    """The points with the value before the first step, and the one after the last, which stands in the manifest."""
    last, steps = number(metrics, key), number(metrics, "steps")
    ends = [(steps, last)] if last is not None and steps is not None and (not points or points[-1][0] < steps) else []
    return ([(0.0, first)] if first is not None else []) + points + ends


def _small(rows: Rows, part: Part, stage: str) -> Html:
    """The small multiples: learning rate, gradient norm and speed on the same steps."""
    end = number(part.metrics, "steps")
    rate = _points(rows, "learning_rate")
    norm = _points(rows, "gradient_norm")
    speed = _points(rows, "tokens_per_second")
    clip = number(part.section(stage), "max_grad_norm")
    limit = [Level("clipped", clip)] if clip else []
    mean = number(part.metrics, "tokens_per_second")
    peak = f"peak {shown(max(y for _, y in rate))}" if rate else ""
    three = [
        _one("Learning rate", rate, end, peak),
        _one("Gradient norm", norm, end, f"clipped at {clip:g}" if limit else "", limit),
        _one(
            "Speed",
            speed,
            end,
            f"mean {shown(mean)}" if mean else "",
            [Level("mean", mean)] if mean else [],
            "tokens/s",
        ),
    ]
    return tag("div", *three, class_="three")


def _one(
    title: str, points: list[Point], end: float | None, note: str, levels: Sequence[Level] = (), unit: str = ""
) -> Html:
    return chart(title, [Line(title, points, "plain")], levels, unit=unit, height=130, zero=True, end=end, note=note)


def shape(part: Part) -> list[tuple[str, str]]:
    """The model's architecture from its config.json."""
    config = part.json("config.json")
    whole = "{:,.0f}".format
    heads = say(config, "num_attention_heads", "{} heads", whole)
    groups, size = number(config, "num_key_value_heads"), say(config, "head_dim", " of {}", whole)
    grouped = (
        f", {groups:.0f} for keys and values" if groups and groups != number(config, "num_attention_heads") else ""
    )
    layers = say(config, "num_hidden_layers", "{} layers", whole) + say(config, "hidden_size", " × {}", whole)
    tied = " · input and output embeddings tied" if config.get("tie_word_embeddings") is True else ""
    return [
        ("architecture", word(config, "model_type") + tied),
        ("shape", layers + say(config, "intermediate_size", " · feed-forward {}", whole)),
        ("attention", heads + size + grouped if heads else ""),
        ("vocabulary", say(config, "vocab_size", "{} pieces", whole)),
        ("context", say(config, "max_position_embeddings", "{} tokens", whole)),
        ("parameters", say(part.metrics, "parameters", "{}", whole)),
    ]


def _work(part: Part, stage: str) -> list[tuple[str, str]]:
    """What both trainings report of their steps."""
    metrics, batch = part.metrics, part.section(stage).get("global_batch_size")
    steps = say(metrics, "steps", "{}", "{:,.0f}".format)
    length = say(part.json("config.json"), "max_position_embeddings", " × {} tokens", "{:,.0f}".format)
    skipped = say(metrics, "skipped_steps", ", {} skipped (no finite loss)") if number(metrics, "skipped_steps") else ""
    each = f" × {batch:,} sequences{length if stage == 'pretrain' else ''}" if isinstance(batch, int) else ""
    schedule = part.section(stage).get("lr_scheduler")
    optimizer = " · ".join(str(name) for name in (part.section(stage).get("optimizer"), schedule) if name)
    return [
        ("optimizer", optimizer),
        ("steps", steps + each + skipped if steps else ""),
        ("time in steps", say(metrics, "seconds", "{}", console.duration)),
        ("peak memory", say(metrics, "peak_memory_bytes", "{}", console.size)),
    ]


def _pretrain_facts(part: Part, story: Story) -> Html:
    metrics, prep = part.metrics, story.part("prep")
    tokens, there = number(metrics, "tokens"), number(prep.metrics, "train_tokens") if prep is not None else None
    passes = tokens / there if tokens and there else 0.0
    share = f"{passes:.1f} passes over" if passes >= 0.95 else f"{100 * passes:.2g} % of"
    read = say(metrics, "tokens") + (f", {share} the training text" if passes else "")
    loss = say(metrics, "val_loss", "{} nats a token", "{:.3f}".format)
    perplexity = say(metrics, "val_perplexity", " · perplexity {}", "{:,.1f}".format)
    right = say(metrics, "val_accuracy", "{}", "{:.1%}".format).replace("%", " %")
    held_out = [("held-out loss", loss + perplexity), ("hidden tokens said right", right)]
    return facts([*shape(part), ("tokens read", read), *held_out, *_work(part, "pretrain")])


def _finetune_facts(part: Part) -> Html:
    metrics, percent = part.metrics, "{:.0%}".format
    method = part.section("finetune").get("method")
    rank = part.section("finetune").get("lora_r")
    whose = "" if part.section("finetune").get("text") else " (the assistant's)"
    known: list[tuple[str, str]] = [
        ("sources", named((source_name(name), word(found, "sha256")) for name, found in part.sources.items())),
        (
            "method",
            f"LoRA, rank {rank}" if method == "lora" else "all weights" if method == "full" else str(method or ""),
        ),
        ("conversations", say(metrics, "conversations") if number(metrics, "conversations") else ""),
        ("tokens learned from", say(metrics, "supervised_share", f"{{}}{whose}", percent).replace("%", " %")),
        ("answers that end by themselves", say(metrics, "answers_ended", "{}", percent).replace("%", " %")),
        *_smaller(part),
    ]
    return facts([*known, *_work(part, "finetune")])


def _smaller(part: Part) -> list[tuple[str, str]]:
    """What pruning took and cost: before, pruned, and after learning."""
    rows, section_ = records(part.metrics.get("compression")), part.section("finetune")
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "nonzero_parameters": ("parameters that are not zero", console.count),
        "prefill_tokens_per_second": ("tokens a second, read", "{:,.0f}".format),
        "decode_tokens_per_second": ("tokens a second, written", "{:,.0f}".format),
        "val_bits_per_byte": ("bits per byte of held-out text", THREE),
        "answer_bits_per_byte": ("bits per byte of held-out answers", THREE),
    }
    found = [
        (title, " → ".join(filter(None, (say(row, key, "{}", told) for row in rows))))
        for key, (title, told) in shown.items()
    ]
    teacher = word(section_, "teacher") or ("base" if rows and number(section_, "distill_weight") else "")
    return [("pruning", word(section_, "prune")), ("teacher", teacher), *found] if rows or teacher else []


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(part: Part, rows: Rows) -> list[Html]:
    """For each prompt, what the model went on with after its first steps, at a step of the reader's choice, at the
    end.
    """
    prompts: dict[str, dict[float, str]] = {}
    for row in part.rows("samples.jsonl"):
        step = number(row, "step")
        if step is not None:
            prompts.setdefault(word(row, "prompt"), {})[step] = word(row, "text")
    steps = _chosen(sorted({step for texts in prompts.values() for step in texts}))
    if not steps:
        return []
    middle = steps[len(steps) // 2]
    picks = list(dict.fromkeys([steps[0], middle, steps[-1]]))
    bits = {step: value for key in ("val_bits_per_byte", "answer_bits_per_byte") for step, value in _points(rows, key)}
    last = number(part.metrics, "val_bits_per_byte")
    if last is not None:
        bits.setdefault(steps[-1], last)
    names = [f"step {step:,.0f}" + (f" · {bits[step]:.2f} bits/byte" if step in bits else "") for step in steps]
    cards = [
        _card(prompt, texts, picks, middle, dict(zip(steps, names, strict=True))) for prompt, texts in prompts.items()
    ]
    texts_by_step = [[compact(texts.get(step, ""), TEXT) for texts in prompts.values()] for step in steps]
    told = data({"names": names, "texts": texts_by_step})
    slider = tag(
        "label",
        "The middle row shows ",
        tag("input", type="range", min=0, max=len(steps) - 1, value=len(steps) // 2, step=1),
        tag("output", names[len(steps) // 2]),
        class_="slider",
    )
    lede = "The same beginnings, continued by the model as it learned."
    grid = tag("div", *cards, class_="samples", style=f"--rows:{1 + len(picks)}")
    controls = [slider] if len(steps) > 3 else []
    return [
        tag("h3", "What it wrote on the way"),
        tag("p", lede, class_="lede"),
        tag("div", *controls, grid, told, class_="scrub"),
    ]


def _card(
    prompt: str, texts: Mapping[float, str], picks: Sequence[float], middle: float, names: Mapping[float, str]
) -> Html:
    shown_steps = []
    for step in picks:
        kind = "scrubbed" if step == middle and len(picks) == 3 else None
        text = prose(texts[step], TEXT) if step in texts else tag("span", "(no sample)", class_="space")
        shown_steps.append(tag("div", tag("small", names[step]), tag("p", text), class_=kind))
    return tag("article", tag("p", prose(prompt, TEXT), class_="prompt"), *shown_steps)


def _chosen(steps: Sequence[float], most: int = STEPS) -> list[float]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]
