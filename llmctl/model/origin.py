"""What a model is brought in from, and which of its files count: a folder, a GGUF file, a hub's repository.

Standard library only: `llmctl status` asks this module whether a source has changed. It opens no connection: a hub's
repository is named with its commit, which is its digest.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmctl.errors import DataError
from llmctl.text import sources
from llmctl.text.sources import SourceFile

HUB = "hf:"
REPOSITORY = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]{0,95}(?:/[\w.-]{1,96})?", re.ASCII)
REVISION = re.compile(r"(?!.*(?:\.\.|//))[\w.][\w./-]{0,199}", re.ASCII)
SPLIT = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf")  # a GGUF file in parts
COMMIT = re.compile(r"[0-9a-f]{40}")

# The files of a folder that make a model what it is, beside its weights.
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
SENTENCE_TRANSFORMERS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
)
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*")
SMALL = (*CONFIGS, *TOKENIZER, *SENTENCE_TRANSFORMERS, *LEGAL)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PLACES = ("finetune", "pretrain", "import")  # of a run: the last model first


@dataclass(frozen=True)
class Origin:
    """What a spec names. `path` is the model's folder or file; of a repository nothing lies here yet."""

    spec: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path = Path()
    repository: str = ""  # "org/name"
    revision: str = ""  # a commit, a branch or a tag


def find(spec: str, root: Path) -> Origin:
    """What `spec` names: `hf:org/name@revision`, or a path relative to `root`.

    Raises:
        DataError: nothing there, a name that is no repository's, a file that is no GGUF file.
    """
    if spec.startswith(HUB):
        repository, _, revision = spec.removeprefix(HUB).partition("@")
        if not REPOSITORY.fullmatch(repository) or not REVISION.fullmatch(revision or "main"):
            raise DataError(f"{spec!r} names no repository", hint=f"{HUB}org/name, or {HUB}org/name@revision")
        return Origin(spec, "hub", repository=repository, revision=revision or "main")
    try:
        path = root / Path(spec).expanduser()
        if path.is_dir():
            return Origin(spec, "folder", _model_folder(path))
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise DataError("is neither a model's folder nor a .gguf file", file=spec)
            if not path.stat().st_size:
                raise DataError("the file is empty", file=spec, hint="copy it again")
            return Origin(spec, "gguf", path)
    except ValueError:  # a NUL in the name
        spec = repr(spec)
    hint = f"from a hub: llmctl import {HUB}{spec}" if REPOSITORY.fullmatch(spec) and "/" in spec else ""
    raise DataError("no such folder or file", file=spec, hint=hint or "name a model's folder or a .gguf file")


def _model_folder(path: Path) -> Path:
    """The folder of the model itself: of a run, that of its last model."""
    if (path / "config.json").exists():
        return path
    found = next((path / place for place in PLACES if (path / place / "artifact.json").exists()), None)
    if found is None:
        raise DataError("holds no config.json, so it is no model's folder", file=path)
    return found


def files(folder: Path) -> list[Path]:
    """The small files of a model's folder, in order; empty ones say nothing.

    Raises:
        DataError: one is a link that leads out of the folder (into a hub's cache, it may).
    """
    found = {path for pattern in SMALL for path in folder.glob(pattern) if path.is_file() and path.stat().st_size}
    return [inside(folder, path) for path in sorted(found)]


def weights(folder: Path) -> list[Path]:
    """The files that may hold weights, as a digest of the model needs them: safetensors before pickles."""
    for single, many in ((WEIGHTS, "*.safetensors*"), (PICKLED, "pytorch_model*.bin*")):
        found = [folder / single] if (folder / single).is_file() else sorted(folder.glob(many))
        if found := [path for path in found if path.is_file() and path.stat().st_size]:
            return [inside(folder, path) for path in found]
    return []


def has_safetensors(folder: Path) -> bool:
    """Whether there are weights that need no unpickling."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def inside(folder: Path, path: Path) -> Path:
    """`path`, if what it leads to lies in the folder, or in the blobs of the cache that the folder is a snapshot of."""
    home = folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise DataError(
            f"is a link out of its folder, to {path.resolve()}",
            file=path,
            hint=f"cp -rL '{folder}' makes files of links",
        )
    return path


def scan(spec: str, root: Path, known: Mapping[str, SourceFile]) -> list[SourceFile]:
    """The digests of what `spec` names; a file that is in `known` as it is now is not read again.

    Raises:
        DataError: as `find`; a repository without its commit.
    """
    found = find(spec, root)
    if found.kind == "hub":
        if not COMMIT.fullmatch(found.revision):
            hint = f"llmctl import {spec} finds it; or write {HUB}{found.repository}@COMMIT"
            raise DataError(f"{spec} names no commit, so nobody can tell whether it has changed", hint=hint)
        return [SourceFile(spec, 0, 0, 0, found.revision)]
    if found.kind == "gguf":
        split = SPLIT.fullmatch(found.path.name)
        parts = (
            sorted(found.path.parent.glob(f"{glob.escape(split[1])}-*-of-{split[2]}.gguf")) if split else [found.path]
        )
        return [file for path in parts for file in sources.scan(str(Path(spec).with_name(path.name)), root, known)]
    shown = Path(spec) / found.path.relative_to(root / Path(spec).expanduser())
    paths = sorted([*weights(found.path), *files(found.path)])
    return [
        file for path in paths for file in sources.scan(str(shown / path.relative_to(found.path)), root, known)
    ]  # fmt: skip
