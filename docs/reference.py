"""Generates the pages of docs/ that follow from the code. `--check` fails if one is not what the code says.

docs/recipe.md            every section and key
docs/recipe.schema.json   the recipe's JSON Schema, for editors
docs/result.schema.json   the document of `--json`
docs/commands.md          what `--help` says of every command
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from llmctl import cli, recipe

DOCS = Path(__file__).parent
SECTIONS = ("prep", "prep.tokenizer", "model", "pretrain", "finetune", "eval", "export", "serve")
RESULT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "What a llmctl command prints with --json",
    "type": "object",
    "required": ["ok", "error", "artifact", "identity", "metrics"],
    "properties": {
        "ok": {"type": "boolean"},
        "error": {
            "type": ["object", "null"],
            "required": ["code", "message", "hint", "file", "line"],
            "properties": {
                "code": {
                    "enum": [
                        "usage",
                        "recipe",
                        "data",
                        "run",
                        "gate",
                        "unavailable",
                        "busy",
                        "time",
                        "interrupted",
                        "bug",
                    ]
                },
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "file": {"type": ["string", "null"]},
                "line": {"type": ["integer", "null"]},
            },
        },
        "artifact": {"type": ["string", "null"], "description": "The folder that was made or asked for."},
        "identity": {
            "type": ["string", "null"],
            "description": "SHA-256 that names the artifact's content and origin.",
        },
        "metrics": {"type": "object", "description": "The artifact's metrics under the field's names."},
        "plan": {"type": "object", "description": "plan: by training, what it will cost; null is not known yet."},
        "paused": {"type": "object", "description": "--until-step was reached: stage, step, steps; no artifact yet."},
        "stages": {"type": "object", "description": "By place: what was made now, or (status) how it stands."},
    },
}


def recipe_page() -> str:
    """The recipe reference in Markdown."""
    parts = [
        "# The recipe",
        "",
        "*Generated from the schema by `make docs`.* TOML, one file a pipeline. Top level: `name` (the run's folder",
        "under `runs/`), `seed` (everything random flows from it), `base` (another recipe, read first). Paths are",
        "relative to the recipe; those of `--set` to the current folder. A section that is absent is a stage that is",
        "absent. *Operational* keys say how a call runs: changing one never makes an artifact stale.",
        "",
    ]
    for section in SECTIONS:
        about = recipe.SECTION_TYPES[section].__doc__ or ""
        parts += [
            f"## [{section}]",
            "",
            about.splitlines()[0],
            "",
            "| key | kind | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, kind, default, meaning in recipe.reference(section):
            cells = (f"`{key}`", kind.replace("|", "or"), f"`{default}`", meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its whole name; those of a group (`bench train`) one by one."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield above + name, command


def commands_page() -> str:
    """What each command does and takes."""
    group = typer.main.get_command(cli.app)
    common = set(cli._COMMON)
    parts = ["# Commands", "", "*Generated from the command line by `make docs`.*", ""]
    for name, command in commands(group):
        parts += [f"## llmctl {name}", "", (command.help or "").strip(), ""]
        for parameter in command.params:
            if parameter.name in common or parameter.name == "help":
                continue
            shown = parameter.name.upper() if not parameter.opts[0].startswith("-") else ", ".join(parameter.opts)
            parts.append(f"- `{shown}`: {getattr(parameter, 'help', '') or ''}")
        parts.append("")
    parts += ["## Flags that mean the same everywhere", ""]
    first = next(iter(group.commands.values()))  # type: ignore[attr-defined]
    parts += [f"- `{', '.join(p.opts)}`: {p.help}" for p in first.params if p.name in common]  # type: ignore[attr-defined]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


def main() -> int:
    """Writes the pages, or compares them."""
    pages = {
        "recipe.md": recipe_page(),
        "recipe.schema.json": json.dumps(recipe.json_schema(), indent=2) + "\n",
        "result.schema.json": json.dumps(RESULT, indent=2) + "\n",
        "commands.md": commands_page(),
    }
    if "--check" not in sys.argv:
        for name, text in pages.items():
            (DOCS / name).write_text(text, encoding="utf-8")
        return 0
    behind = [name for name, text in pages.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    if behind:
        print(f"docs/{', docs/'.join(behind)}: not what the code says; `make docs` writes them anew", file=sys.stderr)
    return bool(behind)


if __name__ == "__main__":
    sys.exit(main())
