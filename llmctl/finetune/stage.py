"""`llmctl finetune`: a base model learns to answer, and to stop."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmctl import console, launch
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError, RecipeError
from llmctl.finetune import comparing, prune, teacher
from llmctl.finetune import lesson as lessons
from llmctl.finetune.batches import batches
from llmctl.finetune.comparing import Row
from llmctl.finetune.lesson import Lesson, quality
from llmctl.inference import answers
from llmctl.inference.runners import TorchRunner
from llmctl.model import hf, lora
from llmctl.model.hf import Causal, Model
from llmctl.model.transformer import Decoder
from llmctl.recipe import FinetuneSection
from llmctl.training import choices as selecting
from llmctl.training import optim, outlook, planning, reporters, session
from llmctl.training.batch import Batch
from llmctl.training.choices import Choices
from llmctl.training.distillation import Distiller
from llmctl.training.objectives import Learner
from llmctl.training.planning import Plan

PEAK = {"full": 2.5e-4, "lora": 2e-3}  # learning rates at width 256, the first tuned on recipes/small.toml
BATCH = 32  # conversations a step, at most
# On the way fewer, so that it is no more than this share of the run's operations, but not fewer than so many.
PROBED_SHARE, PROBED_LEAST = 0.0075, 8


def finetune(job: Job) -> Artifact | None:
    """Trains on the assistant's tokens; rank 0 publishes the model with its chat template."""
    section, start = job.recipe.section("finetune"), job.inputs["model"]
    reporters.require(section.report_to)
    held = outlook.memory_now()
    model = _model(job, start)
    lesson = lessons.prepare(job, section, start, model)
    _check(section, model)
    rows, told = list[Row](), ""
    if section.prune:
        model, rows, told = prune.begin(job, section, model, lesson)
    if section.method == "lora":
        assert isinstance(model, Decoder)
        lora.apply(model, section.lora_r, section.lora_alpha, section.lora_target_modules, job.recipe.seed)
    plan = planning.make(
        section,
        sequences=len(lesson.examples),
        length=lesson.length,
        width=model.config.hidden_size,
        peak=PEAK[section.method] * optim.GAIN.get(section.optimizer, 1.0) * planning.GAIN.get(model.config.kind, 1.0),
        cap=BATCH,
    )
    taught_by = teacher.load(job, section, lesson)
    learner = Distiller(model, taught_by, section.distill_weight, section.temperature) if taught_by else Learner(model)
    mean = sum(len(example.ids) for example in lesson.examples) // len(lesson.examples)
    tokens = mean * plan.batch * plan.steps
    choices, compiling = selecting.choose(job, section, learner, plan, tokens)
    _announce(section, plan, choices, lesson, told)
    scored: Mapping[str, float] = (rows[-1] if rows else lesson.score(model)) if launch.rank() == 0 else {}
    before, bits = rows[0] if rows else scored, quality(scored)
    batches = functools.partial(_batches, lesson, plan, job.recipe.seed, section.packing)
    run = session.begin(job, section, learner, plan, choices, compiling, batches, tokens=tokens, length=mean, held=held)
    probed = _probed(plan)
    with run, console.progress("finetune", total=plan.steps, unit="steps", opening=choices.opening) as live:
        for step in run:
            live.update(step.number, run.watch.text(step, plan.steps, f"{bits:.3f} bits/byte"))
            if run.every(step, plan.eval_every):
                scored = {}  # a signal may break it off; the step is told of all the same
                with run.measuring() as mine:
                    if mine:
                        scored = lesson.score(model, probed)
                        bits = quality(scored)
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
        return _publish(job, _causal(trained), lesson, figures, before, rows)


def _check(section: FinetuneSection, model: Causal) -> None:
    """Raises RecipeError where the keys of [finetune] don't go with the model."""
    if section.packing and not isinstance(model, Decoder):
        raise RecipeError("[finetune] packing: an LSTM reads a row as one text", hint="leave the key out")
    if section.method == "lora" and not isinstance(model, Decoder):
        raise RecipeError(
            '[finetune] method = "lora" changes the projections of attention, and an LSTM has none',
            hint='method = "full" trains all of it',
        )
    if section.method == "lora" and section.strategy == "fsdp" and launch.size() > 1:
        raise RecipeError('[finetune] strategy = "fsdp" with adapters', hint='"ddp": adapters are small')


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


def _publish(
    job: Job, model: Causal, lesson: Lesson, figures: Mapping[str, Any], before: Mapping[str, Any], rows: list[Row]
) -> Artifact:
    """Merges the adapter, measures what came out and seals it with the template."""
    section, start = job.recipe.section("finetune"), job.inputs["model"]
    with job.publishing() as staging:
        model = _merged(job, model, lesson, staging.path)
        after: dict[str, Any] = lesson.score(model)
        after |= {f"{name}_before": before[name] for name in after}
        if lesson.template is not None and lesson.probe:
            longest = min(128, lesson.length // 2)
            said = answers.ask(TorchRunner.of(model), lesson.tokenizer, lesson.template, lesson.probe, longest)
            after["answers_ended"] = answers.ended(said)
        console.detail(_told(after), console.duration(figures["seconds"]))
        _save(job, model, lesson, staging.path)
        if rows:
            rows = [*rows, comparing.row("after", model, lesson)]
            comparing.add_speeds([rows[0], rows[-1]], [start.path, staging.path], job.device)
            comparing.tell(rows)
            after["compression"] = rows
        session.publish_logs(job.work, staging.path)
        told = {"conversations": lesson.conversations, "supervised_share": lessons.share(lesson.examples)}
        return staging.seal({**after, **told, **figures}, logs=session.LOGS, told=teacher.told(job, section))


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
    if lesson.template is not None:
        lesson.template.save(folder)


def _keep(job: Job, lesson: Lesson, model: Model, folder: Path) -> None:
    """Writes a copy as it would be published now; the model itself goes on learning."""
    _save(job, _merged(job, _causal(copy.deepcopy(model)), lesson, folder), lesson, folder)


def _told(after: Mapping[str, Any]) -> str:
    told = []
    for key, what in (("answer_bits_per_byte", "answers"), ("val_bits_per_byte", "text")):
        if (found := after.get(key, math.nan)) == found:
            told.append(f"{what} {after[f'{key}_before']:.2f} -> {found:.2f} bits/byte")
        elif key in after:
            told.append("no held-out answer fits the context")
    if (ended := after.get("answers_ended", math.nan)) == ended:
        told.append(f"{100 * ended:.0f} % end by themselves")
    return " · ".join(told)


def _announce(section: FinetuneSection, plan: Plan, choices: Choices, lesson: Lesson, pruned: str) -> None:
    learned = len(lesson.examples) - lesson.windows
    counts = f"{learned:,} conversations" * bool(learned), f"{lesson.windows:,} windows of text" * bool(lesson.windows)
    share = f"{', '.join(filter(None, counts))}, {100 * lessons.share(lesson.examples):.0f} % of tokens supervised"
    console.stage("finetune", f"{', '.join((*section.sources, *section.text))}    {share}")
    for formula in plan.formulas:
        console.debug(f"{'':12}{formula}")
    if pruned:
        console.detail(f"{section.prune}: {pruned}")
    if section.taught_by:
        console.detail(f"taught by {section.taught_by}: {100 * section.distill_weight:.0f} % of the loss")
    optimizer = f"{section.method}, {section.optimizer} {plan.learning_rate:g}"
    console.detail(f"{plan.steps:,} steps of {plan.batch} · {optimizer} · {choices.describe()}")
