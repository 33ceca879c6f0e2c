"""The requests of the OpenAI API as llmctl understands them, and the one shape of its errors.

Unknown fields are ignored, as clients expect. A field that is understood but can't be honoured (tools, JSON schemas,
images) is a 400: an answer that silently left it out would be wrong. `null` means "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmctl.serve import limits


class ApiError(Exception):
    """Something the client should know: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, what every failed answer carries."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After where coming again helps."""
        return {"Retry-After": str(limits.RETRY_AFTER)} if self.status in (429, 503) else {}


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

# ---------------------------------------------------------------- fields


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _no_empty_stop(stops: list[str]) -> list[str]:
    if any(not stop or len(stop) > limits.MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"a stop string has 1 to {limits.MAX_STOP_CHARS} characters")
    return stops


Stops = Annotated[
    list[str], Field(max_length=limits.MAX_STOPS), AfterValidator(_no_empty_stop), BeforeValidator(_one_or_many)
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Parameters(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N)] = 1
    best_of: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[dict[str, float], Field(max_length=limits.MAX_LOGIT_BIAS)] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = []
    ignore_eos: bool = False


class CompletionRequest(Parameters):
    """POST /v1/completions."""

    prompt: Any
    max_tokens: Annotated[int, Field(ge=0)] = 16  # OpenAI's default
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it: one text; OpenAI's "developer" is what templates call "system"."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Parameters):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)] | None = None

    @property
    def longest(self) -> int | None:
        """Tokens at most, under its new name or its old one; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings; `truncate_prompt_tokens` is vLLM's, -1 for as many as the model reads."""

    model_config = ConfigDict(extra="ignore", strict=True)
    model: str | None = None
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)
    tokens: list[int]


# Understood, and not honoured: the field, and the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "continue_final_message": (False,),
    "chat_template": (),
    "prompt_logprobs": (0,),
    "prompt_embeds": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
}

Request = TypeVar("Request", bound=BaseModel)


def parse(body: bytes, kind: type[Request]) -> Request:
    """The request in `body`.

    Raises:
        ApiError: 400; `param` is the field that is wrong.
    """
    try:
        # jiter bounds the nesting and refuses NaN, lone surrogates and what is not UTF-8.
        document = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as reason:
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from reason
    if not isinstance(document, dict):
        raise ApiError(400, f"the body is a JSON {type(document).__name__}; expected an object", code="invalid_json")
    fields = {name: value for name, value in document.items() if value is not None}
    for name, harmless in _REFUSED.items():
        if name in fields and fields[name] not in harmless:
            raise ApiError(400, f"`{name}` is not supported by this server", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as problem:
        raise _bad_field(problem) from problem


def _bad_field(problem: ValidationError) -> ApiError:
    """The first wrong field, as `messages.0.content` and what is wrong with it."""
    first = problem.errors(include_url=False, include_context=False)[0]
    # A union's branches stand in the path as type names ("str", "list[TextPart]"): no field of the request.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    param, found = ".".join(path), repr(first["input"])
    shown = found if len(found) <= 60 else found[:57] + "..."
    if first["type"] == "missing":
        return ApiError(400, f"`{param}` is required", param=param, code="missing_required_parameter")
    return ApiError(400, f"`{param}`: {first['msg']}, got {shown}", param=param, code="invalid_value")
