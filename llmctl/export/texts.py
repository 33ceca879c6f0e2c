"""The text that the gate reads, and the text that quantising is calibrated on: never the same."""

from __future__ import annotations

import numpy as np

from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError
from llmctl.export import parity
from llmctl.text import sources
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer

BUILTIN = "builtin:python-stdlib"  # where there is no other
ENOUGH = parity.TEXT + 1  # tokens that the gate reads


def gate_text(job: Job, model: Artifact, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Ids of the text that the gate reads, and its name.

    `[export] text`, else the validation split of the tokens the model was trained on, else the built-in text.
    """
    asked = job.recipe.section("export").text
    if asked:
        return tokens_of(tokenizer, asked, job), asked
    data = training_data(model)
    if data is not None:
        shards = Shards.open(data.path, "val")
        if len(shards) > 1:
            return shards[:ENOUGH], f"the validation split of prep {data.short}"
    return tokens_of(tokenizer, BUILTIN, job), BUILTIN


def calibration_text(
    job: Job, model: Artifact, tokenizer: Tokenizer, windows: int, length: int
) -> tuple[np.ndarray, str]:
    """(windows, length) ids of text that the gate does not read, and its name; fewer windows where it is short.

    Of the training split of the tokens the model was trained on, windows drawn from the seed; without it what follows
    the gate's text in its source, or, where nothing does, the built-in text.
    """
    data, asked = training_data(model), job.recipe.section("export").text
    if data is not None and len(shards := Shards.open(data.path, "train")) >= 2 * length:
        drawn = np.random.default_rng(job.settings.seed).permutation(len(shards) // length)[:windows]
        found = np.stack([shards[int(number) * length : (int(number) + 1) * length] for number in drawn])
        return found, f"the training split of prep {data.short}"
    source, read = asked or BUILTIN, ENOUGH
    ids = tokens_of(tokenizer, source, job, read + windows * length)[read:]
    if len(ids) < length and asked:
        source, ids = BUILTIN, tokens_of(tokenizer, BUILTIN, job, windows * length)
    if len(ids) < length:
        raise DataError("too little text to calibrate on", file=source, hint="name more as [export] text")
    return ids[: len(ids) // length * length].reshape(-1, length), source


def training_data(model: Artifact | None) -> Artifact | None:
    """The tokens that the model, or the one it was finetuned from, was trained on, if they are still there."""
    while model is not None:
        data = model.input("data")
        if data is not None and data.kind == "tokens":
            return data
        model = model.input("model")
    return None


def tokens_of(tokenizer: Tokenizer, source: str, job: Job, count: int = ENOUGH) -> np.ndarray:
    """The first `count` tokens of a source, each document between <s> and </s> as in the shards."""
    ids: list[int] = []
    bos, eos = ([id] if id is not None else [] for id in (tokenizer.begin_id, tokenizer.end_id))
    for document in sources.documents(source, job.recipe.root, tally=sources.Tally()):
        ids += [*bos, *tokenizer.encode(document.text[: 16 * ENOUGH]), *eos]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise DataError("too little text for the perplexity check", file=source, hint="name more as [export] text")
    return np.array(ids[:count], np.int64)
