"""`llmctl chat`: a model in the terminal. The answer alone goes to stdout; whatever else is said goes to stderr.

    llmctl chat runs/small                       a conversation: Ctrl-C stops an answer, Ctrl-D leaves
    llmctl chat runs/small -p "What is a tuple?"     one question
    git diff | llmctl chat runs/small            one question, from a pipe

A base model has no turns: it continues the text it is given.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from llmctl import console
from llmctl.artifact import Artifact
from llmctl.device import Device
from llmctl.errors import UsageError
from llmctl.inference.generate import Delta, stream
from llmctl.inference.sampling import Sampling
from llmctl.serve.model import Model, load

Messages = list[dict[str, str]]

FORGET = "/new"  # typed alone, it begins a new conversation


def chat(
    artifact: Artifact,
    device: Device,
    *,
    prompt: str | None = None,
    system: str = "",
    temperature: float = 0.7,
    max_tokens: int = 256,
    seed: int | None = None,
) -> int:
    """Talks, or with a `prompt` (or a pipe on stdin) answers once. Returns the exit code.

    Raises:
        UsageError: the question does not fit the model's context, or there is none; the model is a sentence encoder.
    """
    model = load(artifact.path, device)
    _ = model.writer  # what can't answer says so before it is asked
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)
    if model.template is None:
        console.note(f"{artifact.path} is a base model: it continues your text; it was not taught to answer")
    if prompt is None and sys.stdin.isatty():
        return converse(model, sampling, system)
    question = sys.stdin.read() if prompt is None else prompt
    if not question.strip():
        raise UsageError("no question", hint='llmctl chat -p "..."  asks one')
    messages = [*_system(system), {"role": "user", "content": question}]
    _say(answer(model, sampling, _ids(model, messages)))
    return 0


def converse(model: Model, sampling: Sampling, system: str) -> int:
    """Question and answer until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrows and history in `input`)
    console.note(f"{model.max_length:,} tokens of context · Ctrl-C stops an answer · {FORGET} forgets · Ctrl-D leaves")
    messages: Messages = []
    while True:
        try:
            question = input("> ")
        except EOFError:
            console.raw("\n")
            return 0
        except KeyboardInterrupt:
            console.raw("\n")
            continue
        if question.strip() == FORGET:
            messages.clear()
            console.note("a new conversation")
        elif question.strip():
            messages.append({"role": "user", "content": question})
            reply = _turn(model, sampling, messages, system)
            messages = [*messages, {"role": "assistant", "content": reply}] if model.template and reply else []


def _turn(model: Model, sampling: Sampling, messages: Messages, system: str) -> str:
    """One answer; forgets the oldest exchanges where the conversation has outgrown the context."""
    while True:
        try:
            ids = _ids(model, [*_system(system), *messages])
            break
        except UsageError as problem:
            if len(messages) < 3:
                console.warn(str(problem))
                return ""
            del messages[:2]
            console.note("the oldest question and answer no longer fit")
    return _say(answer(model, sampling, ids))


def _system(system: str) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _ids(model: Model, messages: Messages) -> list[int]:
    """The prompt: the conversation, or for a base model the last text alone.

    Raises:
        UsageError: it leaves no room for an answer.
    """
    text = messages[-1]["content"]
    ids = model.continuation(text) if model.template is None else model.conversation(messages)
    if len(ids) >= model.max_length:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens; the model's context is {model.max_length:,}",
            hint="ask with fewer words",
        )
    return ids


def answer(model: Model, sampling: Sampling, ids: Sequence[int]) -> Iterator[Delta]:
    """The answer as it comes."""
    return stream(model.writer, model.tokenizer, ids, sampling)


def _say(deltas: Iterator[Delta]) -> str:
    """Prints an answer as it comes and returns it; Ctrl-C ends it there."""
    said, finish = "", None
    try:
        for delta in deltas:
            console.raw(delta.text)
            said, finish = said + delta.text, delta.finish_reason
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        console.note("stopped")
    if not said.endswith("\n"):
        console.raw("\n")
    if finish == "length":
        console.note("cut at the limit of tokens (--max-tokens)")
    return said
