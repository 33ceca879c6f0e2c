"""Evaluations side by side: the table, and whether one is significantly worse than another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl import console
from llmctl.artifact import MANIFEST, Artifact
from llmctl.errors import DataError, GateError

LABELS = {
    "val_loss": "loss (nats a token)",
    "val_accuracy": "hidden tokens said right",
    "val_perplexity": "perplexity",
    "val_bits_per_byte": "bits/byte",
    "answer_bits_per_byte": "bits/byte of answers",
    "answers_ended": "answers that end by themselves",
}
SIGNIFICANT = 2.0  # standard errors


def table(columns: Sequence[tuple[str, Mapping[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a metric, a column a model."""
    found = {name for _, metrics in columns for name in metrics if not name.endswith("_stderr")}
    names = [name for name in LABELS if name in found] + sorted(found - set(LABELS))
    rows = [[LABELS.get(name, name), *(_shown(name, metrics) for _, metrics in columns)] for name in names]
    return ["", *(title for title, _ in columns)], rows


def _shown(name: str, metrics: Mapping[str, float]) -> str:
    value = metrics.get(name)
    if value is None:
        return ""
    if name == "answers_ended":
        return f"{100 * value:.0f} %"
    if name.endswith("_accuracy"):
        return f"{100 * value:.1f} % ± {100 * metrics.get(name.replace('_accuracy', '_stderr'), 0.0):.1f}"
    return f"{value:.1f}" if name == "val_perplexity" else f"{value:.3f}"


def markdown(evaluation: Path) -> None:
    """Prints the table of an evaluation in Markdown."""
    results = read(evaluation)
    header, rows = table([(column["name"], column["metrics"]) for column in results["columns"]])
    console.markdown(header, rows)


def against(evaluation: Path, before: Mapping[str, Any], baseline: Path) -> None:
    """Compares with an earlier evaluation: the results that `read` found at `baseline`.

    Text is compared piece by piece (paired), accuracies by their standard errors.

    Raises:
        GateError: this one is significantly worse in something.
    """
    now = read(evaluation)
    new, old = now["columns"][-1]["metrics"], before["columns"][-1]["metrics"]
    worse = []
    same_text = now["text_sha256"] == before["text_sha256"]
    if same_text and (difference := _paired(now["windows"], before["windows"])) is not None:
        mean, error = difference
        console.say(
            f"loss {'rose' if mean > 0 else 'fell'} by {abs(mean):.4f} ± {error:.4f} nats a piece of the text, "
            f"against {baseline}"
        )
        if not mean <= SIGNIFICANT * error:  # so put, NaN is worse
            worse.append(f"val_loss {old['val_loss']} -> {new['val_loss']}")
    elif now["windows"] or before["windows"]:
        console.warn("the two evaluations scored different texts; their losses are not compared")
    for name in [key for key in new if key.endswith("_accuracy") and key in old]:
        error = math.hypot(new[name.replace("_accuracy", "_stderr")], old[name.replace("_accuracy", "_stderr")])
        worse += [f"{name} {old[name]:.3f} -> {new[name]:.3f}"] if old[name] - new[name] > SIGNIFICANT * error else []
    if worse:
        raise GateError(
            f"significantly worse than {baseline}: {'; '.join(worse)}", file=evaluation, hint="see results.json of both"
        )
    console.say(f"not significantly worse than {baseline}")


def _paired(now: Sequence[float | None], before: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean difference of paired pieces and its standard error; None where the pieces are not the same ones."""
    if len(now) != len(before) or len(now) < 2:
        return None
    numbers = [[math.nan if nats is None else nats for nats in pieces] for pieces in (now, before)]
    differences = [one - other for one, other in zip(*numbers, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def read(folder: Path) -> dict[str, Any]:
    """The results of a published evaluation.

    Raises:
        DataError: no evaluation there.
    """
    folder = folder if (folder / MANIFEST).exists() else folder.parent
    artifact = Artifact.open(folder)
    if artifact.kind != "evaluation":
        raise DataError(
            f"this is {artifact.kind}, not an evaluation",
            file=folder,
            hint="name a folder such as runs/small/eval/finetune",
        )
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found
