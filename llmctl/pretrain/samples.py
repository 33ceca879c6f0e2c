"""What a model in training says, for samples.jsonl: continued texts, filled masks, rebuilt spans."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from llmctl.inference import generate
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model.hf import Model
from llmctl.model.transformer import Encoder
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import validation
from llmctl.training.batch import IGNORED
from llmctl.training.objectives import Objective

LENGTH = 64  # tokens that a sample has at most
SAMPLING = Sampling(temperature=0.8, top_k=50, max_tokens=LENGTH)
GREEDY = Sampling(temperature=0.0, max_tokens=LENGTH)
BEGINNING, EXCERPT = 24, 48  # tokens of a validation document: to go on from, to hide some of


def prompts_of(val: Shards, tokenizer: Tokenizer, objective: Objective, longest: int, count: int = 3) -> list[str]:
    """The first words of some validation documents, which the model has not seen; at most half of its context."""
    length = min(BEGINNING if objective.is_causal else EXCERPT, longest // 2)
    texts = (tokenizer.decode(ids[:length].tolist()).strip() for ids in val.documents_ids())
    return list(itertools.islice(filter(None, texts), count))


def say(
    model: Model, objective: Objective, tokenizer: Tokenizer, prompts: Sequence[str], seed: int
) -> Iterator[tuple[str, str]]:
    """Each prompt as the model read it, and what it said."""
    for index, prompt in enumerate(prompts):
        if objective.is_causal:
            sampling = dataclasses.replace(SAMPLING, seed=seed + index)
            yield prompt, generate.complete(_runner(model), tokenizer, tokenizer.prompt(prompt), sampling).text
        else:
            ids = hidden(prompt, objective, tokenizer, index)[: model.config.longest]
            if isinstance(model, Encoder):
                said = filled(model, ids, objective.marks)
            else:  # each sentinel and the span that the model takes to stand there
                said = generate.complete(_runner(model), tokenizer, ids, GREEDY).ids
            yield spelled(ids, tokenizer, objective.marks), spelled(said, tokenizer, objective.marks)


def _runner(model: Model) -> TorchRunner:
    assert not isinstance(model, Encoder)
    return TorchRunner.of(model)


def hidden(prompt: str, objective: Objective, tokenizer: Tokenizer, index: int) -> list[int]:
    """The ids of a prompt with something to fill in: where it says so (`<mask>`, `<extra_id_0>`), else anywhere."""
    ids_of = {name: id for id, name in objective.marks.items()}
    parts = re.split(f"({'|'.join(map(re.escape, ids_of))})", prompt)
    ids = tokenizer.prompt("")
    for part in parts:
        ids += [ids_of[part]] if part in ids_of else tokenizer.encode(part)
    if len(parts) > 1 or len(ids) < 2:
        return ids
    batch = objective.frame(np.array([[*ids, 0]]), validation.SEED, index + 1)
    read, labels = batch.inputs[0][0], batch.labels[0]
    if len(objective.marks) == 1:  # an encoder: a person wants to see each hidden token as a mask, none swapped
        read = np.where(labels != IGNORED, next(iter(objective.marks)), read)
    found: list[int] = read.tolist()
    return found


def filled(model: Encoder, ids: Sequence[int], marks: Collection[int]) -> list[int]:
    """The ids with each mask replaced by what the encoder finds most likely there."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        best = model(torch.tensor([ids], device=model.device)).argmax(-1)[0].tolist()
    model.train(was_training)
    return [guess if id in marks else id for id, guess in zip(ids, best, strict=True)]


def spelled(ids: Sequence[int], tokenizer: Tokenizer, marks: Mapping[int, str]) -> str:
    """The text of ids, with the marks as they are written."""
    runs = itertools.groupby(ids, key=marks.get)
    return "".join(tokenizer.decode(run) if mark is None else mark * len(list(run)) for mark, run in runs)
