"""The `hf` variant: the clean Hugging Face folder with a model card, and the files that every export carries along.

The card's front matter: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llmctl import console
from llmctl.artifact import Artifact
from llmctl.errors import RunError
from llmctl.model import hf, origin
from llmctl.model.config import Task
from llmctl.text.tokenizer import Tokenizer

# The metrics worth a line in the card, by the names that stages give them.
CARD_METRICS = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss (nats a token)",
    "val_accuracy": "hidden tokens of the validation text said right",
    "train_loss": "training loss (nats a token)",
    "tokens": "tokens trained on",
}
# What each task is in transformers: the class, the hub's name of the pipeline, and what such a model does.
TASKS: dict[Task, tuple[str, str, str]] = {
    "causal-lm": (
        "AutoModelForCausalLM",
        "text-generation",
        "a base model: it completes text and has no chat template",
    ),
    "masked-lm": ("AutoModelForMaskedLM", "fill-mask", "an encoder: it fills in masked tokens"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "text2text-generation", "an encoder-decoder: a text in, another out"),
    "sequence-classification": ("AutoModelForSequenceClassification", "text-classification", "a classifier of texts"),
    "token-classification": ("AutoModelForTokenClassification", "token-classification", "a classifier of tokens"),
    "question-answering": ("AutoModelForQuestionAnswering", "question-answering", "a finder of answers in a text"),
    "embedding": ("AutoModel", "feature-extraction", "an encoder: a text in, a vector out"),
}


def copy_companions(model: Path, folder: Path) -> None:
    """All that a server needs beside the weights: configs, tokenizer, chat template and licence, as they are."""
    for path in origin.files(model):
        target = folder / path.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


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
    known = model.licence()
    metrics = [
        f"| {title} | {shown(model.metrics[key])} |" for key, title in CARD_METRICS.items() if key in model.metrics
    ]
    auto, pipeline, kind = TASKS[config.task]
    tags = ["library_name: transformers", f"pipeline_tag: {pipeline}", "tags:", "- llmctl"]
    if chat:
        kind = "a chat model: its template is chat_template.jinja"
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
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
    ]
    if config.task == "causal-lm":
        lines += ["", "or `vllm serve path/to/this/folder`, or `llmctl serve path/to/this/folder`."]
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
