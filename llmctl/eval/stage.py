"""`llmctl eval`: how good the last model is, beside the one it was made from and beside chance."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmctl import console
from llmctl.artifact import Artifact, Job, digest, hash_file
from llmctl.device import Device
from llmctl.errors import DataError
from llmctl.eval import compare
from llmctl.inference import answers, generate, runners, scoring
from llmctl.inference.runners import Runner, TorchRunner
from llmctl.inference.sampling import Sampling
from llmctl.model import hf
from llmctl.model.config import Config
from llmctl.recipe import EvalSection
from llmctl.text import sources, tasks
from llmctl.text.chat import ChatTemplate
from llmctl.text.conversations import Conversation, conversations, with_system
from llmctl.text.shards import Shards
from llmctl.text.tasks import Question
from llmctl.text.tokenizer import Tokenizer
from llmctl.training import objectives, validation
from llmctl.training.objectives import Objective
from llmctl.training.validation import Validation

UNTRAINED_ANSWERS = (
    8  # enough to show what no training looks like: it never ends by itself, so each is as long as may be
)


BUILTIN, BEGINNING = "builtin:python-stdlib", 32_768  # what is read where no text is named, and how many characters


@dataclass(frozen=True)
class Filler:
    """A model that fills in what was hidden of a text, as torch or ONNX Runtime runs it."""

    config: Config
    asked: Callable[[Objective, np.ndarray], Validation]


@dataclass
class Column:
    """One model's scores. An encoder or encoder-decoder has no runner: it continues nothing."""

    name: str
    weights: str  # SHA-256 of the weights that were scored
    model: Runner | Filler
    metrics: dict[str, float] = field(default_factory=dict)
    windows: list[float] = field(default_factory=list)  # nats of each piece of the validation text
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """What every column is scored on."""

    ids: np.ndarray
    bytes: int
    chats: Sequence[Conversation]
    questions: dict[str, list[Question]]


def evaluate(job: Job) -> Artifact:
    """Scores the subject, the model before it and the untrained one; publishes results.json."""
    section, subject = job.recipe.section("eval"), job.inputs["model"]
    tokenizer = Tokenizer.load(subject.path)
    template = ChatTemplate.load(subject.path)
    material = _material(job, section, tokenizer, template)
    console.stage("eval", f"{subject.place} {subject.short} · weights {_weights(subject)[:8]}")
    columns = _columns(job, subject)
    parts = 2 + len(material.questions)
    with console.progress("eval", total=parts * len(columns), unit="parts") as live:
        for done, column in zip(range(0, parts * len(columns), parts), columns, strict=True):
            live.update(done, f"{column.name} · text")
            if isinstance(column.model, Filler):
                _score_filling(column, column.model, material, tokenizer)
                continue
            _score_text(column, column.model, material)
            live.update(done + 1, f"{column.name} · {len(material.chats)} conversations")
            _score_chats(column, column.model, material, tokenizer, template, section)
            for more, (name, questions) in enumerate(material.questions.items(), 2):
                live.update(done + more, f"{column.name} · {name}")
                _score_questions(column, column.model, name, questions, tokenizer, section)
    _warn_of_twins(columns)
    last = columns[-1]
    console.table("", *compare.table([(column.name, column.metrics) for column in columns]))
    with job.publishing() as staging:
        rows = [{"name": column.name, "weights": column.weights, "metrics": column.metrics} for column in columns]
        results = {
            "columns": rows,
            "windows": last.windows,
            "text_sha256": hashlib.sha256(material.ids.astype("<i8").tobytes()).hexdigest(),
            "examples": len(material.chats),
        }
        text = json.dumps(console.finite(results), indent=1, allow_nan=False)
        (staging.path / "results.json").write_text(text + "\n", encoding="utf-8")
        samples = [json.dumps(sample, ensure_ascii=False) + "\n" for column in columns for sample in column.samples]
        (staging.path / "samples.jsonl").write_text("".join(samples), encoding="utf-8")
        before = {f"{name}_before": value for name, value in columns[-2].metrics.items()} if len(columns) > 2 else {}
        return staging.seal({**last.metrics, **before, "weights_sha256": last.weights})


def _columns(job: Job, subject: Artifact) -> list[Column]:
    """The untrained model of the same shape, the model before, and the subject."""
    found = []
    config = hf.read_config(subject.path)
    if config.kind in ("encoder", "encoder-decoder"):
        if config.task not in ("masked-lm", "seq2seq-lm"):
            raise DataError(
                f"an encoder for {config.task} is not evaluated yet",
                file=subject.path,
                hint="a masked language model is",
            )
        torch.set_num_threads(job.device.threads)
        return [Column(subject.place, _weights(subject), _filler(subject, config, job.device))]
    if subject.kind == "model":
        untrained = hf.random(config, job.recipe.seed).to(job.device.torch)
        assert isinstance(untrained, hf.Causal)
        found.append(Column("untrained", "", TorchRunner.of(untrained)))
    for artifact in (job.inputs.get("before"), subject):
        if artifact is not None:
            found.append(Column(artifact.place, _weights(artifact), runners.load(artifact.path, job.device)))
    return found


def _filler(subject: Artifact, config: Config, device: Device) -> Filler:
    longest = config.longest
    if not runners.has_graph(subject.path):
        model = hf.load(subject.path, device=device.torch)
        return Filler(config, lambda task, ids: validation.validate(model, task, ids, max_seq_length=longest))
    from llmctl.inference.onnx_encoder import EncoderRunner
    from llmctl.inference.onnx_seq2seq import Seq2SeqRunner

    kind = Seq2SeqRunner if config.kind == "encoder-decoder" else EncoderRunner
    fill: Callable[..., np.ndarray] = kind(subject.path, device).fill

    def said(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(fill(*(part.numpy() for part in inputs)))

    cpu = torch.device("cpu")
    return Filler(config, lambda task, ids: validation.ask(said, config, task, ids, max_seq_length=longest, device=cpu))


def _weights(artifact: Artifact) -> str:
    """The digest of the weights: of an export, of the data file they lie in."""
    for name in ("model.safetensors", "model.onnx.data", "model.onnx"):
        if name in artifact.manifest["files"]:
            return str(artifact.manifest["files"][name]["sha256"])
    shards = {
        name: entry["sha256"] for name, entry in artifact.manifest["files"].items() if name.endswith(".safetensors")
    }
    return digest(shards) if shards else hash_file(artifact.path / "artifact.json")


def _texts(job: Job, specs: Sequence[str]) -> Iterator[str]:
    """The texts to score; a model from elsewhere, of which nothing was said, reads the beginning of a built-in one."""
    left = BEGINNING
    for spec in specs or (BUILTIN,):
        for found in sources.documents(spec, job.recipe.root, text_key="", on_error="stop", tally=sources.Tally()):
            if specs:
                yield found.text
            elif left > 0:
                yield found.text[:left]
                left -= len(found.text)


def _material(job: Job, section: EvalSection, tokenizer: Tokenizer, template: ChatTemplate | None) -> Material:
    data, root = job.inputs.get("data"), job.recipe.root
    if section.text or (data is None and not section.tasks and not section.conversations and not job.recipe.finetune):
        if not section.text:
            console.note(f"scored on the beginning of {BUILTIN}; [eval] text names another text")
        texts = list(_texts(job, section.text))
        ids = np.asarray([index for text in texts for index in tokenizer.prompt(text)], dtype=np.int64)
        size = sum(len(text.encode()) for text in texts)
    elif data is not None:
        if Tokenizer.load(data.path).digest() != tokenizer.digest():
            raise DataError(
                "prep's tokens are not of this model's tokenizer",
                file=data.path,
                hint='set [eval] text = "..." to score a text instead',
            )
        val = Shards.open(data.path, "val")
        ids, size = val[:], val.bytes
    else:
        ids, size = np.zeros(0, dtype=np.int64), 0
    chats = list(_chats(job, section)) if template is not None else []
    random.Random(job.recipe.seed).shuffle(chats)
    questions = {tasks.name_of(spec): tasks.questions(spec, root) for spec in section.tasks}
    if not len(ids) and not chats and not questions:
        raise DataError("nothing to score on", hint="set [eval] text, tasks or conversations")
    return Material(ids, size, chats[: section.max_examples], questions)


def _chats(job: Job, section: EvalSection) -> Iterator[Conversation]:
    """Conversations that no training has seen, under the system message that finetuning put them under.

    Of finetune's own sources those are the held-out ones; of any other source, all. One that ends with a question has
    no answer to compare with.
    """
    learned = job.recipe.finetune
    for spec in section.conversations or (learned.sources if learned else ()):
        percent = learned.val_percent if learned is not None and spec in learned.sources else 100.0
        for found in conversations(spec, job.recipe.root, on_error="skip"):
            if sources.is_held_out(found, percent) and found.messages[-1]["role"] == "assistant":
                yield with_system(found, learned.system if learned else "")


def _score_filling(column: Column, model: Filler, material: Material, tokenizer: Tokenizer) -> None:
    """How well the hidden tokens of the text are filled in: the same ones for every model with this vocabulary."""
    if material.questions or material.chats:
        what, key = ("questions", "tasks") if material.questions else ("conversations", "conversations")
        raise DataError(
            f"{what} are for a model that answers, and this is an {model.config.kind}",
            hint=f"leave [eval] {key} out",
        )
    found = model.asked(objectives.of(model.config, tokenizer), material.ids)
    column.metrics |= found.metrics
    column.windows = found.window_nats.tolist()


def _score_text(column: Column, runner: Runner, material: Material) -> None:
    if not len(material.ids) or not column.weights:  # an untrained model knows no more of a text than its vocabulary
        return
    model = runner.model if isinstance(runner, TorchRunner) and isinstance(runner.model, hf.Causal) else runner
    score = scoring.score(model, material.ids, max_seq_length=runner.max_length, bytes_=material.bytes)
    column.metrics |= {
        "val_loss": score.loss,
        "val_perplexity": score.perplexity,
        "val_bits_per_byte": score.bits_per_byte,
    }
    column.windows = score.window_nats.tolist()


def _score_chats(
    column: Column,
    runner: Runner,
    material: Material,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    section: EvalSection,
) -> None:
    if template is None or not material.chats:
        return
    score = answers.score(runner, tokenizer, template, material.chats)
    asked = material.chats if column.weights else material.chats[:UNTRAINED_ANSWERS]
    said = answers.ask(runner, tokenizer, template, asked, section.max_new_tokens)
    column.metrics |= {"answer_bits_per_byte": score.bits_per_byte} if score.tokens else {}
    column.metrics |= {"answers_ended": answers.ended(said)} if said else {}
    for conversation, completion in said:
        column.samples.append(
            {
                "model": column.name,
                "prompt": conversation.messages[-2]["content"],
                "reference": conversation.messages[-1]["content"],
                "answer": completion.text,
                "finish_reason": completion.finish_reason,
            }
        )


def _score_questions(
    column: Column,
    runner: Runner,
    name: str,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    section: EvalSection,
) -> None:
    """Accuracy: of choices by their likelihood a byte, of exact answers by greedy decoding up to a newline."""
    shown, asked = questions[: section.num_fewshot], questions[section.num_fewshot :][: section.max_examples]
    examples = "".join(f"{question.prompt}\n{question.answer}\n\n" for question in shown)
    if not asked:
        raise DataError(
            f"{name} has {len(questions)} questions, and all are shown as examples",
            hint=f"set [eval] num_fewshot below {len(questions)}",
        )
    correct = [_is_right(runner, question, examples, tokenizer, section) for question in asked]
    accuracy = sum(correct) / len(correct)
    column.metrics[f"{name}_accuracy"] = accuracy
    column.metrics[f"{name}_stderr"] = math.sqrt(accuracy * (1 - accuracy) / len(correct))


def _is_right(runner: Runner, question: Question, examples: str, tokenizer: Tokenizer, section: EvalSection) -> bool:
    prompt = f"{examples}{question.prompt}\n" if question.prompt or examples else ""
    context = tokenizer.prompt(prompt)
    if not question.choices:
        sampling = Sampling(temperature=0.0, max_tokens=section.max_new_tokens, stop=("\n",))
        return generate.complete(runner, tokenizer, context, sampling).text.strip() == question.answer.strip()
    scores = []
    for choice in question.choices:
        nats, _ = scoring.loglikelihood(runner, context, tokenizer.encode(choice))
        scores.append(nats / max(1, len(choice.encode())) if question.prompt else nats)
    return question.choices[int(np.argmax(scores))] == question.answer


def _warn_of_twins(columns: Sequence[Column]) -> None:
    """Two models with one score to the last digit are one model, or one of them was not loaded."""
    for one, other in itertools.combinations(columns, 2):
        same = one.metrics.get("val_loss") is not None and one.metrics.get("val_loss") == other.metrics.get("val_loss")
        if same and one.weights != other.weights:
            console.warn(
                f"{one.name} and {other.name} have different weights and exactly the same loss: was one of them "
                f"really loaded?"
            )
