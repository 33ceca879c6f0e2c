"""The HTTP interface: OpenAI's completions, chat and embeddings over one engine, and the page at /.

A handler is a straight line: read the body within its limits, parse it, turn it into prompts, queue them, and write
what comes. Whatever goes wrong is an `ApiError`, hence one JSON object; once a stream has begun, an event in it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
import traceback
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmctl import console
from llmctl.errors import LlmctlError
from llmctl.inference.engine import Answers, Engine, Prompt, QueueFull, Stopping
from llmctl.inference.sampling import Token
from llmctl.serve import answers, embeddings, limits, prompts, protocol
from llmctl.serve.answers import Chat, Completion, Kind, Usage
from llmctl.serve.guard import Guard
from llmctl.serve.model import Model
from llmctl.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Parameters,
    TokenizeRequest,
)

GONE = 499  # nginx's number for a client that closed the connection; nobody reads it


@dataclass
class Service:
    """The routes and what they share. `model` and `engine` come when the weights are loaded; until then it is a 503."""

    model: Model | None = None
    engine: Engine | None = None
    started: int = 0
    stopping: bool = False

    def ready(self, model: Model, engine: Engine) -> None:
        """Begins to answer."""
        self.model, self.engine, self.started = model, engine, int(time.time())

    def parts(self) -> tuple[Model, Engine]:
        """Raises the 503 of a server that is loading or shutting down."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.model is None or self.engine is None:
            raise ApiError(503, "the model is loading", code="loading")
        return self.model, self.engine

    # ------------------------------------------------------------------ routes

    async def health(self, request: Request) -> Response:
        state = "stopping" if self.stopping else "ok" if self.engine is not None else "loading"
        retry = {} if state == "ok" else {"Retry-After": str(limits.RETRY_AFTER)}
        return JSONResponse({"status": state}, 200 if state == "ok" else 503, retry)

    async def models(self, request: Request) -> Response:
        model, _ = self.parts()
        wanted = request.path_params.get("name")
        prompts.check_name(wanted, model)
        card = _card(model, self.started)
        return JSONResponse({"object": "list", "data": [card]} if wanted is None else card)

    async def completions(self, request: Request) -> Response:
        model, engine = self.parts()
        asked = protocol.parse(await _body(request), CompletionRequest)
        wanted, opening = await run_in_threadpool(prompts.of_completion, asked, model)
        kind = Completion(model, logprobs=asked.logprobs is not None)
        return await _answer(request, engine, wanted, asked, kind, opening)

    async def chat(self, request: Request) -> Response:
        model, engine = self.parts()
        asked = protocol.parse(await _body(request), ChatRequest)
        wanted = await run_in_threadpool(prompts.of_chat, asked, model)
        return await _answer(request, engine, wanted, asked, Chat(model, logprobs=asked.logprobs), [""] * asked.n)

    async def embeddings(self, request: Request) -> Response:
        model, engine = self.parts()
        asked = protocol.parse(await _body(request), EmbeddingRequest)
        texts, cut = await run_in_threadpool(embeddings.read, asked, model)
        events = Answers(engine, [texts])
        return await _whole(request, events, embeddings.answer(events, texts, cut, asked, model))

    async def tokenize(self, request: Request) -> Response:
        model, _ = self.parts()
        asked = protocol.parse(await _body(request), TokenizeRequest)
        encode = model.continuation if asked.add_special_tokens else model.tokenizer.encode
        tokens = await run_in_threadpool(encode, asked.prompt)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": model.max_length})

    async def detokenize(self, request: Request) -> Response:
        model, _ = self.parts()
        asked = protocol.parse(await _body(request), DetokenizeRequest)
        prompts.check_ids(asked.tokens, model.runner.vocab_size, "tokens")
        return JSONResponse({"prompt": model.tokenizer.decode(asked.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(self.parts()[0].tokenizer_config)

    async def metrics(self, request: Request) -> Response:
        stats = self.parts()[1].stats()
        lines = [f"llmctl_sequences_{name} {getattr(stats, name)}" for name in ("active", "waiting")]
        ended = ("finished", "cancelled", "failed", "rejected")
        lines += [f"llmctl_requests_{name}_total {getattr(stats, name)}" for name in ended]
        lines += [f"llmctl_generated_tokens_total {stats.tokens}", ""]
        return PlainTextResponse("\n".join(lines), media_type="text/plain; version=0.0.4")


def application(service: Service, *, api_key: str = "", host: str = "127.0.0.1") -> ASGIApp:
    """The ASGI application; `host` is the address it is served on."""
    html, policy = _page()

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})

    routes = [
        Route("/", page),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/tokenizer_info", service.tokenizer_info),
    ]
    expected = (ApiError, HTTPException, QueueFull, Stopping, ClientDisconnect)
    handlers = {**dict.fromkeys(expected, _refuse), Exception: _refuse_bug}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), api_key=api_key, host=host)


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is known to be over the limit, or when it does not come."""
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdigit() else 0
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            if size <= limits.MAX_BODY_BYTES:
                size = 0
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limits.MAX_BODY_BYTES:
                        break
                    chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.BODY_SECONDS:.0f} s") from None
    if size > limits.MAX_BODY_BYTES:
        raise ApiError(413, f"the body is over the limit of {limits.MAX_BODY_BYTES:,} bytes", code="request_too_large")
    return b"".join(chunks)


# ---------------------------------------------------------------------- what comes back


async def _answer(
    request: Request, engine: Engine, wanted: list[Prompt], asked: Parameters, kind: Kind, opening: list[str]
) -> Response:
    """Queues the prompts, and answers at once or bit by bit; `opening` is the text each answer begins with."""
    usage = Usage(sum(len(prompt.ids) for prompt in wanted[:: asked.n]))
    events = Answers(engine, wanted)
    if asked.stream:
        return EventStream(events, _stream(events, asked, kind, usage, opening))
    return await _whole(request, events, _collect(events, kind, usage, opening))


async def _whole(request: Request, events: Answers, answer: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The answer, unless the client leaves before it is there: that ends the request in the engine."""
    with events:
        collecting = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await collecting) if collecting.done() else Response(status_code=GONE)
        except Exception as reason:
            raise _problem(reason) from reason
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, even before its first byte, so does the request in the engine."""

    def __init__(self, events: Answers, content: AsyncIterator[bytes]) -> None:
        # The second header: nginx passes each event on at once.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._events:
            await super().__call__(scope, receive, send)


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(events: Answers, kind: Kind, usage: Usage, opening: list[str]) -> dict[str, Any]:
    texts, finishes = list(opening), [""] * len(opening)
    tokens: list[list[Token]] = [[] for _ in opening]
    async for event in events:
        texts[event.index] += event.text
        tokens[event.index] += [*event.prompt, *event.tokens]
        finishes[event.index] = event.finish or ""
        usage.completion += len(event.tokens)
    choices = [
        kind.choice(index, text, kind.scores(index, drawn), finish)
        for index, (text, drawn, finish) in enumerate(zip(texts, tokens, finishes, strict=True))
    ]
    return kind.whole(choices, usage)


async def _stream(
    events: Answers, asked: Parameters, kind: Kind, usage: Usage, opening: list[str]
) -> AsyncIterator[bytes]:
    """The stream of events: role, deltas, the terminal chunk of each choice, usage if asked for, [DONE]."""
    options = asked.stream_options
    continuous = options is not None and options.continuous_usage_stats
    counted = options is not None and (options.include_usage or continuous)

    def chunk(choice: dict[str, Any]) -> bytes:
        return kind.chunk([choice], **({"usage": usage.body() if continuous else None} if counted else {}))

    try:
        pending = list(opening)
        for index in range(len(pending)):
            if (role := kind.opening(index)) is not None:
                yield chunk(role)
        async for event in events:
            usage.completion += len(event.tokens)
            text, pending[event.index] = pending[event.index] + event.text, ""
            scores = kind.scores(event.index, [*event.prompt, *event.tokens])
            if text or scores is not None:
                yield chunk(kind.delta(event.index, text, scores, None))
            if event.finish is not None:
                yield chunk(kind.delta(event.index, None, None, event.finish))
        if counted:
            yield kind.chunk([], usage=usage.body())
    except Exception as reason:
        yield answers.sse(_problem(reason).body())
    yield answers.DONE


# ---------------------------------------------------------------------- errors and page


def _problem(reason: Exception) -> ApiError:
    """What a client is told of an error; of one inside a request the engine has told the operator."""
    if isinstance(reason, ApiError):
        return reason
    if isinstance(reason, QueueFull):
        return ApiError(429, "the server is busy: its queue is full; come again", code="queue_full")
    if isinstance(reason, Stopping):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(reason, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(reason.status_code)
        return ApiError(reason.status_code, f"{reason.detail}; this server speaks OpenAI's API under /v1", code=code)
    what = reason.message if isinstance(reason, LlmctlError) else type(reason).__name__
    return ApiError(500, f"the model failed on this request ({what})", code="internal_error")


async def _refuse(request: Request, reason: Exception) -> Response:
    if isinstance(reason, ClientDisconnect):
        return Response(status_code=GONE)
    problem = _problem(reason)
    more = dict(reason.headers or {}) if isinstance(reason, HTTPException) else {}
    return JSONResponse(problem.body(), problem.status, {**problem.headers(), **more})


async def _refuse_bug(request: Request, reason: Exception) -> Response:
    """What nobody foresaw: the client gets its 500, the operator the reason."""
    console.warn(f"{request.method} {request.url.path}: {type(reason).__name__}: {reason}")
    console.debug("".join(traceback.format_exception(reason)))
    return await _refuse(request, reason)


def _card(model: Model, created: int) -> dict[str, Any]:
    """What /v1/models says of the model; `max_model_len` as vLLM has it, `kind` for the page."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "llmctl",
        "max_model_len": model.max_length,
        "kind": model.kind,
    }


def _page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and style, ask this server, and nothing else."""
    html = (resources.files("llmctl.serve") / "page" / "index.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
