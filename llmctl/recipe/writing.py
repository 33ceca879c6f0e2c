"""What is written of recipes: the reference and schema that follow from the code, and the resolved recipe of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from llmctl.errors import RecipeError
from llmctl.recipe.reading import parse_override
from llmctl.recipe.schema import SECTION_TYPES, Recipe
from llmctl.recipe.section import Section, is_operational, plain


def reference(section: str) -> list[tuple[str, str, str, str]]:
    """The keys of a section for people: (key, kind, default, meaning)."""
    if section not in SECTION_TYPES:
        raise RecipeError(f"no section [{section}]", hint=f"the sections: {', '.join(SECTION_TYPES)}")
    rows = []
    for name, field in SECTION_TYPES[section].model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue
        default = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        shown = "required" if default is PydanticUndefined else "derived" if default is None else _toml(plain(default))
        meaning = (field.description or "") + (" (operational)" if is_operational(field) else "")
        rows.append((field.alias or name, _kind(field.annotation), shown, meaning))
    return rows


def _kind(annotation: Any) -> str:
    """A type as the reference shows it."""
    text = str(annotation)
    choices = [
        f'"{arg}"' for part in (annotation, *get_args(annotation)) for arg in get_args(part) if isinstance(arg, str)
    ]
    names = [
        name
        for name, mark in (("true/false", "bool"), ("integer", "int"), ("number", "float"))
        if re.search(rf"\b{mark}\b", text)
    ]
    if "tuple" in text or "dict" in text:
        return "list" if "tuple" in text else "table"
    return " | ".join([*dict.fromkeys(choices), *names]) or "text"


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors."""
    made = Recipe.model_json_schema(by_alias=True)
    for hidden in ("file", "root", "origin"):
        made["properties"].pop(hidden, None)
    made["properties"]["base"] = {
        "type": "string",
        "description": "Another recipe, read first; this one's values win (one level).",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "llmctl recipe"}


def resolved(recipe: Recipe, overrides: Sequence[str]) -> str:
    """The whole recipe as TOML with its defaults filled in, as it is kept in the run."""
    table = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    kept: dict[tuple[str, ...], Any] = {}  # the last of each key, its paths as they were meant when it was given
    for key, value in map(parse_override, overrides):
        kept.pop(key, None)
        if key[0] != "serve":  # nothing there makes an artifact, and a key is a secret
            kept[key] = value
    spelled = [f"{'.'.join(key)}={_toml(value)}" for key, value in kept.items()]
    table["origin"] = {"recipe": str(recipe.file.absolute()), "root": str(recipe.root), "overrides": spelled}
    table.get("serve", {}).pop("api_key", None)
    return "# Written by llmctl: the recipe as it was resolved. Edit the recipe, not this file.\n" + _tables(table)


def _tables(table: Mapping[str, Any], prefix: str = "") -> str:
    plain = "".join(
        f"{_toml_key(key)} = {_toml(value)}\n" for key, value in table.items() if not isinstance(value, dict)
    )
    nested = "".join(
        f"\n[{prefix}{_toml_key(key)}]\n{_tables(value, f'{prefix}{_toml_key(key)}.')}"
        for key, value in table.items()
        if isinstance(value, dict)
    )
    return plain + nested


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
