"""The files beside an embedding model by which sentence-transformers knows how a sentence becomes one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl.errors import DataError
from llmctl.model.config import Config
from llmctl.model.jsonfile import read_json, write_json

POOLING = "1_Pooling/config.json"
MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def read(folder: Path) -> Any:
    """How a sentence becomes one vector: "cls", "mean" or "last".

    Raises:
        DataError: another way, or several at once.
    """
    path = folder / POOLING
    stated = read_json(path)
    chosen = [name for key, name in MODES.items() if stated.get(key)]
    others = [
        key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True and key not in MODES
    ]
    if len(chosen) != 1 or others:
        raise DataError(
            f"asks for {', '.join(chosen + others) or 'no pooling'}; llmctl builds one of cls, mean, last", file=path
        )
    return chosen[0]


def write(folder: Path, config: Config) -> None:
    """The files by which sentence-transformers loads the folder: transformer, pooling, normalisation."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path, _ in kinds:
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    pooling = {"word_embedding_dimension": config.hidden_size}
    write_json(folder / POOLING, pooling | {key: name == config.pooling for key, name in MODES.items()})
