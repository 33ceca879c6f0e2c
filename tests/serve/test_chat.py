"""The terminal chat: one shot by argument and by pipe, and a conversation on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl import device
from llmctl.artifact import Artifact
from llmctl.errors import UsageError
from llmctl.serve.chat import chat

PROGRAM = """
import sys
from pathlib import Path
from llmctl import console, device
from llmctl.artifact import Artifact
from llmctl.serve.chat import chat
console.configure(to_stderr=True)
sys.exit(chat(Artifact(Path(sys.argv[1]), {}), device.pick("cpu"), temperature=0, max_tokens=int(sys.argv[2])))
"""


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, {})


def test_one_shot_prints_the_answer_alone(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    code = chat(artifact(folders["chat"]), device.pick("cpu"), prompt="What is the cat doing?", temperature=0)
    assert code == 0
    assert capfd.readouterr().out == "It sleeps on the mat.\n"


def test_a_pipe_is_one_question(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folders["chat"]), "50"]
    done = subprocess.run(command, input="What is the cat doing?", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "It sleeps on the mat.\n")
    assert done.stderr == ""


def test_a_base_model_completes_and_says_so_on_stderr(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folders["base"]), "100"]
    done = subprocess.run(command, input="The cat sat", capture_output=True, text=True, timeout=60)
    assert (
        "The cat sat" + done.stdout == "The cat sat on the mat and looked at the moon. Then it slept until morning.\n"
    )
    assert "base model" in done.stderr


def test_a_question_longer_than_the_context_names_both_numbers(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"[\d,]+ tokens.* 256"):
        chat(artifact(folders["chat"]), device.pick("cpu"), prompt="x y z " * 200)
    with pytest.raises(UsageError, match="no question"):
        chat(artifact(folders["chat"]), device.pick("cpu"), prompt=" ")


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, folder: Path, max_tokens: int = 50) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(folder), str(max_tokens)])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str) -> str:
        """Reads until `pattern` comes; gives what came up to its end."""
        deadline = time.monotonic() + 60
        while (found := re.search(pattern, self.seen)) is None:
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], (
                f"no {pattern!r} in {self.seen!r}"
            )
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError as end:
                raise AssertionError(f"it ended with {self.seen!r}") from end
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def leave(self) -> int:
        """Ctrl-D; the exit code."""
        self.type("\x04")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation(folders: dict[str, Path]) -> None:
    terminal = Terminal(folders["chat"])
    terminal.expect("Ctrl-D leaves")
    terminal.expect("> ")
    terminal.type("What is the cat doing?\n")
    terminal.expect(r"It sleeps on the mat\.\r\n")
    terminal.expect("> ")
    terminal.type("/new\n")
    terminal.expect("a new conversation")
    terminal.expect("> ")
    terminal.type("你好\n")
    terminal.expect("你好，世界。\r\n")
    for _ in range(4):  # more than the context holds
        terminal.expect("> ")
        terminal.type("What is the cat doing? " * 4 + "\n")
    terminal.expect("no longer fit")
    terminal.expect("> ")
    assert terminal.leave() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(folders: dict[str, Path]) -> None:
    slow = PROGRAM.replace("console.configure", _SLOW + "\nconsole.configure")
    terminal = Terminal.__new__(Terminal)
    terminal.seen = ""
    terminal.pid, terminal.fd = pty.fork()
    if not terminal.pid:
        os.execv(sys.executable, [sys.executable, "-c", slow, str(folders["chat"]), "200"])
    terminal.expect("> ")
    terminal.type("What is the cat doing?\n")
    terminal.expect("It")
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect("> ")
    assert terminal.leave() == 0


# Every token takes its time, so that there is an answer to stop.
_SLOW = """
import time
from llmctl.inference.runners import TorchRunner
forward = TorchRunner.forward
def slowly(self, *args, **more):
    time.sleep(0.3)
    return forward(self, *args, **more)
TorchRunner.forward = slowly
"""
