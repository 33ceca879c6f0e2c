"""The last section: the recipe as it was resolved, the machine and the versions, and the commands that do it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from llmctl.reporting.markup import Html, escape, facts, section, table, tag
from llmctl.reporting.story import Part, Story, record, say, source_name, word

LEDE = "The same recipe, text and versions make the same artifacts; on one machine in fp32, to the bit."
LOG_LINES = 60  # of a stage's log, from its end
TOKEN = re.compile(
    r'(?P<comment>#.*$)|(?P<head>^\[.*\]$)|(?P<text>"(?:\\.|[^"\\])*")|(?P<key>^[\w.-]+(?= =))', re.MULTILINE
)


def draw(story: Story) -> Html:
    """The section."""
    shown = [tag("h3", "Do it again"), tag("pre", commands(story), class_="commands")]
    if story.recipe:
        shown += [tag("h3", "The recipe, every value filled in"), tag("pre", coloured(story.recipe), class_="recipe")]
    else:
        shown.append(tag("p", "recipe.resolved.toml could not be read.", class_="missing"))
    shown += [tag("h3", "Artifacts"), _artifacts(story), tag("h3", "Made by"), *_environments(story), *_logs(story)]
    return section("repeat", "Repeat", LEDE, *shown)


def commands(story: Story) -> str:
    """What to type; the recipe below is the file it names."""
    name, run = shlex.quote(f"{story.name}.toml"), shlex.quote(f"runs/{story.name}")
    changed = [f"# the recipe holds what --set changed: {' '.join(map(shlex.quote, story.overrides))}"]
    model = any(part.stage not in ("prep", "eval") for part in story.parts.values())
    use = [f"llmctl chat {run}", f"llmctl serve {run}"] if model else []
    make = [f"llmctl run {name}"] if story.recipe else []
    lines = [*make, f"llmctl status {run}", f"llmctl verify {run}", *use]
    return "\n".join([*(changed if story.overrides else []), *lines])


def coloured(toml: str) -> Html:
    """TOML with its comments, headings, keys and strings told apart."""
    pieces: list[str] = []
    end = 0
    for found in TOKEN.finditer(toml):
        pieces += [escape(toml[end : found.start()]), tag("span", found[0], class_=f"toml-{found.lastgroup}")]
        end = found.end()
    return Html("".join([*pieces, escape(toml[end:])]))


def _artifacts(story: Story) -> Html:
    """Every artifact with its whole identity, and what it was made from."""
    rows: list[list[str]] = []
    for part in story.parts.values():
        made = [f"{word(entry, 'role')} {word(entry, 'identity')[:8]}" for entry in part.inputs]
        made += [f"{source_name(name)} {word(found, 'sha256')[:8]}" for name, found in part.sources.items()]
        rows.append([part.place, tag("code", part.identity or "none"), ", ".join(made)])
    return table(["artifact", "identity", "made from"], rows, "artifacts")


def _environments(story: Story) -> list[Html]:
    """The machine and the versions; each one once, with the stages that ran on it where they are several."""
    machines: dict[tuple[tuple[str, str], ...], list[Part]] = {}
    for part in story.parts.values():
        if found := record(part.manifest, "environment"):
            machines.setdefault(_machine(found), []).append(part)
    shown = []
    for machine, parts in machines.items():
        packages: dict[str, str] = {}
        for part in parts:
            found = record(record(part.manifest, "environment"), "packages")
            packages |= {name: str(version) for name, version in found.items()}
        versions = " · ".join(f"{name} {packages[name]}" for name in sorted(packages))
        stages = ", ".join(part.place for part in parts) if len(machines) > 1 else ""
        shown.append(facts([("stages", stages), *machine, ("packages", versions)]))
    return shown


def _machine(found: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    isa = found.get("isa")
    return (
        ("llmctl", word(found, "llmctl")),
        ("python", word(found, "python")),
        ("device", word(found, "device") + say(found, "threads", " · {} threads")),
        ("instruction sets", ", ".join(map(str, isa)) if isinstance(isa, list) else ""),
        ("platform", word(found, "platform")),
    )


def _logs(story: Story) -> list[Html]:
    """What each stage said in the terminal, folded."""
    shown = []
    for stage in ("prep", "import", "pretrain", "finetune", "eval", "export"):
        try:
            text = (story.path / "logs" / f"{stage}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        lines = text.rstrip().splitlines()
        cut = [f"… {len(lines) - LOG_LINES:,} lines before"] if len(lines) > LOG_LINES else []
        body = tag("pre", "\n".join([*cut, *lines[-LOG_LINES:]]))
        shown.append(tag("details", tag("summary", tag("code", f"{stage}.log")), body))
    return [tag("h3", "What the stages said"), *shown] if shown else []
