"""Reading a run for its report: whatever can be read, and why the rest can't. Nothing here raises on bad data."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl import console
from llmctl.artifact import MANIFEST, Run
from llmctl.errors import DataError

PLACES = ("prep", "import", "pretrain", "finetune")
TRAININGS = ("pretrain", "finetune")
RESOLVED = "recipe.resolved.toml"
LINES = 500_000  # of a log that are read: more than any training here writes
HUGE = 1e30  # nothing that a run measures is so large
BUILTIN = {
    "builtin:python-stdlib": "Python's standard library",
    "builtin:python-docstrings": "Python's docstrings",
}


@dataclass(frozen=True)
class Part:
    """One place of the run, as far as it could be read."""

    place: str
    folder: Path  # of its files: the artifact, or the working folder of what is not finished
    manifest: Mapping[str, Any]  # empty where there is none to read
    damage: str = ""  # why the artifact is not to be trusted
    unfinished: bool = False  # begun and not published

    @property
    def stage(self) -> str:
        return self.place.split("/")[0]

    @property
    def identity(self) -> str:
        return word(self.manifest, "identity")

    @property
    def short(self) -> str:
        """The first eight digits of the identity, as shown to people."""
        return self.identity[:8]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return record(self.manifest, "metrics")

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        return records(self.manifest.get("inputs"))

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: record(found, name) for found in [record(self.manifest, "sources")] for name in found}

    @property
    def files(self) -> Mapping[str, float]:
        """Bytes of each file, the largest first."""
        entries = record(self.manifest, "files")
        sizes = {name: number(record(entries, name), "bytes") or 0.0 for name in entries}
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def seconds(self) -> float:
        """How long it took; of a training that was resumed, at least the steps of all its parts."""
        return max(number(record(self.manifest, "times"), "seconds") or 0.0, number(self.metrics, "seconds") or 0.0)

    @property
    def finished(self) -> float:
        """When, in seconds since 1970; 0 where nobody knows."""
        times = record(self.manifest, "times")
        started = number(times, "started")
        return started + (number(times, "seconds") or 0.0) if started is not None else 0.0

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the recipe as the stage read it."""
        return record(record(self.manifest, "sections"), name)

    def json(self, name: str) -> Mapping[str, Any]:
        """One of its JSON files; empty where it can't be read."""
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def rows(self, name: str) -> Iterator[Mapping[str, Any]]:
        """The lines of one of its logs that are whole."""
        try:
            with (self.folder / name).open(encoding="utf-8", errors="replace") as stream:
                for line, _ in zip(stream, range(LINES), strict=False):
                    try:
                        found = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(found, dict):
                        yield found
        except OSError:
            return


@dataclass(frozen=True)
class Story:
    """A whole run."""

    name: str
    path: Path
    parts: Mapping[str, Part]  # by place, in the order of the chain
    recipe: str  # the text of the recipe as it was resolved, without what says where it lay
    overrides: tuple[str, ...]
    asked: frozenset[str]  # the recipe's sections

    def part(self, place: str) -> Part | None:
        """What is at `place`, if anything."""
        return self.parts.get(place)

    def of(self, stage: str) -> list[Part]:
        """All parts that a stage made."""
        return [part for part in self.parts.values() if part.stage == stage]

    @property
    def when(self) -> str:
        """When its last artifact was finished: of the run, not of the clock, so that equal runs have equal pages."""
        last = max((part.finished for part in self.parts.values()), default=0.0)
        try:
            return f"{datetime.fromtimestamp(last, UTC):%d %B %Y, %H:%M UTC}".lstrip("0") if last > 0 else ""
        except (ValueError, OverflowError, OSError):
            return ""

    def outdated(self, part: Part) -> str:
        """The place of an input that has been made anew since `part` was; empty where there is none."""
        for entry in part.inputs:
            now = self.parts.get(word(entry, "path"))
            if now is not None and now.identity and now.identity != word(entry, "identity"):
                return now.place
        return ""


def read(run: Run) -> Story:
    """Everything the report needs to know of a run."""
    places = [*PLACES, *_folders(run.path, "eval/*"), *_folders(run.path, "export/*/*")]
    found = {place: part for place in places if (part := _part(run, place)) is not None}
    for place in _folders(run.path / ".work", "export/*/*"):  # what the parity gate stopped
        if place not in found and (run.work(place) / "parity.json").is_file():
            found[place] = Part(place, run.work(place), {}, unfinished=True)
    return Story(run.name or run.path.resolve().name, run.path, found, *_recipe(run.path / RESOLVED))


def _folders(path: Path, pattern: str) -> list[str]:
    """Published places of a pattern; a hidden folder is one that is being published."""
    found = (folder for folder in path.glob(pattern) if folder.is_dir() and not folder.name.startswith("."))
    # A copy of the model comes after the graphs, which have something to tell.
    return sorted(
        (folder.relative_to(path).as_posix() for folder in found), key=lambda place: (place.endswith("/hf"), place)
    )


def _part(run: Run, place: str) -> Part | None:
    folder, work = run.path / place, run.work(place)
    unfinished = place in TRAININGS and (work / "metrics.jsonl").is_file()
    if not folder.is_dir():
        return Part(place, work, {}, unfinished=True) if unfinished else None
    try:
        artifact = run.artifact(place)
        if artifact is not None:
            return Part(place, folder, artifact.manifest)
        damage = f"{MANIFEST} is missing"
    except DataError as problem:
        damage = problem.message
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError):
        damage = f"{MANIFEST} does not read as a manifest"
    return Part(place, folder, Part(place, folder, {}).json(MANIFEST), damage)


def _recipe(path: Path) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """The resolved recipe's text without [origin], which names folders of one machine; that call's overrides; and the
    sections.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", (), frozenset()
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        table = {}
    overrides = record(table, "origin").get("overrides")
    kept = re.split(r"^\[origin\]\s*$", text, maxsplit=1, flags=re.MULTILINE)[0]
    said = tuple(map(str, overrides)) if isinstance(overrides, list) else ()
    return kept.strip(), said, frozenset(name for name in table if isinstance(table[name], dict))


# ------------------------------------------------------------------------------------------- values of uncertain type


def number(found: Mapping[str, Any], key: str) -> float | None:
    """A number under `key`. One beyond HUGE, infinite or none at all counts as absent, one below 1 / HUGE as zero."""
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < HUGE:
        return None
    return float(value) if abs(value) * HUGE > 1 else 0.0


def word(found: Mapping[str, Any], key: str) -> str:
    """A text under `key`; empty where there is none."""
    value = found.get(key)
    return value if isinstance(value, str) else ""


def record(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table under `key`; empty where there is none."""
    value = found.get(key)
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[Mapping[str, Any]]:
    """The tables in a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def say(found: Mapping[str, Any], key: str, text: str = "{}", shown: Callable[[float], str] = console.count) -> str:
    """The number under `key` as part of a text; empty where there is none."""
    value = number(found, key)
    return text.format(shown(value)) if value is not None else ""


def held_out(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The key that a finetuning is measured by, and what of: answers, unless it learned from text alone."""
    key = "answer_bits_per_byte"
    text = number(metrics, "val_bits_per_byte") is not None and number(metrics, key) is None
    return ("val_bits_per_byte", "text") if text else (key, "answers")


def source_name(spec: str) -> str:
    """A source as people call it."""
    if spec.startswith("hf:"):
        return re.sub(r"@([0-9a-f]{8})[0-9a-f]+$", r" at \1", spec.removeprefix("hf:"))
    return BUILTIN.get(spec, spec.rstrip("/").rsplit("/", 1)[-1] if spec.startswith(("/", "~")) else spec)
