"""The model whose next-token probabilities are learned beside the labels; the loss is `training.distillation`'s."""

from __future__ import annotations

from pathlib import Path

from llmctl.artifact import MANIFEST, Artifact, Job
from llmctl.errors import DataError, RecipeError
from llmctl.finetune.lesson import Lesson
from llmctl.model import hf, origin
from llmctl.model.hf import Causal
from llmctl.model.lstm import LSTM
from llmctl.recipe import FinetuneSection
from llmctl.text.tokenizer import Tokenizer


def load(job: Job, section: FinetuneSection, lesson: Lesson) -> Causal | None:
    """The teacher, if the recipe has one.

    Raises:
        DataError: no causal language model there, damage, another vocabulary, too short a context.
        RecipeError: packing, which an LSTM can't read.
    """
    name = section.taught_by
    if not name:
        return None
    folder = job.inputs["model"].path if name == "base" else outside(job, name)
    if name != "base" and not _same_pieces(Tokenizer.load(folder), lesson.tokenizer):
        raise DataError(
            "the teacher's tokenizer is not the student's, so their probabilities are of different tokens",
            file=folder,
            hint='a teacher of the same family, or teacher = "base"',
        )
    found = hf.load_causal(folder, device=job.device.torch)
    if found.config.max_position_embeddings < lesson.length:
        raise DataError(
            f"the teacher reads {found.config.max_position_embeddings:,} tokens, and is to read {lesson.length:,}",
            file=folder,
            hint=f"[finetune] max_seq_length = {found.config.max_position_embeddings}",
        )
    if section.packing and isinstance(found, LSTM):
        raise RecipeError("[finetune] packing: the teacher is an LSTM, which reads a row as one text")
    return found


def outside(job: Job, name: str) -> Path:
    """The folder of a teacher that is not the base."""
    found = origin.find(name, job.recipe.root)
    if (found.path / MANIFEST).is_file():
        Artifact.open(found.path).verify()  # a flipped bit must not teach
    return found.path


def told(job: Job, section: FinetuneSection) -> dict[str, dict[str, str]]:
    """What the manifest says of the teacher beside its digest: which artifact it is, and its licence."""
    name = section.taught_by
    if name in ("", "base") or not ((folder := outside(job, name)) / MANIFEST).is_file():
        return {}
    artifact = Artifact.open(folder)
    known = {"role": "teacher", "identity": artifact.identity, "licence": artifact.licence()}
    return {name: {key: value for key, value in known.items() if value}}


def _same_pieces(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id is the same piece of text in both; what ends a text may differ, as a chat model's does."""
    if one.digest() == other.digest():
        return True
    alike = len(one) == len(other) and one.specials == other.specials
    return alike and all(one.token_bytes(i) == other.token_bytes(i) for i in range(len(one)))
