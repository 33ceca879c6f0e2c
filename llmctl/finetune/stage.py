"""`llmctl finetune`: a base model learns to answer, and to stop."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, RecipeError
from llmctl.finetune.batches import Example, batches
from llmctl.inference import answers
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf, lora
from llmctl.model.hf import Causal
from llmctl.model.transformer import Decoder
from llmctl.recipe import FinetuneSection
from llmctl.text import chat, sources
from llmctl.text.chat import ChatTemplate
from llmctl.text.conversations import Conversation, conversations, with_system
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import checkpoint, loop, objectives, optim, planning, session
from llmctl.training.batch import Batch
from llmctl.training.checkpoint import State
from llmctl.training.planning import Plan

PEAK = {"full": 2.5e-4, "lora": 2e-3}  # learning rates at width 256, the first tuned on recipes/small.toml
BATCH = 32  # conversations a step, at most
PROBED = 64  # held-out conversations scored before, during and after


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

    def score(self, model: Causal) -> float:
        """Bits a byte of the held-out answers."""
        return answers.score(TorchRunner.of(model), self.tokenizer, self.template, self.probe).bits_per_byte


def finetune(job: Job) -> Artifact:
    """Trains on the assistant's tokens and publishes the model with its chat template."""
    section, start = job.recipe.section("finetune"), job.inputs["model"]
    model = _model(job, start)
    lesson = _lesson(job, section, start, model)
    if section.method == "lora":
        if not isinstance(model, Decoder):
            raise RecipeError(
                '[finetune] method = "lora" changes the projections of attention, and an LSTM has none',
                hint='method = "full" trains all of it',
            )
        lora.apply(model, section.lora_r, section.lora_alpha, section.lora_target_modules, job.recipe.seed)
    plan = planning.make(
        section,
        sequences=len(lesson.examples),
        length=lesson.length,
        width=model.config.hidden_size,
        peak=PEAK[section.method] * planning.GAIN.get(model.config.kind, 1.0),
        cap=BATCH,
    )
    mean = sum(len(example.ids) for example in lesson.examples) / len(lesson.examples)
    flops = 6 * model.config.parameters * mean * plan.batch * plan.steps
    choices, loss = session.choose(job, section, objectives.loss, flops, plan.micro_batch, kind=model.config.kind)
    _announce(section, plan, choices, lesson.examples)

    before = bits = lesson.score(model)
    optimizers = optim.build(model, section.optimizer, plan.learning_rate, section.weight_decay)
    state = session.resume(job, job.recipe.seed, model, optimizers, plan.steps)
    stop = session.Stop(job)
    steps = loop.train(
        model,
        optimizers,
        _batches(lesson, plan, job.recipe.seed, state.position),
        loss,
        steps=range(state.step, plan.steps),
        rate=plan.rate,
        micro_batch=choices.micro_batch,
        max_grad_norm=section.max_grad_norm,
        autocast=choices.autocast,
        stop=stop,
    )
    with stop, console.progress("finetune", total=plan.steps, unit="steps", opening=choices.opening) as live:
        for step in steps:
            session.follow(state, step)
            live.update(step.number, loop.live_text(step, plan.steps, f"{bits:.3f} bits/byte"))
            last = step.number == plan.steps
            if step.every(plan.eval_every) and not last:
                with stop.breaks_off():
                    bits = lesson.score(model)
                    session.record(job.work, step, {"answer_bits_per_byte": bits})
            elif step.every(section.log_every) or last:
                session.record(job.work, step)
            if step.every(plan.save_every) and not last:
                checkpoint.save(job.work, state, model, optimizers)
        checkpoint.save(job.work, state, model, optimizers)
    stop.raise_if_early(state, plan.steps)
    return _publish(job, model, lesson, state, before)


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


def _batches(lesson: Lesson, plan: Plan, seed: int, position: int) -> Iterator[Batch]:
    pad_id = lesson.tokenizer.pad_id or 0
    return batches(lesson.examples, size=plan.batch, seed=seed, pad_id=pad_id, length=lesson.length, position=position)


def _publish(job: Job, model: Causal, lesson: Lesson, state: State, before: float) -> Artifact:
    """Merges the adapter, measures what came out and seals it with the template."""
    with job.publishing() as staging:
        if job.recipe.section("finetune").method == "lora":
            assert isinstance(model, Decoder)
            lora.save_adapter(model, staging.path / "adapter")
            model = lora.merge(model)
        eos = tuple(dict.fromkeys((*lesson.ends, *model.config.eos_ids)))
        model.config = dataclasses.replace(model.config, eos_token_id=eos)
        after, longest = lesson.score(model), min(128, lesson.length // 2)
        said = answers.ask(TorchRunner.of(model), lesson.tokenizer, lesson.template, lesson.probe, longest)
        ended = answers.ended(said)
        console.detail(_told(before, after, ended), console.duration(state.seconds))
        hf.save(model, job.inputs["model"].path, staging.path)
        lesson.template.save(staging.path)
        session.publish_logs(job.work, staging.path)
        metrics = {
            "train_loss": state.train_loss,
            "answer_bits_per_byte": after,
            "answer_bits_per_byte_before": before,
            "answers_ended": ended,
            "conversations": lesson.conversations,
            "supervised_share": _share(lesson.examples),
            **session.figures(state),
        }
        return staging.seal(metrics, logs=session.LOGS)


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


def _announce(section: FinetuneSection, plan: Plan, choices: session.Choices, examples: list[Example]) -> None:
    share = f"{len(examples):,} conversations, {100 * _share(examples):.0f} % of tokens supervised"
    console.stage("finetune", f"{', '.join(section.sources)}    {share}")
    for formula in plan.formulas:
        console.debug(f"{'':12}{formula}")
    optimizer = f"{section.method}, {section.optimizer} {plan.learning_rate:g}"
    console.detail(f"{plan.steps:,} steps of {plan.batch} · {optimizer} · {choices.describe()}")
