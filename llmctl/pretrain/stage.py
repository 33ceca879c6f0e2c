"""`llmctl pretrain`: a decoder learns the next token of prep's text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from llmctl import console
from llmctl.artifact import Artifact, Job
from llmctl.errors import DataError
from llmctl.inference import generate, scoring
from llmctl.inference.runners import TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import config as shapes
from llmctl.model import hf
from llmctl.model.transformer import Decoder
from llmctl.pretrain import compressors
from llmctl.text import shards
from llmctl.text.shards import Shards
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import checkpoint, journal, loop, objectives, optim, planning, session
from llmctl.training.loop import Batch
from llmctl.training.planning import Plan

PEAK = {"muon": 4e-3, "adamw": 2e-3}  # learning rates at width 256, tuned on recipes/small.toml
VALIDATION_TOKENS = 65_536  # scored now and then; the whole split is scored at the end
SAMPLE_TOKENS = 64
SAMPLING = Sampling(temperature=0.8, top_k=50, max_tokens=SAMPLE_TOKENS)


def pretrain(job: Job) -> Artifact:
    """Trains `[model]` on the tokens of prep and publishes a Hugging Face folder."""
    section, data = job.recipe.section("pretrain"), job.inputs["data"]
    tokenizer = Tokenizer.load(data.path)
    train, val = Shards.open(data.path, "train"), Shards.open(data.path, "val")
    model, formulas = _model(job, tokenizer, train)
    plan = _plan(job, model, train)
    flops = 6 * model.config.parameters * plan.tokens
    choices, loss = session.choose(job, section, objectives.causal, flops, plan.micro_batch)
    _announce(job, model, plan, choices, [*formulas, *plan.formulas], len(train))

    against = compressors.InBackground(lambda: val.text(tokenizer), lambda: train.text(tokenizer))
    optimizers = optim.build(model, section.optimizer, plan.learning_rate, section.weight_decay)
    state = session.resume(job, job.recipe.seed, model, optimizers, plan.steps)
    prompts = list(section.prompts) or _beginnings(val, tokenizer)
    sample_every = plan.eval_every if section.sample_every is None else section.sample_every
    bits: float | None = None
    stop = session.Stop(job)
    steps = loop.train(
        model,
        optimizers,
        _batches(train, plan, job.recipe.seed, state.position),
        loss,
        steps=range(state.step, plan.steps),
        rate=plan.rate,
        micro_batch=choices.micro_batch,
        max_grad_norm=section.max_grad_norm,
        autocast=choices.autocast,
        stop=stop,
    )
    with stop, console.progress("pretrain", total=plan.steps, unit="steps") as live:
        for step in steps:
            session.follow(state, step)
            live.update(step.number, loop.live_text(step, plan.steps, bits))
            last = step.number == plan.steps  # it is saved, scored and sampled below
            if step.every(plan.eval_every) and not last:
                with stop.breaks_off():
                    score = scoring.score(
                        model, val[:VALIDATION_TOKENS], max_seq_length=plan.length, autocast=choices.autocast
                    )
                    bits = score.bits_per_byte_of(tokenizer.decode(val[:VALIDATION_TOKENS].tolist()))
                    session.record(job.work, step, {"val_loss": score.loss, "val_bits_per_byte": bits})
            elif step.every(section.log_every) or last:
                session.record(job.work, step)
            if step.every(sample_every) and not last:
                with stop.breaks_off():
                    _sample(job, model, tokenizer, prompts, step.number)
            if step.every(plan.save_every) and not last:
                checkpoint.save(job.work, state, model, optimizers)
        checkpoint.save(job.work, state, model, optimizers)  # still deaf to the second signal that CI systems send
    stop.raise_if_early(state, plan.steps)

    score = scoring.score(model, val[:], max_seq_length=plan.length, bytes_=val.bytes, autocast=choices.autocast)
    _sample(job, model, tokenizer, prompts, plan.steps)
    metrics = {
        "val_loss": score.loss,
        "val_bits_per_byte": score.bits_per_byte,
        "val_perplexity": score.perplexity,
        "parameters": model.config.parameters,
        **session.figures(state),
        **against.wait(),
    }
    console.detail(
        f"step {plan.steps:,}/{plan.steps:,}  loss {score.loss:.2f}  {score.bits_per_byte:.3f} bits/byte  "
        f"{console.count(metrics['tokens_per_second'])} tok/s",
        console.duration(state.seconds),
    )
    console.detail(
        f"the same text: zlib {metrics['zlib_bits_per_byte']:.2f} · xz {metrics['xz_bits_per_byte']:.2f} · "
        f"xz primed {metrics['xz_primed_bits_per_byte']:.2f} · this model {score.bits_per_byte:.2f}"
    )
    with job.publishing() as staging:
        hf.save(model, data.path, staging.path)
        session.publish_logs(job.work, staging.path)
        return staging.seal(metrics, logs=session.LOGS)


def _model(job: Job, tokenizer: Tokenizer, train: Shards) -> tuple[Decoder, list[str]]:
    """A fresh model of the recipe's shape, or the one `[model] from` brought in."""
    start = job.inputs.get("model")
    if start is None:
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        config, formulas = shapes.derive(job.recipe.section("model"), len(tokenizer), **ids)
        if len(train) <= config.max_position_embeddings:
            raise DataError(
                f"the context ({config.max_position_embeddings:,} tokens) is longer than the training text "
                f"({len(train):,} tokens)",
                file=job.inputs["data"].path,
                hint=f"add text, or set [model] max_seq_length to {max(8, len(train) // 8)} or less",
            )
        return Decoder.random(config, job.recipe.seed).to(job.device.torch), formulas
    if Tokenizer.load(start.path).digest() != tokenizer.digest():
        raise DataError(
            "the tokenizer of [model] from is not the one of prep's tokens",
            file=start.path,
            hint=f'[prep.tokenizer] from = "{start.path}" encodes the text with the model\'s own pieces',
        )
    return hf.load(start.path, device=job.device.torch), []


def _plan(job: Job, model: Decoder, train: Shards) -> Plan:
    section, length = job.recipe.section("pretrain"), model.config.max_position_embeddings
    peak, width = PEAK[section.optimizer], model.config.hidden_size
    return planning.make(section, sequences=len(train) // length, length=length, width=width, peak=peak)


def _announce(job: Job, model: Decoder, plan: Plan, choices: session.Choices, formulas: list[str], tokens: int) -> None:
    shape = model.config
    size = f"{shape.num_hidden_layers} layers x {shape.hidden_size}, {console.count(shape.parameters)} parameters"
    epochs = plan.tokens / tokens
    console.stage("pretrain", f"{size} · {console.count(plan.tokens)} tokens, {epochs:.1f} epochs")
    for formula in formulas:
        console.debug(f"{'':12}{formula}")
    optimizer = f"{job.recipe.section('pretrain').optimizer} {plan.learning_rate:g}"
    console.detail(f"{plan.steps:,} steps of {plan.batch} x {plan.length} · {optimizer} · {choices.describe()}")


def _batches(train: Shards, plan: Plan, seed: int, position: int) -> Iterator[Batch]:
    samples = shards.batches(train, seed=seed, max_seq_length=plan.length, batch_size=plan.batch, position=position)
    for rows, after in samples:
        yield Batch(rows[:, :-1], rows[:, 1:], after)


def _beginnings(val: Shards, tokenizer: Tokenizer, count: int = 3) -> list[str]:
    """The first words of some validation documents: beginnings that the model has not seen."""
    texts = (tokenizer.decode(ids[:24].tolist()).strip() for ids in val.documents_ids())
    return list(itertools.islice(filter(None, texts), count))


def _sample(job: Job, model: Decoder, tokenizer: Tokenizer, prompts: list[str], step: int) -> None:
    runner = TorchRunner.of(model)
    for index, prompt in enumerate(prompts):
        sampling = dataclasses.replace(SAMPLING, seed=job.recipe.seed + index)
        text = generate.complete(runner, tokenizer, tokenizer.prompt(prompt), sampling).text
        journal.append(job.work / session.SAMPLES, {"step": step, "prompt": prompt, "text": text})
        console.event("sample", step=step, prompt=prompt, text=text)
