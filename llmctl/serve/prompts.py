"""From a parsed request to the prompts that the engine runs: every limit that depends on the model is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.errors import LlmctlError
from llmctl.inference.engine import Prompt
from llmctl.inference.generate import taken
from llmctl.inference.sampling import Sampling
from llmctl.serve import limits
from llmctl.serve.model import Model
from llmctl.serve.protocol import ApiError, ChatRequest, CompletionRequest, Parameters


def of_completion(asked: CompletionRequest, model: Model) -> tuple[list[Prompt], list[str]]:
    """The prompts of a completion, and what each answer begins with (the prompt itself with `echo`).

    Raises:
        ApiError: 400 or 404.
    """
    _check(asked, model)
    found = texts(asked.prompt, "prompt", model.runner.vocab_size, limits.MAX_SEQUENCES // asked.n)
    ids = _completion_ids(model, found)
    spare = 0 if asked.echo and asked.max_tokens == 0 else 1  # a prompt that is only scored may fill the context
    rooms = [_room(len(prompt), asked.max_tokens, model, "prompt", spare) for prompt in ids]
    scored = asked.echo and asked.logprobs is not None
    if scored and model.writer.start_ids:
        message = "an encoder-decoder gives its prompt no log-probabilities: `echo` and `logprobs` don't go together"
        raise ApiError(400, message, param="echo", code="unsupported_parameter")
    echoes = [_echo(text, model) if asked.echo else "" for text in found]
    opening = [echo for echo in echoes for _ in range(asked.n)]
    return _prompts(asked, model, ids, rooms, asked.logprobs or 0, scored), opening


def of_chat(asked: ChatRequest, model: Model) -> list[Prompt]:
    """The prompts of a chat: `n` times the conversation, up to where the answer begins.

    Raises:
        ApiError: 400 or 404.
    """
    _check(asked, model)
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "`top_logprobs` needs `logprobs: true`", param="top_logprobs", code="invalid_value")
    ids = _chat_ids(model, asked)
    room = _room(len(ids), asked.longest, model, "messages")
    return _prompts(asked, model, [ids], [room], asked.top_logprobs or 0, scored=False)


def check_name(wanted: str | None, model: Model) -> None:
    if wanted is not None and wanted != model.name:
        message = f"the model {wanted[:80]!r} does not exist here; this server has {model.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _check(asked: Parameters, model: Model) -> None:
    check_name(asked.model, model)
    if model.kind == "embedding":
        message = f"{model.name!r} is a sentence encoder: it gives vectors and writes no text. Use /v1/embeddings"
        raise ApiError(400, message, param="model", code="model_not_supported")
    if asked.best_of is not None and asked.best_of != asked.n:
        raise ApiError(400, "`best_of` other than `n` is not supported", param="best_of", code="unsupported_parameter")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "`stream_options` needs `stream: true`", param="stream_options", code="invalid_value")


def _completion_ids(model: Model, texts: Sequence[str | list[int]]) -> list[list[int]]:
    """Text gets the `<s>` that documents begin with; ids are taken as they are."""
    found = []
    for text in texts:
        if isinstance(text, str):
            _check_length(text, model, "prompt")
            ids = model.continuation(text)
            if not ids:
                raise ApiError(400, "the prompt is empty, and this vocabulary has no BOS", param="prompt")
            found.append(ids)
        else:
            found.append(text)
    return found


def _echo(text: str | list[int], model: Model) -> str:
    return text if isinstance(text, str) else model.tokenizer.decode(text)


def _chat_ids(model: Model, asked: ChatRequest) -> list[int]:
    if model.template is None:
        message = f"{model.name!r} is a base model: it has no chat template. Use /v1/completions, or finetune it first"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    messages = [message.plain() for message in asked.messages]
    _check_length("".join(message["content"] for message in messages), model, "messages")
    try:
        return model.conversation(messages)
    except LlmctlError as problem:
        raise ApiError(400, problem.message, param="messages", code="invalid_value") from problem


def _check_length(text: str, model: Model, param: str) -> None:
    if model.certainly_too_long(text):
        message = (
            f"the prompt of {len(text):,} characters does not fit the model's context of {model.max_length:,} tokens"
        )
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def _room(used: int, wanted: int | None, model: Model, param: str, spare: int = 1) -> int:
    """How many tokens the answer may have; at most those that the prompt leaves."""
    if wanted is not None and wanted > model.max_length:
        message = f"`max_tokens` is {wanted:,}; the model's context is {model.max_length:,} tokens"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    left = model.max_length - taken(model.writer, used, model.max_length)
    if left < spare:
        context = f"the model's context is {model.max_length:,} tokens"
        message = f"the prompt has {used:,} tokens; {context}, and an answer needs room"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return left if wanted is None else min(wanted, left)


def _prompts(
    asked: Parameters, model: Model, ids: list[list[int]], rooms: list[int], logprobs: int, scored: bool
) -> list[Prompt]:
    """`n` answers to each prompt, in OpenAI's order; the answers to one prompt differ in their seeds."""
    bias = _logit_bias(asked.logit_bias, model.runner.vocab_size)

    def sampling(room: int, answer: int) -> Sampling:
        return Sampling(
            temperature=asked.temperature if asked.top_p > 0 else 0.0,  # a nucleus of nothing holds the likeliest alone
            top_k=max(0, asked.top_k),  # vLLM's -1 means all
            top_p=asked.top_p or 1.0,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=bias,
            seed=None if asked.seed is None else (asked.seed + answer) % 2**64,
            max_tokens=room,
            stop=tuple(asked.stop),
            ignore_eos=asked.ignore_eos,
            logprobs=logprobs,
        )

    rows = zip(ids, rooms, strict=True)
    return [Prompt(prompt, sampling(room, answer), scored) for prompt, room in rows for answer in range(asked.n)]


def texts(given: Any, param: str, vocab_size: int, most: int) -> list[str | list[int]]:
    """What `prompt` or `input` holds: a string, a list of strings, a list of ids, or a list of lists of ids.

    Raises:
        ApiError: 400 for anything else, more than `most` of them, or an id outside the vocabulary.
    """

    def wrong(message: str) -> ApiError:
        return ApiError(400, message, param=param, code="invalid_value")

    if isinstance(given, str):
        found: list[Any] = [given]
    elif isinstance(given, list) and given and type(given[0]) is int:
        found = [given]
    elif isinstance(given, list) and given:
        found = given
    else:
        raise wrong(f"`{param}` is a string, a list of strings, a list of token ids or a list of lists of token ids")
    if len(found) > most:
        raise wrong(f"`{param}` has {len(found):,} items; this request may have {most:,} at most")
    for item in found:
        if isinstance(item, str) != isinstance(found[0], str) or not isinstance(item, (str, list)):
            raise wrong(f"the items of `{param}` are all strings or all lists of token ids")
        if isinstance(item, list):
            check_ids(item, vocab_size, param)
    return found


def check_ids(ids: list[Any], vocab_size: int, param: str) -> None:
    """Raises the 400 of a list of ids that is empty, holds something else, or leaves the vocabulary."""
    if not ids:
        raise ApiError(400, f"`{param}` holds an empty list of token ids", param=param, code="invalid_value")
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < vocab_size:  # True is an int to isinstance
            message = f"`{param}` holds {str(id_)[:40]}; a token id of this model is 0 to {vocab_size - 1}"
            raise ApiError(400, message, param=param, code="invalid_value")


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    """OpenAI's `{"42": -100}` with its ids and values checked."""
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 12 and int(name) < vocab_size):
            message = f"`logit_bias` names the token {name[:40]!r}; a token id of this model is 0 to {vocab_size - 1}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        if not -100 <= value <= 100:
            message = f"`logit_bias` of token {name} is {value:g}; expected -100 to 100"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        bias[int(name)] = value
    return bias
