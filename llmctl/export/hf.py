"""The `hf` variant: the clean Hugging Face folder with a model card, and the files that every export carries along.

The card's front matter: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from llmctl import console
from llmctl.artifact import Artifact
from llmctl.errors import RunError
from llmctl.model import hf
from llmctl.text.tokenizer import Tokenizer

# What a server needs beside the weights.
COMPANIONS = ("config.json", "generation_config.json", *hf.TOKENIZER_FILES)
LICENCES = "LICEN[SC]E*"
# The metrics worth a line in the card, by the names that stages give them.
CARD_METRICS = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss (nats a token)",
    "train_loss": "training loss (nats a token)",
    "tokens": "tokens trained on",
}
LINE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)


def copy_companions(model: Path, folder: Path) -> None:
    """Config, generation config, tokenizer, chat template and licence, as they are."""
    names = [name for name in COMPANIONS if (model / name).is_file()]
    for name in [*names, *(path.name for path in model.glob(LICENCES) if path.is_file())]:
        shutil.copyfile(model / name, folder / name)


def licence(model: Path) -> str:
    """The licence that the front matter of a model card beside the weights names; empty where none does."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = LINE.search(text.split("\n---", 1)[0]) if text.startswith("---\n") else None
    return found[1] if found else ""


def write(model: Artifact, folder: Path, name: str) -> int:
    """Copies the model into `folder`, writes its card, loads it back, and returns the bytes of the weights.

    Raises:
        RunError: what was written is not what was read.
    """
    copy_companions(model.path, folder)
    weights = hf.tensor_files(model.path)
    index = [model.path / "model.safetensors.index.json"] if len(weights) > 1 else []
    for path in [*weights, *index]:
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(card(model, name), encoding="utf-8")
    check(model.path, folder)
    return sum(path.stat().st_size for path in weights)


def check(model: Path, folder: Path) -> None:
    """Loads both folders and holds every tensor and the tokenizer against each other.

    Raises:
        RunError: naming what differs.
    """
    theirs, ours = hf.load(model).state_dict(), hf.load(folder).state_dict()
    differing = next((name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])), None)
    if Tokenizer.load(model).digest() != Tokenizer.load(folder).digest():
        differing = differing or "the tokenizer"
    if differing is not None:
        raise RunError(f"the copy is not the model: {differing} differs", file=folder, hint="check the disk")


def card(model: Artifact, name: str) -> str:
    """README.md: what the model is, what it was made from, how good it is, how to run it."""
    config, chat = hf.read_config(model.path), (model.path / "chat_template.jinja").is_file()
    known = licence(model.path)
    metrics = [
        f"| {title} | {shown(model.metrics[key])} |" for key, title in CARD_METRICS.items() if key in model.metrics
    ]
    tags = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- llmctl"]
    kind = (
        "a chat model: its template is chat_template.jinja"
        if chat
        else "a base model: it completes text and has no chat template"
    )
    lines = [
        "---",
        *([f"license: {known}"] if known else []),
        *tags,
        "---",
        "",
        f"# {name}",
        "",
        f"{console.count(config.parameters)} parameters, {config.family} architecture, {kind}.",
        (
            f"{config.num_hidden_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size:,}, "
            f"context {config.max_position_embeddings:,}."
        ),
        "",
        "## Made from",
        "",
        *lineage(model),
        "",
        *(["## Measured", "", "| metric | value |", "|---|---:|", *metrics, ""] if metrics else []),
        "## Run it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "or `vllm serve path/to/this/folder`, or `llmctl serve path/to/this/folder`.",
    ]
    return "\n".join(lines) + "\n"


def lineage(model: Artifact | None) -> list[str]:
    """A line for each artifact the model came from, the model first; it ends where an input is no longer there."""
    lines = []
    while model is not None:
        sources = ", ".join(f"`{name}`" for name in model.manifest["sources"])
        lines.append(f"- {model.stage} `{model.short}`" + (f" on {sources}" if sources else ""))
        model = model.input("model") or model.input("data")
    return lines


def shown(value: object) -> str:
    """A metric as the card prints it."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
