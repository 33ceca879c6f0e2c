"""`llmctl finetune`: a base model learns to answer, and to stop."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl import console, launch
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, RecipeError
from llmctl.finetune.batches import Example, batches
from llmctl.inference import answers
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf, lora
from llmctl.model.hf import Causal, Model
from llmctl.model.transformer import Decoder
from llmctl.recipe import FinetuneSection
from llmctl.text import chat, sources
from llmctl.text.chat import ChatTemplate
from llmctl.text.conversations import Conversation, conversations, with_system
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import choices as selecting
from llmctl.training import optim, outlook, planning, reporters, session
from llmctl.training.batch import Batch
from llmctl.training.choices import Choices
from llmctl.training.objectives import Learner
from llmctl.training.planning import Plan

PEAK = {"full": 2.5e-4, "lora": 2e-3}  # learning rates at width 256, the first tuned on recipes/small.toml
BATCH = 32  # conversations a step, at most
PROBED = 64  # held-out conversations scored before and after
# On the way fewer, so that it is no more than this share of the run's operations, but not fewer than so many.
PROBED_SHARE, PROBED_LEAST = 0.0075, 8


@dataclass(frozen=True)
class Lesson:
    """What is learned and what it is measured on, as this model reads it."""

    tokenizer: Tokenizer
    template: ChatTemplate
    ends: tuple[int, ...]  # what ends a turn, beside what the model knows
    conversations: int
    examples: list[Example]
    probe: list[Conversation]  # held out; scored before, during and after
    length: int  # tokens of the longest conversation there may be

    def score(self, model: Causal, most: int = PROBED) -> float:
        """Bits a byte of the held-out answers, or of the first of them."""
        return answers.score(TorchRunner.of(model), self.tokenizer, self.template, self.probe[:most]).bits_per_byte


def finetune(job: Job) -> Artifact | None:
    """Trains on the assistant's tokens; rank 0 publishes the model with its chat template."""
    section, start = job.recipe.section("finetune"), job.inputs["model"]
    reporters.require(section.report_to)
    held = outlook.memory_now()
    model = _model(job, start)
    lesson = _lesson(job, section, start, model)
    if section.packing and not isinstance(model, Decoder):
        raise RecipeError(
            "[finetune] packing: an LSTM reads a row as one text",
            hint="leave the key out",
        )
    if section.method == "lora":
        if not isinstance(model, Decoder):
            raise RecipeError(
                '[finetune] method = "lora" changes the projections of attention, and an LSTM has none',
                hint='method = "full" trains all of it',
            )
        if section.strategy == "fsdp" and launch.size() > 1:
            raise RecipeError('[finetune] strategy = "fsdp" with adapters', hint='"ddp": adapters are small')
        lora.apply(model, section.lora_r, section.lora_alpha, section.lora_target_modules, job.recipe.seed)
    plan = planning.make(
        section,
        sequences=len(lesson.examples),
        length=lesson.length,
        width=model.config.hidden_size,
        peak=PEAK[section.method] * optim.GAIN.get(section.optimizer, 1.0) * planning.GAIN.get(model.config.kind, 1.0),
        cap=BATCH,
    )
    learner = Learner(model)
    mean = sum(len(example.ids) for example in lesson.examples) // len(lesson.examples)
    tokens = mean * plan.batch * plan.steps
    choices, compiling = selecting.choose(job, section, learner, plan, tokens)
    _announce(section, plan, choices, lesson.examples)
    before = bits = lesson.score(model) if launch.rank() == 0 else math.nan
    batches = functools.partial(_batches, lesson, plan, job.recipe.seed, section.packing)
    run = session.begin(job, section, learner, plan, choices, compiling, batches, tokens=tokens, length=mean, held=held)
    probed = _probed(plan)
    with run, console.progress("finetune", total=plan.steps, unit="steps", opening=choices.opening) as live:
        for step in run:
            live.update(step.number, run.watch.text(step, plan.steps, f"{bits:.3f} bits/byte"))
            if run.every(step, plan.eval_every):
                scored: dict[str, float] = {}  # a signal may break it off; the step is told of all the same
                with run.measuring() as mine:
                    if mine:
                        bits = lesson.score(model, probed)
                        scored = {"answer_bits_per_byte": bits}
                run.watch.record(step, scored)
            elif step.every(section.log_every) or step.number == plan.steps:
                run.watch.record(step)
            if run.every(step, section.keep_every):  # before it is saved: a resume does not come here again
                run.keep(functools.partial(_keep, job, lesson))
            if run.every(step, plan.save_every):
                run.saver.save(run.state)
    trained, figures = run.finish()
    if trained is None:
        return None
    with compiling.eagerly():
        return _publish(job, _causal(trained), lesson, figures, before)


def _causal(model: Model) -> Causal:
    """What `_model` loaded, with its type again."""
    assert isinstance(model, Causal)
    return model


def _model(job: Job, start: Artifact) -> Causal:
    """The model to go on from; only one that says what comes next can learn to answer."""
    kind = hf.read_config(start.path).kind
    if kind in ("encoder", "encoder-decoder"):
        raise DataError(
            f"chat finetuning teaches a decoder to answer, and this is an {kind}; its own finetuning is not built yet",
            file=start.path,
            hint="leave [finetune] out (llmctl eval and llmctl export --hf take the model as it is), or start from a "
            "decoder",
        )
    return hf.load_causal(start.path, device=job.device.torch)


def _lesson(job: Job, section: FinetuneSection, start: Artifact, model: Causal) -> Lesson:
    tokenizer = Tokenizer.load(start.path)
    template = ChatTemplate.load(start.path) or ChatTemplate(chat.CHATML)
    ends = _ends_of_turn(tokenizer, template, start)
    length = min(section.max_seq_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
    train, held_out = _conversations(job, section)
    examples = _examples(train, tokenizer, template, length, job)
    return Lesson(tokenizer, template, ends, len(train), examples, held_out[:PROBED], length)


def _batches(lesson: Lesson, plan: Plan, seed: int, packing: bool, position: int) -> Iterator[Batch]:
    return batches(
        lesson.examples,
        size=plan.batch,
        seed=seed,
        pad_id=lesson.tokenizer.pad_id or 0,
        length=lesson.length,
        position=position,
        packing=packing,
        ranks=launch.size(),
    )


def _probed(plan: Plan) -> int:
    """Conversations of an evaluation on the way; each costs a third of what training on one does: no gradients."""
    evaluations = plan.steps // plan.eval_every if plan.eval_every else 0
    return max(PROBED_LEAST, int(3 * PROBED_SHARE * plan.batch * plan.steps / max(1, evaluations)))


def _publish(job: Job, model: Causal, lesson: Lesson, figures: Mapping[str, Any], before: float) -> Artifact:
    """Merges the adapter, measures what came out and seals it with the template."""
    with job.publishing() as staging:
        model = _merged(job, model, lesson, staging.path)
        after, longest = lesson.score(model), min(128, lesson.length // 2)
        said = answers.ask(TorchRunner.of(model), lesson.tokenizer, lesson.template, lesson.probe, longest)
        ended = answers.ended(said)
        console.detail(_told(before, after, ended), console.duration(figures["seconds"]))
        _save(job, model, lesson, staging.path)
        session.publish_logs(job.work, staging.path)
        metrics = {
            "answer_bits_per_byte": after,
            "answer_bits_per_byte_before": before,
            "answers_ended": ended,
            "conversations": lesson.conversations,
            "supervised_share": _share(lesson.examples),
            **figures,
        }
        return staging.seal(metrics, logs=session.LOGS)


def _merged(job: Job, model: Causal, lesson: Lesson, folder: Path) -> Causal:
    """The model as it is published, its adapter, which is written, merged in: itself, changed."""
    if job.recipe.section("finetune").method == "lora":
        assert isinstance(model, Decoder)
        lora.save_adapter(model, folder / "adapter")
        model = lora.merge(model)
    eos = tuple(dict.fromkeys((*lesson.ends, *model.config.eos_ids)))
    model.config = dataclasses.replace(model.config, eos_token_id=eos)
    return model


def _save(job: Job, model: Causal, lesson: Lesson, folder: Path) -> None:
    hf.save(model, job.inputs["model"].path, folder)
    lesson.template.save(folder)


def _keep(job: Job, lesson: Lesson, model: Model, folder: Path) -> None:
    """Writes a copy as it would be published now; the model itself goes on learning."""
    _save(job, _merged(job, _causal(copy.deepcopy(model)), lesson, folder), lesson, folder)


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


def _told(before: float, after: float, ended: float) -> str:
    fits = f"answers {before:.2f} -> {after:.2f} bits/byte" if after == after else "no held-out answer fits the context"
    return fits + (f" · {100 * ended:.0f} % end by themselves" if ended == ended else "")


def _share(examples: list[Example]) -> float:
    return sum(sum(example.supervised) for example in examples) / sum(len(example.ids) for example in examples)


def _announce(section: FinetuneSection, plan: Plan, choices: Choices, examples: list[Example]) -> None:
    share = f"{len(examples):,} conversations, {100 * _share(examples):.0f} % of tokens supervised"
    console.stage("finetune", f"{', '.join(section.sources)}    {share}")
    for formula in plan.formulas:
        console.debug(f"{'':12}{formula}")
    optimizer = f"{section.method}, {section.optimizer} {plan.learning_rate:g}"
    console.detail(f"{plan.steps:,} steps of {plan.batch} · {optimizer} · {choices.describe()}")
