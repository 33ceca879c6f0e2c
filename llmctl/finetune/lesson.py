"""What is learned and what it is measured on: conversations, and plain text, as this model reads them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError
from llmctl.finetune.batches import Example
from llmctl.inference import answers, scoring
from llmctl.inference.runners import TorchRunner
from llmctl.model.hf import Causal
from llmctl.recipe import FinetuneSection
from llmctl.text import chat, sources
from llmctl.text.chat import ChatTemplate
from llmctl.text.conversations import Conversation, conversations, with_system
from llmctl.text.sources import Tally
from llmctl.text.tokenizer import Tokenizer
from llmctl.training.batch import Ids

PROBED = 64  # held-out conversations, and windows of held-out text, scored before and after
FEW = 100  # of fewer documents the tail is held out, as prep does: a hash may pick none
TAIL = 0.1
WINDOW = 512  # tokens of a window, for how much text is scored


@dataclass(frozen=True)
class Lesson:
    """What is learned and what it is measured on, as this model reads it."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None where there is text alone, for a model that has none
    ends: tuple[int, ...]  # what ends a turn, beside what the model knows
    conversations: int
    examples: list[Example]
    windows: int  # of them: of plain text
    probe: list[Conversation]  # held out; scored before, during and after
    text: Ids  # held out too
    length: int  # tokens of the longest conversation there may be

    def score(self, model: Causal, most: int = PROBED) -> dict[str, float]:
        """How well it says the held-out answers, or the first of them, and the held-out text, under metrics' names."""
        found: dict[str, float] = {}
        if self.template is not None and self.probe:
            scored = answers.score(TorchRunner.of(model), self.tokenizer, self.template, self.probe[:most])
            found["answer_bits_per_byte"] = scored.bits_per_byte
        if len(text := self.text[: most * min(self.length, WINDOW) + 1]) > 1:
            size = len(self.tokenizer.decode(text.tolist()).encode())
            read = scoring.score(model, text, max_seq_length=self.length, bytes_=size)
            found |= {"val_bits_per_byte": read.bits_per_byte, "val_perplexity": read.perplexity}
        return found


def prepare(job: Job, section: FinetuneSection, start: Artifact, model: Causal) -> Lesson:
    """Reads the sources.

    Raises:
        DataError: nothing to learn from; a vocabulary that can't end a turn.
    """
    tokenizer, context = Tokenizer.load(start.path), model.config.max_position_embeddings
    template, ends = ChatTemplate.load(start.path), tuple[int, ...]()
    length = min(section.max_seq_length or context, context)
    train, held_out, examples = list[Conversation](), list[Conversation](), list[Example]()
    windows, text = list[Example](), np.zeros(0, np.int64)
    if section.sources:
        template = template or ChatTemplate(chat.CHATML)
        ends = _ends_of_turn(tokenizer, template, start)
        train, held_out = _conversations(job, section)
        examples = _examples(train, tokenizer, template, length, job)
    if section.text:
        windows, text = _text(job, section, tokenizer, length)
    return Lesson(
        tokenizer,
        template,
        ends,
        len(train),
        [*examples, *windows],
        len(windows),
        held_out[:PROBED],
        text,
        length,
    )


def quality(found: Mapping[str, float]) -> float:
    """The one figure of a score that a line has room for: bits a byte of the answers, else of the text."""
    return found.get("answer_bits_per_byte", found.get("val_bits_per_byte", float("nan")))


def _text(job: Job, section: FinetuneSection, tokenizer: Tokenizer, length: int) -> tuple[list[Example], Ids]:
    """Windows of `length` + 1 ids, each of which begins with the last of the one before; and the held-out text.

    A document is what token shards make of it: what begins a text, its ids, what ends one.
    """
    found = [
        document
        for spec in section.text
        for document in sources.documents(spec, job.recipe.root, on_error=section.on_error, tally=Tally())
    ]
    encoded = tokenizer.encode_batch([_plain(document.text) for document in found], job.device.threads)
    train, held_out = array("i"), array("i")
    for document, ids in zip(found, encoded, strict=True):
        apart = len(found) >= FEW and sources.is_held_out(document, section.val_percent)
        around = ([index] if index is not None else [] for index in (tokenizer.begin_id, tokenizer.end_id))
        begin, end = around
        (held_out if apart else train).extend((*begin, *ids, *end))
    if not held_out:
        cut = int((1 - TAIL) * len(train))
        train, held_out = train[:cut], train[cut:]
    if len(train) < 2:
        raise DataError("nothing to learn from: too short a text", file=section.text[0], hint="add more text")
    whole = (True,) * (length + 1)
    windows = (train[at : at + length + 1] for at in range(0, len(train) - 1, length))
    return [Example(ids, whole[: len(ids)]) for ids in windows], np.asarray(held_out, np.int64)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def _conversations(job: Job, section: FinetuneSection) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; the hash that splits prep's documents splits these."""
    every = [
        with_system(conversation, section.system)
        for source in section.sources
        for conversation in conversations(source, job.recipe.root, on_error=section.on_error)
    ]
    held_out = [found for found in every if sources.is_held_out(found, section.val_percent)]
    train = [found for found in every if not sources.is_held_out(found, section.val_percent)]
    if len(every) < 2 or not train:
        raise DataError(
            f"{len(every)} conversations are too few to train and to validate",
            file=section.sources[0],
            hint="add more of them",
        )
    if not held_out:  # a handful of conversations: the hash may pick none
        train, held_out = train[:-1], train[-1:]
    chooser = random.Random(job.recipe.seed)
    chooser.shuffle(held_out)
    if section.max_examples is not None and len(train) > section.max_examples:
        train = [train[i] for i in sorted(chooser.sample(range(len(train)), section.max_examples))]
    return train, held_out


def _ends_of_turn(tokenizer: Tokenizer, template: ChatTemplate, start: Artifact) -> tuple[int, ...]:
    """The token that ends a turn of our own template; a model that brought its template knows its own."""
    if template.source != chat.CHATML:
        return ()
    if "<|im_end|>" not in tokenizer.specials:
        raise DataError(
            "this vocabulary has no <|im_end|>, which the ChatML template ends a turn with",
            file=start.path / "tokenizer.json",
            hint="put a chat_template.jinja of the model's own into its folder",
        )
    return (tokenizer.special("<|im_end|>"),)


def _examples(
    train: list[Conversation], tokenizer: Tokenizer, template: ChatTemplate, length: int, job: Job
) -> list[Example]:
    """The conversations as ids. Too long ones are counted and left out; nothing to learn from is an error."""
    found, long = [], 0
    for conversation in train:
        ids, mask = chat.supervised(template, tokenizer, conversation.messages)
        if len(ids) > length + 1:
            long += 1
        elif any(mask):
            found.append(Example(tuple(ids), tuple(mask)))
    if not found:
        why = f"all {long} are longer than {length} tokens" if long else "no assistant turn has any token"
        raise DataError(
            f"nothing to learn from: zero supervised tokens in {len(train)} conversations ({why})",
            file=job.recipe.section("finetune").sources[0],
            hint="raise [model] max_seq_length, or shorten the conversations"
            if long
            else "each conversation needs an assistant's answer",
        )
    if long:
        console.note(f"{long:,} of {len(train):,} conversations are longer than {length} tokens and are left out")
    return found


def share(examples: Sequence[Example]) -> float:
    """The share of their tokens that is learned."""
    return sum(sum(example.supervised) for example in examples) / sum(len(example.ids) for example in examples)
