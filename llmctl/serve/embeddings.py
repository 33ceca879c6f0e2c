"""POST /v1/embeddings: texts, or their ids, to vectors."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from llmctl.inference.encode import Embedder, Row, Vectors
from llmctl.inference.engine import Answers, Texts
from llmctl.serve import limits, prompts
from llmctl.serve.model import Model
from llmctl.serve.protocol import ApiError, EmbeddingRequest


def read(asked: EmbeddingRequest, model: Model) -> tuple[Texts, list[int]]:
    """The texts of a request as ids, and the places of those that were cut, which happens only where it is asked for.

    Ids are taken as they are, `[CLS]` and `[SEP]` included, as /tokenize gives them.

    Raises:
        ApiError: 400 or 404.
    """
    prompts.check_name(asked.model, model)
    embedder = model.runner
    if not isinstance(embedder, Embedder):
        message = f"{model.name!r} is a {model.kind} model: it writes text and gives no embeddings"
        raise ApiError(400, message, param="model", code="model_not_supported")
    if asked.dimensions not in (None, embedder.dimensions):
        message = f"`dimensions` is {asked.dimensions}; the vectors of {model.name!r} have {embedder.dimensions}"
        raise ApiError(400, message, param="dimensions", code="unsupported_parameter")
    given = prompts.texts(asked.input, "input", embedder.vocab_size, limits.MAX_INPUTS)
    limit, tokens = _limit(asked, model), 0
    rows: list[Row] = []
    cut: list[int] = []
    for place, text in enumerate(given):
        if isinstance(text, str):
            row, shortened = embedder.ids(text, limit)
        else:
            row, shortened = np.array(text[:limit], np.int32), len(text) > limit
        if shortened and asked.truncate_prompt_tokens is None:
            raise _too_long(place, text, model)
        if not len(row):
            raise ApiError(400, f"`input` {place} is empty", param="input", code="invalid_value")
        tokens += len(row)
        if tokens > limits.MAX_INPUT_TOKENS:
            message = f"`input` has over {limits.MAX_INPUT_TOKENS:,} tokens together; send fewer texts at a time"
            raise ApiError(400, message, param="input", code="invalid_value")
        rows.append(row)
        cut += [place] * shortened
    return Texts(rows), cut


def _limit(asked: EmbeddingRequest, model: Model) -> int:
    """How many tokens of a text are read."""
    wanted = asked.truncate_prompt_tokens
    if wanted is None or wanted == -1:
        return model.max_length
    if not 0 < wanted <= model.max_length:
        message = f"`truncate_prompt_tokens` is {wanted}; expected -1, or 1 to {model.max_length}"
        raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
    return wanted


def _too_long(place: int, text: str | list[int], model: Model) -> ApiError:
    size = f"{len(text):,} {'characters' if isinstance(text, str) else 'tokens'}"
    message = (
        f"`input` {place} ({size}) does not fit the {model.max_length:,} tokens that {model.name!r} reads of a text; "
        "`truncate_prompt_tokens: -1` cuts it"
    )
    return ApiError(400, message, param="input", code="context_length_exceeded")


async def answer(events: Answers, texts: Texts, cut: list[int], asked: EmbeddingRequest, model: Model) -> Any:
    """OpenAI's list of embeddings, in the order of the texts; `truncated` names those that were cut."""
    vectors = [event.vectors async for event in events][-1]
    assert vectors is not None
    found = _base64(vectors) if asked.encoding_format == "base64" else vectors.tolist()
    tokens = sum(map(len, texts.rows))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(found)],
        "model": model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        **({} if asked.truncate_prompt_tokens is None else {"truncated": cut}),
    }


def _base64(vectors: Vectors) -> list[str]:
    """Each vector's float32 values, little-endian."""
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
