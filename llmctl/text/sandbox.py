"""Renders chat templates, which are programs that strangers wrote: in Jinja's sandbox, in a process that can be ended.

Jinja's sandbox keeps a template from reaching Python; it bounds neither time nor memory (`'a' * 10**9`, nested loops).
So a foreign template runs in a child process under limits of CPU time and memory that the kernel keeps, one child for
all renderings: a JSON line in, a JSON line out, well under a millisecond. llmctl's own template runs in this process.

This file is also the child's program, so it imports the standard library and Jinja only. A template finds what
transformers gives it (utils/chat_template_utils.py).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from typing import IO, Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS = 2.0  # for one rendering; a real template takes milliseconds
MEMORY = 512 << 20  # bytes of address space of the child
OUTPUT = 8 << 20  # characters
WALL_SECONDS = 60.0  # only so that nothing hangs for ever where the kernel's CPU clock is no help


class RenderError(Exception):
    """A template that failed, was refused, or went beyond its limits."""


def render(source: str, context: dict[str, Any]) -> str:
    """A template's text, rendered in this process: for templates that are trusted.

    Raises:
        RenderError: what Jinja or the template itself complains of.
    """
    try:
        text = _compiled(source).render(context)
    except MemoryError:
        raise RenderError("it wants too much memory") from None
    except Exception as reason:  # a template can raise anything
        kind = "" if isinstance(reason, TemplateError) else f"{type(reason).__name__}: "
        raise RenderError(f"{kind}{reason}") from None
    if len(text) > OUTPUT:
        raise RenderError(f"it makes {len(text):,} characters; {OUTPUT:,} is the limit")
    return text


def render_apart(source: str, context: dict[str, Any]) -> str:
    """The same in the child process, with its limits.

    Raises:
        RenderError: as above, and for a template that takes too much time or memory.
    """
    with _lock:
        if _child.process is None or _child.process.poll() is not None:
            _child.start()
        answer = _child.ask(json.dumps({"source": source, "context": context}))
    if "error" in answer:
        raise RenderError(answer["error"])
    return str(answer["text"])


# ------------------------------------------------------------------------------------------------------ the environment


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for transformers; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> Any:
        return caller()


class _Namespace(Namespace):
    """A namespace without names that reach into Python. `self` may be one of its names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"names with a leading underscore are not allowed: {name!r}")


class _Dict:
    """`dict(...)` without the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


# ---------------------------------------------------------------------------------------------------------- the child


class _Child:
    """The process that renders; started when first needed, again after a template has ended it, gone with this one."""

    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.stop()
        # -P: this file's folder has modules with names of their own (tokenizer, chat) that must not shadow others'
        command = [sys.executable, "-P", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def ask(self, line: str) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            reply = _read_line(process.stdout, time.monotonic() + WALL_SECONDS)
        except OSError:
            reply = b""
        if not reply.endswith(b"\n"):
            self.stop()
            return {"error": f"it takes more than {CPU_SECONDS:g} s, or too much memory"}
        answer: dict[str, Any] = json.loads(reply)
        return answer


_child, _lock = _Child(), threading.Lock()
atexit.register(_child.stop)


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    """A line from a pipe; cut short where the writer is gone or the time is over."""
    reply = b""
    while not reply.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        part = stream.read1(1 << 20) if ready else b""  # type: ignore[attr-defined]  # a BufferedReader
        if not part:
            break
        reply += part
    return reply


def _serve() -> None:
    """The child's loop: it ends when its parent is gone, and the kernel ends it when a rendering takes too long."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system limits the address space
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF at its end: the default action ends the process
        request = json.loads(line)
        try:
            answer = {"text": render(request["source"], request["context"])}
        except RenderError as reason:
            answer = {"error": str(reason)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
