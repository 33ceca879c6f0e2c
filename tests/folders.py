"""A model's folder as one downloads it: a tiny Llama, its tokenizer and template, in the ways that folders come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.text import tokenizer
from llmctl.text.chat import CHATML, ChatTemplate
from tests.shapes import LLAMA

CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\n\n# Tiny\n\nlicense: not-this\n"


def write(folder: Path, config: Config = LLAMA, *, dtype: str = "bf16", seed: int = 0) -> Path:
    """One file of safetensors, a byte tokenizer, a template, a model card and a licence."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = tokenizer.train([], "byte")
    model = hf.random(replace(config, vocab_size=len(pieces)), seed)
    hf.save(model, pieces, folder, dtype)
    ChatTemplate(CHATML).save(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License\n")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its stored name."""
    return {name: tensor for path in hf.tensor_files(folder) for name, tensor in load_file(path).items()}


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path, parts: int = 3) -> None:
    """Stores the weights in several files and an index, as larger models come."""
    state = weights(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + index % parts:05}-of-{parts:05}.safetensors" for index, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def pickle(folder: Path, parts: int = 1) -> None:
    """Stores the weights as older models come: pytorch_model.bin, or shards of it."""
    state = weights(folder)
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-{i}.bin" for i in range(parts)]
    files = {name: names[index % parts] for index, name in enumerate(state)}
    for file in names:
        torch.save({name: state[name] for name in state if files[name] == file}, folder / file)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
