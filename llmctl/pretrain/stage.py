"""`llmctl pretrain`: a model learns from prep's text, each kind in its own way (`training.objectives`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmctl import console
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
from llmctl.training import checkpoint, journal, loop, objectives, optim, planning, session, validation
from llmctl.training.batch import Batch, Ids
from llmctl.training.objectives import Objective
from llmctl.training.planning import Plan

PEAK = {"muon": 4e-3, "adamw": 2e-3}  # learning rates at width 256, tuned on recipes/small.toml
VALIDATION_TOKENS = 65_536  # scored now and then; the whole split is scored at the end


def pretrain(job: Job) -> Artifact:
    """Trains `[model]` on the tokens of prep and publishes a Hugging Face folder."""
    section, data, seed = job.recipe.section("pretrain"), job.inputs["data"], job.recipe.seed
    tokenizer = Tokenizer.load(data.path)
    train, val = Shards.open(data.path, "train"), Shards.open(data.path, "val")
    model, formulas = _model(job, tokenizer, train)
    objective = objectives.of(model.config, tokenizer)
    plan = _plan(job, model, train)
    flops = 6 * model.config.parameters * plan.tokens
    choices, loss = session.choose(job, section, objectives.loss, flops, plan.micro_batch, kind=model.config.kind)
    _announce(job, model, objective, plan, choices, [*formulas, *plan.formulas], len(train))

    yardstick = (
        compressors.InBackground(lambda: val.text(tokenizer), lambda: train.text(tokenizer))
        if objective.is_causal
        else None
    )
    optimizers = optim.build(model, section.optimizer, plan.learning_rate, section.weight_decay)
    state = session.resume(job, seed, model, optimizers, plan.steps)
    prompts = list(section.prompts) or samples.prompts_of(val, tokenizer, objective, plan.length)
    sample_every = plan.eval_every if section.sample_every is None else section.sample_every
    part = val[:VALIDATION_TOKENS]
    part_bytes, quality = len(tokenizer.decode(part.tolist()).encode()), ""
    stop = session.Stop(job)
    steps = loop.train(
        model,
        optimizers,
        _batches(train, objective, plan, seed, state.position),
        loss,
        steps=range(state.step, plan.steps),
        rate=plan.rate,
        micro_batch=choices.micro_batch,
        max_grad_norm=section.max_grad_norm,
        autocast=choices.autocast,
        stop=stop,
    )
    with stop, console.progress("pretrain", total=plan.steps, unit="steps", opening=choices.opening) as live:
        for step in steps:
            session.follow(state, step)
            live.update(step.number, loop.live_text(step, plan.steps, quality))
            last = step.number == plan.steps  # it is saved, scored and sampled below
            if step.every(plan.eval_every) and not last:
                with stop.breaks_off():
                    found = _measured(model, objective, part, part_bytes, plan, choices)
                    quality = _quality(found)
                    session.record(job.work, step, found)
            elif step.every(section.log_every) or last:
                session.record(job.work, step)
            if step.every(sample_every) and not last:
                with stop.breaks_off():
                    _sample(job, model, objective, tokenizer, prompts, step.number)
            if step.every(plan.save_every) and not last:
                checkpoint.save(job.work, state, model, optimizers)
        checkpoint.save(job.work, state, model, optimizers)  # still deaf to the second signal that CI systems send
    stop.raise_if_early(state, plan.steps)

    metrics = _measured(model, objective, val[:], val.bytes, plan, choices)
    _sample(job, model, objective, tokenizer, prompts, plan.steps)
    metrics |= {"parameters": model.config.parameters, **session.figures(state)}
    told = f"loss {metrics['val_loss']:.2f}  {_quality(metrics)}  {console.count(metrics['tokens_per_second'])} tok/s"
    console.detail(f"step {plan.steps:,}/{plan.steps:,}  {told}", console.duration(state.seconds))
    if yardstick is not None:
        metrics |= yardstick.wait()
        _tell_of_compressors(metrics)
    with job.publishing() as staging:
        hf.save(model, data.path, staging.path)
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


def _plan(job: Job, model: Model, train: Shards) -> Plan:
    section, length = job.recipe.section("pretrain"), model.config.longest
    peak, width = PEAK[section.optimizer] * planning.GAIN.get(model.config.kind, 1.0), model.config.hidden_size
    return planning.make(section, sequences=len(train) // length, length=length, width=width, peak=peak)


def _announce(
    job: Job,
    model: Model,
    objective: Objective,
    plan: Plan,
    choices: session.Choices,
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
    for formula in (f"objective: {objective.name} = what {shape.kind} models learn", *formulas):
        console.debug(f"{'':12}{formula}")
    optimizer = f"{job.recipe.section('pretrain').optimizer} {plan.learning_rate:g}"
    learns = "" if objective.is_causal else f"{objective.name} · "
    console.detail(f"{plan.steps:,} steps of {plan.batch} x {plan.length} · {learns}{optimizer} · {choices.describe()}")


def _batches(train: Shards, objective: Objective, plan: Plan, seed: int, position: int) -> Iterator[Batch]:
    windows = shards.batches(train, seed=seed, max_seq_length=plan.length, batch_size=plan.batch, position=position)
    for rows, after in windows:
        yield objective.frame(rows, seed, after)


def _measured(
    model: Model, objective: Objective, tokens: Ids, bytes_: int, plan: Plan, choices: session.Choices
) -> dict[str, float]:
    """How good the model is on validation text of so many bytes.

    Bits per byte are a causal model's: it says a text token by token, so its surprises add up to the text's. One that
    fills in sees the rest of the text, and its figure would be no compression.
    """
    if not isinstance(model, hf.Causal):
        found = validation.validate(model, objective, tokens, max_seq_length=plan.length, autocast=choices.autocast)
        return found.metrics
    score = scoring.score(model, tokens, max_seq_length=plan.length, bytes_=bytes_, autocast=choices.autocast)
    return {"val_loss": score.loss, "val_bits_per_byte": score.bits_per_byte, "val_perplexity": score.perplexity}


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
