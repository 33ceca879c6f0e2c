"""Where each native tensor lies on disk: under which name, transposed or not, alone or with others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmctl.model.config import Config
from llmctl.model.families import FAMILIES
from llmctl.model.families.family import Family, Name


class Stored(NamedTuple):
    """A tensor on disk: the native tensors it holds, one below the other, and whether it lies transposed."""

    parts: tuple[str, ...]
    transposed: bool
    shape: tuple[int, ...]


def layout(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Every tensor that a model of this config is stored as, by its name on disk.

    Args:
        shapes: of the native tensors, as the model's state_dict has them.
    """
    family = FAMILIES[config.family]
    base = "" if config.task == "embedding" else family.base
    trunk = "" if config.kind == "encoder-decoder" else "model."
    rules = [
        (re.compile(_pattern(trunk + part)), base + name.hf, name, index)
        for name in family.names
        if config.gated or not name.hf.endswith((".wi_0", ".wi_1"))
        if not config.gated or not name.hf.endswith(".DenseReluDense.wi")
        for index, part in enumerate(_parts(name))
    ]
    rules += [
        (re.compile(_pattern(part)), name.hf, name, index)
        for name in family.heads.get(config.task, ())
        for index, part in enumerate(_parts(name))
    ]
    found: dict[str, Stored] = {}
    for native, shape in shapes.items():
        module, _, leaf = native.rpartition(".")
        hf, name, index = _rule(rules, module) or (_plain(module, trunk, base), None, 0)
        key = f"{hf}.{leaf}"
        before = found.get(key, Stored((), False, ()))
        assert index == len(before.parts), f"{native} comes out of order"
        transposed = name is not None and name.transposed and len(shape) == 2
        rows = shape[0] + (before.shape[-1 if transposed else 0] if before.shape else 0)
        whole_shape = (shape[1], rows) if transposed else (rows, *shape[1:])
        found[key] = Stored((*before.parts, native), transposed, whole_shape)
    return found


def _parts(name: Name) -> tuple[str, ...]:
    return (name.native,) if isinstance(name.native, str) else name.native


def _pattern(native: str) -> str:
    return re.escape(native).replace(r"\{\}", r"(\d+)")


def _rule(rules: list[tuple[re.Pattern[str], str, Name, int]], module: str) -> tuple[str, Name, int] | None:
    for pattern, hf, name, index in rules:
        if (match := pattern.fullmatch(module)) is not None:
            return (hf.format(*match.groups()) if match.groups() else hf), name, index
    return None


def _plain(module: str, trunk: str, base: str) -> str:
    """A module that is called on disk what it is called here."""
    return base + module.removeprefix(trunk) if trunk and module.startswith(trunk) else module


def native_spelling(family: Family, name: str, expected: Mapping[str, Any]) -> str:
    """The name that `expected` has for a stored one: files of base models leave the trunk's prefix out or in, and old
    ones call a norm's tensors gamma and beta."""
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    for candidate in (name, family.base + name, name.removeprefix(family.base)):
        if candidate in expected:
            return candidate
    return name
