"""`llmctl pretrain`: a model learns from prep's text, each kind in its own way (`training.objectives`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from llmctl import console, launch
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError
from llmctl.inference import scoring
from llmctl.model import config as shapes
from llmctl.model import extend, hf
from llmctl.model.hf import Model
from llmctl.pretrain import compressors, samples
from llmctl.text import extension, shards
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import budget, distributed, journal, objectives, outlook, planning, reporters, session, validation
from llmctl.training import choices as selecting
from llmctl.training.batch import Batch, Ids
from llmctl.training.choices import Choices
from llmctl.training.objectives import Learner, Objective
from llmctl.training.planning import Plan

# Learning rates at width 256, tuned on recipes/small.toml; SGD's on 150 steps of a model 128 wide
PEAK = {"muon": 4e-3, "adamw": 2e-3, "sgd": 0.05}
MANY_EPOCHS = 4  # text read more often is worth less and less (Muennighoff et al. 2023, arXiv:2305.16264)
# Evaluations on the way cost at most this share of the run all together, but read at least and at most so many tokens
# each. At the end the whole split is scored.
VALIDATION_SHARE, VALIDATION_TOKENS = 0.0075, (1_024, 65_536)
SAMPLES = 4  # a run


def pretrain(job: Job) -> Artifact | None:
    """Trains `[model]` on the tokens of prep; rank 0 publishes a Hugging Face folder."""
    section, data, seed = job.recipe.section("pretrain"), job.inputs["data"], job.recipe.seed
    reporters.require(section.report_to)
    tokenizer = Tokenizer.load(data.path)
    train, val = Shards.open(data.path, "train"), Shards.open(data.path, "val")
    if section.time_budget:
        with distributed.here(job.device.torch).first_goes():
            job = budget.settle(job, len(tokenizer), len(train))
        section = job.recipe.section("pretrain")
    held = outlook.memory_now()
    model, formulas = _model(job, tokenizer, train)
    objective = _objective(job, model, tokenizer)
    plan = _plan(job, model, train)
    learner = Learner(model)
    choices, compiling = selecting.choose(job, section, learner, plan, plan.tokens)
    _announce(job, model, objective, plan, choices, [*formulas, *plan.formulas], len(train))
    if section.mixture:
        _announce_mixture(train, section.mixture, plan)
    yardstick = (
        compressors.InBackground(lambda: val.text(tokenizer), lambda: train.text(tokenizer))
        if objective.is_causal and launch.rank() == 0
        else None
    )
    batches = functools.partial(_batches, train, objective, plan, seed, section.mixture)
    run = session.begin(
        job, section, learner, plan, choices, compiling, batches, tokens=plan.tokens, length=plan.length, held=held
    )
    prompts = list(section.prompts) or samples.prompts_of(val, tokenizer, objective, plan.length)
    sample_every = max(1, plan.steps // SAMPLES) if section.sample_every is None else section.sample_every
    part = _part(val, plan)
    part_bytes, quality = len(tokenizer.decode(part.tolist()).encode()), ""
    with run, console.progress("pretrain", total=plan.steps, unit="steps", opening=choices.opening) as live:
        for step in run:
            live.update(step.number, run.watch.text(step, plan.steps, quality))
            if run.every(step, plan.eval_every):
                found: dict[str, float] = {}  # a signal may break it off; the step is told of all the same
                with run.measuring() as mine:
                    if mine:
                        found = _measured(model, objective, part, part_bytes, plan, choices)
                        quality = _quality(found)
                run.watch.record(step, found)
            elif step.every(section.log_every) or step.number == plan.steps:
                run.watch.record(step)
            if run.every(step, sample_every):
                with run.measuring() as mine:
                    if mine:
                        _sample(job, model, objective, tokenizer, prompts, step.number)
            if run.every(step, section.keep_every):  # before it is saved: a resume does not come here again
                run.keep(lambda whole, folder: hf.save(whole, data.path, folder))
            if run.every(step, plan.save_every):
                run.saver.save(run.state)
    trained, figures = run.finish()
    if trained is None:
        return None

    with compiling.eagerly():
        metrics = _measured(trained, objective, val[:], val.bytes, plan, choices)
        _sample(job, trained, objective, tokenizer, prompts, plan.steps)
    metrics |= {"parameters": trained.config.parameters, **figures}
    told = f"loss {metrics['val_loss']:.2f}  {_quality(metrics)}  {console.count(metrics['tokens_per_second'])} tok/s"
    console.detail(f"step {plan.steps:,}/{plan.steps:,}  {told}", console.duration(run.state.seconds))
    if yardstick is not None:
        metrics |= yardstick.wait()
        _tell_of_compressors(metrics)
    with job.publishing() as staging:
        hf.save(trained, data.path, staging.path)
        session.publish_logs(job.work, staging.path)
        return staging.seal(metrics, logs=session.LOGS)


def _model(job: Job, tokenizer: Tokenizer, train: Shards) -> tuple[Model, list[str]]:
    """A fresh model of the recipe's shape, or the one `[model] from` brought in."""
    start = job.inputs.get("model")
    if start is None:
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        config, formulas = shapes.derive(job.recipe.section("model"), len(tokenizer), **ids)
        if len(train) <= config.longest:
            raise DataError(
                f"the context ({config.longest:,} tokens) is longer than the training text ({len(train):,} tokens)",
                file=job.inputs["data"].path,
                hint=f"add text, or set [model] max_seq_length to {max(8, len(train) // 8)} or less",
            )
        return hf.random(config, job.recipe.seed).to(job.device.torch), formulas
    model, own = hf.load(start.path, device=job.device.torch), Tokenizer.load(start.path)
    if own.digest() == tokenizer.digest():
        return model, []
    if extension.parts(own, tokenizer) is None:
        raise DataError(
            "the tokenizer of [model] from is not the one of prep's tokens, nor extended by it",
            file=start.path,
            hint=f'[prep.tokenizer] from = "{start.path}" encodes the text with the model\'s own pieces',
        )
    grown = f"vocabulary {len(own):,} -> {len(tokenizer):,}: a new piece begins as the mean of the pieces it is made of"
    return extend.grow(model, own, tokenizer), [grown]


def _objective(job: Job, model: Model, tokenizer: Tokenizer) -> Objective:
    section = job.recipe.section("pretrain")
    return objectives.of(
        model.config,
        tokenizer,
        section.objective,
        whole_word=section.whole_word,
        fim_rate=section.fim_rate or objectives.FIM_RATE,
        document_mask=section.document_mask,
    )


def _plan(job: Job, model: Model, train: Shards) -> Plan:
    section, length = job.recipe.section("pretrain"), model.config.longest
    peak, width = PEAK[section.optimizer] * planning.GAIN.get(model.config.kind, 1.0), model.config.hidden_size
    return planning.make(section, sequences=len(train) // length, length=length, width=width, peak=peak)


def _part(val: Shards, plan: Plan) -> Ids:
    """What evaluations on the way read: windows from all over the split. Reading a token takes a third of the
    operations of training on it, having no gradients; of the time, where steps are compiled, up to twice that.
    """
    evaluations = plan.steps // plan.eval_every if plan.eval_every else 0
    affordable = 3 * VALIDATION_SHARE * plan.tokens / max(1, evaluations)
    windows = max(1, int(min(max(affordable, VALIDATION_TOKENS[0]), VALIDATION_TOKENS[1]) / plan.length))
    if len(val) <= windows * plan.length + 1:
        return val[:]
    starts = np.linspace(0, len(val) - plan.length - 1, windows).astype(int)
    return np.concatenate([val[at : at + plan.length] for at in starts] + [val[-1:]])


def _announce(
    job: Job,
    model: Model,
    objective: Objective,
    plan: Plan,
    choices: Choices,
    formulas: list[str],
    tokens: int,
) -> None:
    shape = model.config
    layers = (
        f"{shape.num_hidden_layers} + {shape.num_decoder_layers}"
        if shape.num_decoder_layers
        else shape.num_hidden_layers
    )
    size = f"{layers} layers x {shape.hidden_size}, {console.count(shape.parameters)} parameters"
    epochs = plan.tokens / tokens
    console.stage("pretrain", f"{size} · {console.count(plan.tokens)} tokens, {epochs:.1f} epochs")
    why = f" = what {shape.kind} models learn" if objective.usual is None else ""
    for formula in (f"objective: {objective.name}{why}", *formulas):
        console.debug(f"{'':12}{formula}")
    optimizer = f"{job.recipe.section('pretrain').optimizer} {plan.learning_rate:g}"
    learns = "" if objective.is_causal and objective.usual is None else f"{objective.name} · "
    console.detail(f"{plan.steps:,} steps of {plan.batch} x {plan.length} · {learns}{optimizer} · {choices.describe()}")


def _announce_mixture(train: Shards, mixture: Mapping[str, float], plan: Plan) -> None:
    """How much of each source the run will have read, and whether that is too often."""
    whole, often = sum(mixture.values()), []
    for name, tokens in train.sources:
        share = mixture[name] / whole
        epochs = share * plan.tokens / tokens
        console.detail(f"{name}: {100 * share:.1f} % of what is learned from, {epochs:.2g} epochs of {tokens:,} tokens")
        often += [name] if epochs > MANY_EPOCHS else []
    if often:
        console.warn(f"more than {MANY_EPOCHS} epochs of {', '.join(often)}: text that is read so often teaches little")


def _batches(
    train: Shards, objective: Objective, plan: Plan, seed: int, mixture: Mapping[str, float], position: int
) -> Iterator[Batch]:
    windows = shards.batches(
        train,
        seed=seed,
        max_seq_length=plan.length,
        batch_size=plan.batch,
        position=position,
        mixture=mixture or None,
    )
    for rows, after in windows:
        yield objective.frame(rows, seed, after)


def _measured(
    model: Model, objective: Objective, tokens: Ids, bytes_: int, plan: Plan, choices: Choices
) -> dict[str, float]:
    """How good the model is on validation text of so many bytes.

    Bits per byte are a causal model's: it says a text token by token, so its surprises add up to the text's. One that
    fills in sees the rest of the text, and its figure would be no compression. Where the objective is not the usual one
    of such models, its own loss stands beside the figures that all of them have.
    """
    more, autocast = {}, choices.autocast
    if objective.usual is not None:
        own = validation.validate(model, objective, tokens, max_seq_length=plan.length, autocast=autocast)
        more = {"val_objective_loss": own.loss}
    if not isinstance(model, hf.Causal):
        usual = objective.usual or objective
        found = validation.validate(model, usual, tokens, max_seq_length=plan.length, autocast=autocast)
        return found.metrics | more
    score = scoring.score(model, tokens, max_seq_length=plan.length, bytes_=bytes_, autocast=autocast)
    figures = {"val_loss": score.loss, "val_bits_per_byte": score.bits_per_byte, "val_perplexity": score.perplexity}
    return figures | more


def _quality(found: Mapping[str, float]) -> str:
    if "val_bits_per_byte" in found:
        return f"{found['val_bits_per_byte']:.3f} bits/byte"
    return f"{100 * found['val_accuracy']:.1f} % of hidden tokens right"


def _tell_of_compressors(metrics: Mapping[str, float]) -> None:
    names = {"zlib": "zlib", "xz": "xz", "xz_primed": "xz primed", "val": "this model"}
    told = (f"{name} {metrics[f'{key}_bits_per_byte']:.2f}" for key, name in names.items())
    console.detail(f"the same text: {' · '.join(told)}")


def _sample(job: Job, model: Model, objective: Objective, tokenizer: Tokenizer, prompts: list[str], step: int) -> None:
    for prompt, text in samples.say(model, objective, tokenizer, prompts, job.recipe.seed):
        journal.append(job.work / session.SAMPLES, {"step": step, "prompt": prompt, "text": text})
        console.event("sample", step=step, prompt=prompt, text=text)
