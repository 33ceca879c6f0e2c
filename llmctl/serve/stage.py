"""`llmctl serve`: a model behind HTTP until a signal comes, or for as long as a command runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmctl import console
from llmctl.artifact import Artifact
from llmctl.device import Device
from llmctl.errors import RunError, UsageError
from llmctl.inference.engine import Engine
from llmctl.inference.runners import TorchRunner
from llmctl.serve import api, limits
from llmctl.serve import model as models
from llmctl.serve.guard import is_loopback

if TYPE_CHECKING:
    from llmctl.recipe import ServeSection


def serve(
    artifact: Artifact, settings: ServeSection, device: Device, *, name: str = "", command: str | None = None
) -> int:
    """Serves an exported or trained model, and returns the exit code.

    Without a `command` it serves until SIGTERM or Ctrl-C, lets the answers that have begun end, and returns 0. With
    one, it runs it in a shell as soon as the model answers, with OPENAI_BASE_URL and OPENAI_API_KEY set, and returns
    its code.

    Raises:
        UsageError: the port is taken, or the address is not this machine's.
    """
    listener = listen(settings.host, settings.port)
    base = url(settings.host, listener.getsockname()[1])
    service = api.Service()
    if not settings.api_key and not is_loopback(settings.host):
        console.warn(f"{settings.host} is open to the network and no key is asked: set --api-key or LLMCTL_API_KEY")
    with Server(api.application(service, api_key=settings.api_key, host=settings.host), listener) as server:
        model = models.load(
            artifact.path,
            device,
            name=settings.served_model_name or name,
            runtime=settings.runtime,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
        )
        engine = Engine(model.runner, model.tokenizer, slots=limits.SLOTS, max_waiting=limits.MAX_WAITING)
        with signals() as stop:
            service.ready(model, engine)
            if isinstance(model.runner, TorchRunner):
                console.note(f"torch computes in {model.runner.dtype}: {device.dtype(settings.dtype)[1]} (serve.dtype)")
            announce(model, device, base, bool(settings.api_key))
            code = run(command, base, settings.api_key, stop) if command else wait(stop, server)
            service.stopping = True
            server.stop_listening()
            if (running := engine.stats().active) and not command:
                console.say(f"stopping; {running} answers may take {limits.DRAIN_SECONDS:.0f} s more (Ctrl-C: at once)")
            engine.close(0.0 if command else limits.DRAIN_SECONDS)
    return code


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is known before the model is loaded.

    Raises:
        UsageError: naming the port or the address, and the mend.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as reason:
        raise UsageError(f"--host {host}: {reason.strerror}", hint="127.0.0.1 is this machine alone") from None
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # a server that has just stopped leaves no port behind
    try:
        listener.bind(address)
        listener.listen(limits.MAX_CONNECTIONS)
    except OSError as reason:
        listener.close()
        hint = "--port 0 takes a free one; so does `port = 0` under [serve]"
        raise UsageError(f"can't listen on {host} port {port}: {reason.strerror}", hint=hint) from None
    return listener


def url(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104
    return f"http://{everywhere.get(host, f'[{host}]' if ':' in host else host)}:{port}"


def announce(model: models.Model, device: Device, base: str, key: bool) -> None:
    """Says where it is and what it is."""
    kinds = {
        "chat": "tokens of context · chat model",
        "base": "tokens of context · base model: it continues text (no chat)",
        "embedding": "tokens a text · sentence encoder: vectors at /v1/embeddings",
    }
    console.say(f"{model.name} · {model.runtime}, {device.describe()} · {model.max_length:,} {kinds[model.kind]}")
    console.say(f"   {base}/     the page" + ("; it asks for a password: the API key (any user name)" if key else ""))
    console.say(f"   {base}/v1   OpenAI's API, model {model.name!r}" + ("; the API key is needed" if key else ""))
    console.event("ready", url=base, model=model.name)


def wait(stop: threading.Event, server: Server) -> int:
    """Until a signal comes."""
    while not stop.wait(0.5):
        if not server.alive():
            raise RunError("the HTTP server has ended by itself", hint="run again with -v and report it")
    return 0


def run(command: str, base: str, api_key: str, stop: threading.Event) -> int:
    """Runs the command of `--exec` and returns its exit code, as a shell would say it."""
    # A key that clients insist on having; never the user's own OpenAI key, which is not ours to receive.
    environment = {**os.environ, "OPENAI_BASE_URL": f"{base}/v1", "OPENAI_API_KEY": api_key or "none"}
    process = subprocess.Popen(command, shell=True, env=environment)  # noqa: S602
    told = False
    while True:
        try:
            code = process.wait(0.2)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if stop.is_set() and not told:  # of a Ctrl-C the command knows by itself
                process.terminate()
                told = True


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets. A Ctrl-C after it quits at once."""
    stop = threading.Event()

    def asked(signum: int, frame: FrameType | None) -> None:
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {signum: signal.signal(signum, asked) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Server:
    """uvicorn on a socket of ours, in a thread: /health answers while the model loads, and signals stay ours."""

    def __init__(self, application: ASGIApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            application,
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # errors become answers, and console lines of ours
            access_log=False,
            server_header=False,
            limit_concurrency=limits.MAX_CONNECTIONS,
            timeout_keep_alive=limits.KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=2,  # the engine has drained by then
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="llmctl-http", daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._server.force_exit = kind is not None
        self._thread.join(5.0)
        self._listener.close()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop_listening(self) -> None:
        """Accepts nothing more; connections that are open get their answers."""
        self._server.should_exit = True


class Connection(H11Protocol):  # type: ignore[misc]
    """uvicorn's connection, closed if its first request does not come: idle sockets must not use up the connections."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(limits.HEADER_SECONDS, self._expect_request)

    def _expect_request(self) -> None:
        if self.cycle is None:
            self.transport.close()
