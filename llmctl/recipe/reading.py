"""How a recipe is read: its base, the overrides, and errors that name file, line and the mend."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmctl.errors import RecipeError
from llmctl.recipe.schema import SECTION_TYPES, SECTIONS, Recipe


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, the one its `base` names below it, and the `--set` overrides on top (their paths from the
    current folder).

    Raises:
        RecipeError: not TOML, an unknown key or section, a value of the wrong kind; with file, line and the mend.
    """
    text, table = _read(path)
    places = {key: (path, line) for key, line in _lines(text)}
    base = table.pop("base", None)
    if base is not None:
        below = path.parent / str(base)
        below_text, below_table = _read(below, named_by=(path, places.get(("base",), (path, 1))[1]))
        if "base" in below_table:
            raise RecipeError(
                "a base may not have a base itself",
                file=path,
                line=places[("base",)][1],
                hint=f"copy what you need from {below}",
            )
        below_table.pop("name", None)
        places = {key: (below, line) for key, line in _lines(below_text)} | places
        table = _rebased(_merge(below_table, table), below, path, places)
    table.setdefault("name", default_name(path))
    return _validated(table, overrides, path, places)


def of(table: dict[str, Any], overrides: Sequence[str], file: Path) -> Recipe:
    """A recipe that no file holds (yet): `table` with the overrides on top; `file` is where it would be kept."""
    return _validated(_copied(table), overrides, file, {})


def _validated(
    table: dict[str, Any], overrides: Sequence[str], path: Path, places: dict[tuple[str, ...], tuple[Path, int]]
) -> Recipe:
    origin = table.get("origin")
    given = origin.get("root") if isinstance(origin, dict) else None
    root = Path(given if isinstance(given, str) and given else path.parent).absolute()
    for override in overrides:
        key, value = parse_override(override)
        _set(table, key, _below(root, value) if key in PATHS else value, override)
        places = {key[:depth]: (Path(f"--set {override}"), 0) for depth in range(1, len(key))} | places
        places[key] = (Path(f"--set {override}"), 0)
    try:
        return Recipe.model_validate({**table, "file": path, "root": root})
    except ValidationError as problem:
        raise _explained(problem.errors()[0], path, places) from None


def default_name(named: Path | str) -> str:
    """The run's name that a file suggests, less its suffix; or that a folder's name does, as it is (Qwen3-0.6B)."""
    stem = named.stem if isinstance(named, Path) else named
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    return name if name not in ("", "current") else "run"


def _read(path: Path, named_by: tuple[Path, int] | None = None) -> tuple[str, dict[str, Any]]:
    file, line = named_by or (path, None)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = (
            difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.toml")], 1)
            if path.parent.is_dir()
            else []
        )
        hint = f"did you mean {path.parent / near[0]}?" if near else "llmctl init FOLDER writes one for your text"
        raise RecipeError(
            f"no recipe {path}" if named_by else "no such recipe", file=file, line=line, hint=hint
        ) from None
    except UnicodeDecodeError:
        raise RecipeError("the recipe is not UTF-8 text", file=file, line=line, hint="save it as UTF-8") from None
    except OSError as reason:
        raise RecipeError(f"the recipe cannot be read: {reason.strerror}", file=file, line=line) from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as reason:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(reason))
        message = re.sub(r" \(at .*\)$", "", str(reason))
        raise RecipeError(
            f"not TOML: {message}", file=path, line=int(found[1]) if found else None, hint="see https://toml.io"
        ) from None


def _lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Where each key and table of a TOML text stands: (("prep", "sources"), 12). Good enough for messages; tomllib
    keeps no lines.
    """
    table: tuple[str, ...] = ()
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        if fence:
            fence = "" if fence in line else fence
            continue
        if header := re.match(r"\s*\[\[?\s*([A-Za-z0-9_.\-\"' ]+?)\s*\]\]?\s*(#.*)?$", line):
            table = tuple(part.strip(" \"'") for part in header[1].split("."))
            yield table, number
        elif pair := re.match(r"\s*([A-Za-z0-9_.\-\"']+)\s*=\s*(.*)$", line):
            yield (*table, *(part.strip("\"'") for part in pair[1].split("."))), number
            fence = next((mark for mark in ('"""', "'''") if pair[2].count(mark) == 1), "")


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


# Keys whose values (of a table: whose keys) are paths, or sources, which may be paths.
PATHS = (
    ("prep", "sources"), ("prep", "tokenizer", "from"), ("model", "from"), ("pretrain", "mixture"),
    ("finetune", "sources"), ("eval", "text"), ("eval", "tasks"), ("eval", "conversations"), ("export", "text"),
)  # fmt: skip


def _rebased(
    table: dict[str, Any], below: Path, above: Path, places: Mapping[tuple[str, ...], tuple[Path, int]]
) -> dict[str, Any]:
    """Paths that came from the base are relative to the base: makes them so when the two lie in different folders."""
    if below.parent.resolve() == above.parent.resolve():
        return table
    between = os.path.relpath(below.parent.resolve(), above.parent.resolve())  # relative: a checkout may move
    return rewrite_paths(
        table, lambda key, path: f"{between}/{path}" if places.get(key, (above, 0))[0] == below else path
    )


def rewrite_paths(table: dict[str, Any], change: Callable[[tuple[str, ...], str], str]) -> dict[str, Any]:
    """A copy of a recipe's table with `change(key, path)` applied to every relative path in it."""
    copy = _copied(table)
    for key in PATHS:
        holder: Any = copy
        for part in key[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        value = holder.get(key[-1]) if isinstance(holder, dict) else None
        if isinstance(value, str) and value:
            holder[key[-1]] = value if _fixed(value) else change(key, value)
        elif isinstance(value, list):
            holder[key[-1]] = [item if _fixed(item) else change(key, item) for item in value]
        elif isinstance(value, dict):
            holder[key[-1]] = {name if _fixed(name) else change(key, name): item for name, item in value.items()}
    return copy


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in table.items()}


def _fixed(path: Any) -> bool:
    """Whether a value means the same from any folder."""
    return not isinstance(path, str) or path.startswith(("builtin:", "hf:", "~")) or Path(path).is_absolute()


def is_builtin(source: str) -> bool:
    """Whether a source is one that every machine has."""
    return source.startswith("builtin:")


def parse_override(argument: str) -> tuple[tuple[str, ...], Any]:
    """`section.key=value` as a key and its value in TOML; a path in it means from the current folder."""
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {argument}: expected section.key=value", hint="for example: --set pretrain.max_steps=100"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, as a shell user expects
    parts = tuple(key.strip().split("."))
    if parts == ("model", "from") and not text:  # a script's variable that is not set would train another model
        raise RecipeError(f"--set {argument}: no path is given", hint=f"if none is meant: --set '{argument}\"\"'")
    return parts, _from_here(value) if parts in PATHS else value


def _from_here(value: Any) -> Any:
    """A shell user names files from where they stand, not from where the recipe lies."""
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    if isinstance(value, dict):
        return {_from_here(name): item for name, item in value.items()}
    return value if _fixed(value) or not value else os.path.abspath(value)  # noqa: PTH100 (it takes ".." away, too)


def _below(root: Path, value: Any) -> Any:
    """A path as the recipe itself would spell it, so that giving it by --set makes no other artifact."""
    if isinstance(value, list):
        return [_below(root, item) for item in value]
    if isinstance(value, dict):
        return {_below(root, name): item for name, item in value.items()}
    inside = isinstance(value, str) and not is_builtin(value) and Path(value).is_relative_to(root)
    return Path(value).relative_to(root).as_posix() if inside else value


def _set(table: dict[str, Any], key: tuple[str, ...], value: Any, argument: str) -> None:
    holder = table
    for part in key[:-1]:
        below = holder.get(part, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {argument}: {part} is not a section")
        holder[part] = dict(below)
        holder = holder[part]
    holder[key[-1]] = value


def _explained(problem: ErrorDetails, path: Path, places: Mapping[tuple[str, ...], tuple[Path, int]]) -> RecipeError:
    """A validation error as a person needs it: the line, the key, what was expected, the nearest known key."""
    where = tuple(str(part) for part in problem["loc"] if not isinstance(part, int))
    while (
        where
        and where not in places
        and (".".join(where[:-1]) or len(where) == 1)
        and len(where) > 1
        and where[-1] not in _keys_of(where[:-1])
    ):
        where = where[:-1]  # pydantic adds the member of a union it tried
    file, line = places.get(where, places.get(where[:-1], (path, 0)))
    override = str(file).startswith("--set ")
    at: dict[str, Any] = {"file": None if override else file, "line": line or None}
    prefix = f"{file}: " if override else ""
    table, key = ".".join(where[:-1]), where[-1] if where else ""
    if problem["type"] == "extra_forbidden":
        return _unknown(prefix, table, key, at)
    if problem["type"] == "missing":
        return RecipeError(
            f"[{table}] has no `{key}`", hint=f"add {key} = ... ; its meaning: llmctl init --keys {table}", **at
        )
    message = re.sub(r"^Value error, ", "", problem["msg"])
    if problem["type"] in ("model_type", "dict_type"):
        message = "expected a section"
    found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
    name = f"[{table}] {key}" if table else f"`{key}`" if key else ""
    text = f"{prefix}{name}: {message[:1].lower()}{message[1:]}{found}" if name else f"{prefix}{message}"
    return RecipeError(
        text, hint=f"llmctl init --keys {table or key} lists what is allowed" if table or key in SECTIONS else "", **at
    )


def _unknown(prefix: str, table: str, key: str, at: dict[str, Any]) -> RecipeError:
    known = _keys_of(tuple(table.split("."))) if table else ("name", "seed", "base", *SECTIONS)
    near = difflib.get_close_matches(key, known, 1, 0.6)
    elsewhere = [name for name in SECTION_TYPES if key in _keys_of(tuple(name.split(".")))]
    hints = [f"Did you mean `{near[0]}`?"] if near else [f"It is a key of [{elsewhere[0]}]."] if elsewhere else []
    hints.append(f"All keys: llmctl init --keys {table}" if table else f"Known here: {', '.join(known)}")
    what = f"unknown key `{key}` in [{table}]" if table else f"unknown section or key `{key}`"
    return RecipeError(prefix + what, hint=" ".join(hints), **at)


def _keys_of(where: tuple[str, ...]) -> tuple[str, ...]:
    section = SECTION_TYPES.get(".".join(where))
    return tuple(field.alias or name for name, field in section.model_fields.items()) if section else ()
