"""A warm llmctl: one process that has imported torch and every stage, and forks a child for each call.

A child runs the real command line (`llmctl.cli.main`) with its own arguments, folder, environment and files for its
output, a tenth of a second after it is asked for. `before` is Python that the child executes first: it breaks something
on cue. One CPU a child, so that results do not depend on what else the machine does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = (
    "llmctl.status",
    "llmctl.prep.stage",
    "llmctl.pretrain.stage",
    "llmctl.finetune.stage",
    "llmctl.eval.stage",
    "llmctl.importing.stage",
    "llmctl.serve.chat",
    "torch._dynamo",  # what optimisers import when they are first used
    "torch.distributed.fsdp",
    "jinja2.sandbox",
    "typer.rich_utils",
    "rich.table",
    "onnx",  # but not onnxruntime: it starts a thread, and a process with two must not fork
    "sentencepiece",
    "tokenizers",
)


@dataclass
class Done:
    """How a call ended; `code` is negative for a signal, as subprocess has it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


@dataclass
class Call:
    """A call that is under way."""

    warm: Warm
    pid: int
    out: Path
    err: Path

    def wait(self, timeout: float = 60) -> Done:
        status = self.warm.ask({"wait": self.pid, "timeout": timeout})
        assert status is not None, f"still running after {timeout} s: {self.out.read_text()}{self.err.read_text()}"
        return Done(os.waitstatus_to_exitcode(status), self.out.read_text(), self.err.read_text())

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def until(self, text: str, timeout: float = 60) -> None:
        """Waits until `text` stands in its output."""
        end = time.monotonic() + timeout
        while text not in self.said():
            assert time.monotonic() < end, f"no {text!r} in {self.said()}"
            time.sleep(0.01)

    def said(self) -> str:
        """All that it has written so far."""
        return "".join(path.read_text() for path in (self.out, self.err) if path.exists())


@dataclass
class Warm:
    """The client's side; a context that ends the server."""

    outputs: Path
    process: subprocess.Popen[str] = field(init=False)
    calls: int = 0

    def __enter__(self) -> Warm:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        environment = {key: value for key, value in environment.items() if key not in ("LLMCTL_RUN", "LLMCTL_API_KEY")}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *problem: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the warm llmctl has ended: {self.process.poll()}"
        return json.loads(answer)

    def start(self, *args: object, cwd: Path, before: str = "", env: dict[str, str] | None = None) -> Call:
        self.calls += 1
        out, err = self.outputs / f"{self.calls}.out", self.outputs / f"{self.calls}.err"
        question = {"args": [str(arg) for arg in args], "cwd": str(cwd), "env": env or {}, "before": before}
        return Call(self, self.ask(question | {"out": str(out), "err": str(err)}), out, err)

    def run(self, *args: object, cwd: Path, before: str = "", env: dict[str, str] | None = None) -> Done:
        return self.start(*args, cwd=cwd, before=before, env=env).wait()


# ------------------------------------------------------------------------------------------------------------- server


def _child(question: dict[str, Any]) -> None:
    """Becomes llmctl; never returns."""
    code = 99
    try:
        for name, number in (("out", 1), ("err", 2)):
            handle = os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(question["cwd"])
        os.environ.update(question["env"])
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})
        sys.argv = ["llmctl", *question["args"]]
        exec(compile(question["before"], "<before>", "exec"), {"__name__": "before"})
        from llmctl.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import importlib
    import warnings

    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    for name in MODULES:
        importlib.import_module(name)
    if (tasks := Path("/proc/self/task")).is_dir():
        assert len(list(tasks.iterdir())) == 1, "an import started a thread: forking could hang"
    open_: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "args" in question:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _child(question)
            open_.add(pid)
            answer: int | None = pid
        else:
            answer = _wait(question["wait"], question["timeout"])
            open_.discard(question["wait"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in open_:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait(pid: int, timeout: float) -> int | None:
    """Its exit status; None, and an end to it, when the time is over."""
    end, pause = time.monotonic() + timeout, 0.002
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _serve()
