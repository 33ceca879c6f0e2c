"""`serve` as a process: its signals, its port, `--exec`; and loading a folder."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmctl import device
from llmctl.artifact import Artifact
from llmctl.errors import DataError, UsageError
from llmctl.recipe import ServeSection
from llmctl.serve import stage
from llmctl.serve.model import load
from tests.serve.conftest import CONTEXT

# What the command line does with its arguments, without the artifact's manifest.
PROGRAM = """
import sys, json
from pathlib import Path
from llmctl import device
from llmctl.artifact import Artifact
from llmctl.artifact import Artifact
from llmctl.recipe import ServeSection
from llmctl.serve import stage
settings = ServeSection(**json.loads(sys.argv[2]))
sys.exit(stage.serve(Artifact(Path(sys.argv[1]), {}), settings, device.pick("cpu"), name="tiny"))
"""


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process that answers, and its address."""
    arguments = [sys.executable, "-c", PROGRAM, str(folder), json.dumps({"port": 0, **settings})]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while (found := re.search(r"(http://[^/\s]+)/v1", said)) is None:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def here(folder: Path, command: str, **settings: Any) -> int:
    """`serve` in this process."""
    section = ServeSection(**{"port": 0, **settings})
    return stage.serve(Artifact(folder, {}), section, device.pick("cpu"), name="tiny", command=command)


def test_exec_sets_the_environment_and_returns_the_commands_code(folders: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import openai, os, sys\n"
        "answer = openai.OpenAI().chat.completions.create(model='tiny', temperature=0,\n"
        "    messages=[{'role': 'user', 'content': 'What is the cat doing?'}])\n"
        "open('said', 'w').write(answer.choices[0].message.content + os.environ['OPENAI_API_KEY'])\n"
        "sys.exit(7)\n"
    )
    assert here(folders["chat"], f"cd {tmp_path}; {sys.executable} client.py", api_key="sk-secret") == 7
    assert (tmp_path / "said").read_text() == "It sleeps on the mat.sk-secret"


def test_exec_without_a_key_never_hands_on_the_users_own(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    assert here(folders["base"], 'test "$OPENAI_API_KEY" = none') == 0


def test_exec_is_told_of_a_signal(folders: dict[str, Path]) -> None:
    assert here(folders["base"], "kill -TERM $PPID; exec sleep 60") == 128 + signal.SIGTERM


def test_a_signal_in_mid_stream_lets_the_answer_end_and_exits_0(folders: dict[str, Path]) -> None:
    with serving(folders["chat"]) as (process, url):
        body = {"prompt": "def", "max_tokens": 240, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


def test_ctrl_c_stops_an_idle_server(folders: dict[str, Path]) -> None:
    with serving(folders["base"], served_model_name="mine") as (process, url), httpx.Client() as client:
        assert client.get(url + "/health").json() == {"status": "ok"}  # this connection stays open
        assert client.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_port_in_use_is_named_with_its_mend_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}: Address already in use") as problem:
            here(tmp_path / "no such model", "true", port=port)
    assert "--port 0" in problem.value.hint


def test_a_model_that_cannot_be_loaded_leaves_no_server(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(DataError):
        here(tmp_path, "true")
    assert threading.active_count() == before


def test_an_address_that_is_not_ours_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.1"):
        stage.listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match=r"no\.such\.host\.invalid"):
        stage.listen("no.such.host.invalid", 0)


def test_open_to_the_network_without_a_key_is_warned_about(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for key, warned in (("", True), ("k", False)):
        here(folders["base"], "true", host="0.0.0.0", api_key=key)
        assert ("LLMCTL_API_KEY" in "".join(capfd.readouterr())) == warned


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")]
)
def test_the_address_that_a_client_here_uses(host: str, shown: str) -> None:
    assert stage.url(host, 80) == f"http://{shown}:80"


def test_an_idle_connection_is_closed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from llmctl.serve import api, limits

    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.05)
    listener = stage.listen("127.0.0.1", 0)
    with (
        stage.Server(api.application(api.Service()), listener),
        socket.create_connection(listener.getsockname()) as slow,
    ):
        slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        slow.settimeout(20)
        assert slow.recv(1) == b""


def test_max_model_len_caps_the_context_and_may_not_exceed_it(folders: dict[str, Path]) -> None:
    cpu = device.pick("cpu")
    assert load(folders["base"], cpu, max_model_len=100).max_length == 100
    with pytest.raises(UsageError, match=f"1000.*{CONTEXT}"):
        load(folders["base"], cpu, max_model_len=1000)


def test_a_tokenizer_larger_than_the_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from llmctl.text import tokenizer as tokenizers

    shutil.copytree(folders["base"], tmp_path / "mixed")
    for file in (tmp_path / "mixed").glob("tokenizer*"):
        file.unlink()
    tokenizers.train(["".join(map(chr, range(0x4E00, 0x4F00)))], "char", 600).save(tmp_path / "mixed")
    with pytest.raises(DataError, match="don't belong together"):
        load(tmp_path / "mixed", device.pick("cpu"))
