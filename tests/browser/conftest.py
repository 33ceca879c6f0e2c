"""A real browser, driven over its DevTools pipe (no WebSocket, no driver to install)."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import base_model, chat_model, folders  # noqa: F401

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1000,760",
)
SECONDS = 60.0


class Browser:
    """One tab. Commands are the DevTools protocol's; `events` keeps what the tab reported."""

    def __init__(self, program: str, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        flags = " ".join([*FLAGS, f"--user-data-dir={profile}", "about:blank"])
        shell = f"exec {program} {flags} 3<&{read_there} 4>&{write_there}"  # the pipe is file descriptors 3 and 4
        self.process = subprocess.Popen(
            ["bash", "-c", shell],
            pass_fds=(read_there, write_there),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._in, self._out, self._rest = write_here, read_here, b""
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._in, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._out], [], [], SECONDS)[0], "the browser says nothing"
            data = os.read(self._out, 65536)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
            self._password(message)
        return message

    def _password(self, message: dict[str, Any]) -> None:
        """Types the password where one is set and asked for."""
        number = next(self._ids)
        session = {"sessionId": self._session} if self._session else {}
        if message["method"] == "Fetch.requestPaused":
            answer = {"method": "Fetch.continueRequest", "params": {"requestId": message["params"]["requestId"]}}
        elif message["method"] == "Fetch.authRequired":
            typed = {"response": "ProvideCredentials", "username": "me", "password": self.password}
            params = {"requestId": message["params"]["requestId"], "authChallengeResponse": typed}
            answer = {"method": "Fetch.continueWithAuth", "params": params}
        else:
            return
        os.write(self._in, json.dumps({"id": number, **answer, **session}).encode() + b"\0")

    def type_password(self, password: str) -> None:
        self.password = password
        self.call("Fetch.enable", handleAuthRequests=True)

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression, promises awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true, and gives its value."""
        deadline = time.monotonic() + SECONDS
        while not (value := self.run(f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()")):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        self.run("document.getElementById('input').focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self, **more: Any) -> None:
        for kind in ("rawKeyDown", "char", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **{**key, **more})

    def click(self, id: str) -> None:
        self.run(f"document.getElementById('{id}').click()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def addresses(self) -> set[str]:
        """Every address that the page asked for."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return {event["params"]["request"]["url"] for event in sent}

    def complaints(self) -> list[str]:
        """What the browser's console shows: errors of the script, violations of the policy."""
        entries = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        thrown = [event for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        return [entry["text"] for entry in entries if entry["level"] == "error"] + [str(event) for event in thrown]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    made = Browser(program, tmp_path / "profile")
    yield made
    made.process.terminate()
    made.process.wait(20)
    os.close(made._in)
    os.close(made._out)
