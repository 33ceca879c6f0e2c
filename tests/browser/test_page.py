"""The chat page in a real browser: it talks, streams, stops, and asks nobody but its own server."""

from __future__ import annotations

import os
from pathlib import Path

from llmctl import device
from llmctl.serve.model import Model, load
from tests.browser.conftest import Browser
from tests.inference.encoders import write
from tests.serve.conftest import running, until, watched

ANSWERED = "document.querySelectorAll('article.assistant .note').length"
LAST = "[...document.querySelectorAll('article.assistant .text')].at(-1)?.textContent"


def keep(browser: Browser, name: str, tmp_path: Path) -> None:
    """A picture to look at: in LLMCTL_SCREENSHOTS where that is set."""
    folder = Path(os.environ.get("LLMCTL_SCREENSHOTS", tmp_path))
    browser.screenshot(folder / f"{name}.png")


def test_a_conversation(browser: Browser, chat_model: Model, tmp_path: Path) -> None:
    model, runner = watched(chat_model)
    with running(model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        keep(browser, "empty", tmp_path)
        browser.run("document.getElementById('temperature').value = 0")
        browser.type("What is the cat doing?")
        browser.press_enter()
        browser.until(f"{ANSWERED} === 1")
        assert browser.run(LAST) == "It sleeps on the mat."
        browser.type("你好")
        browser.click("send")
        browser.until(f"{ANSWERED} === 2")
        asked = browser.run("document.querySelectorAll('article.user')[1].textContent")
        assert asked == "你好"
        turns = browser.run("state.messages.map((message) => message.role).join()")
        assert turns == "user,assistant,user,assistant"
        second = max(runner.seen, key=len)  # the longest prompt holds the whole conversation
        assert model.tokenizer.decode(second).count("It sleeps on the mat.") == 1
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        browser.click("toggle")
        keep(browser, "dark", tmp_path)
        browser.click("fresh")
        assert browser.run("document.querySelectorAll('article').length") == 0
        assert all(address.startswith((server.url, "data:")) for address in browser.addresses()), browser.addresses()
        assert browser.complaints() == []


def test_stop_keeps_what_was_said_and_frees_the_slot(browser: Browser, chat_model: Model) -> None:
    model, runner = watched(chat_model, permits=4)
    with running(model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        browser.run("document.getElementById('temperature').value = 0")
        browser.type("What is the cat doing?")
        browser.press_enter()
        browser.until(f"({LAST} || '').length > 3")
        assert browser.run("document.getElementById('send').hidden && !document.getElementById('stop').hidden")
        browser.click("stop")
        browser.until(f"{ANSWERED} === 1")
        assert "It sleeps on the mat.".startswith(browser.run(LAST))
        assert "stopped" in browser.run("document.querySelector('.note').textContent")
        assert until(lambda: server.engine.stats().cancelled == 1)
        runner.release()
        assert server.settled()
        browser.type("Add?")
        browser.press_enter()
        browser.until(f"{ANSWERED} === 2")


def test_enter_in_an_input_method_sends_nothing(browser: Browser, chat_model: Model) -> None:
    with running(chat_model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        browser.call("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
        browser.press_enter(windowsVirtualKeyCode=229)
        assert browser.run("document.querySelectorAll('article').length") == 0


def test_text_is_text_and_code_is_in_a_box(browser: Browser, chat_model: Model) -> None:
    with running(chat_model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        hostile = "<img src=x onerror=alert(1)> &amp; ```python\\n<b>x</b>\\n``` end"
        browser.run(f"draw(article('assistant').querySelector('.text'), '{hostile}')")
        assert browser.run("document.querySelectorAll('article img, article b').length") == 0
        assert browser.run("document.querySelector('article pre').textContent") == "<b>x</b>"
        assert "<img src=x onerror=alert(1)> &amp; " in browser.run("document.querySelector('article').textContent")


def test_an_outgrown_context_forgets_the_oldest_and_says_so(browser: Browser, chat_model: Model) -> None:
    with running(chat_model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        browser.run("document.getElementById('temperature').value = 0")
        for turn in range(4):
            browser.type("What is the cat doing? " * 4)
            browser.press_enter()
            browser.until(f"{ANSWERED} === {turn + 1}")
        assert "no longer fit" in browser.run("document.getElementById('log').textContent")
        browser.type("x y z " * 300)
        browser.press_enter()
        assert "tokens" in browser.until("document.querySelector('.error')?.textContent")


def test_a_base_model_continues_and_says_what_it_is(browser: Browser, base_model: Model, tmp_path: Path) -> None:
    with running(base_model) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('kind').textContent.startsWith('base model')")
        assert "continues what you write" in browser.run("document.getElementById('empty').textContent")
        browser.run("document.getElementById('temperature').value = 0")
        browser.type("The cat sat")
        browser.press_enter()
        browser.until(f"{ANSWERED} === 1")
        assert browser.run(LAST) == " on the mat and looked at the moon. Then it slept until morning.\n"
        keep(browser, "base", tmp_path)


def test_a_sentence_encoder_says_what_it_is_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "tiny", "bert")
    with running(load(tmp_path / "tiny", device.pick("cpu"))) as server:
        browser.open(server.url + "/")
        browser.until("document.getElementById('kind').textContent.startsWith('sentence encoder')")
        assert "/v1/embeddings" in browser.run("document.getElementById('empty').textContent")
        assert browser.run("['form', 'fresh', 'toggle'].every((id) => document.getElementById(id).hidden)")
        assert browser.complaints() == []
        keep(browser, "encoder", tmp_path)


def test_the_page_behind_a_key(browser: Browser, chat_model: Model) -> None:
    with running(chat_model, api_key="sk-key") as server:
        browser.type_password("sk-key")
        browser.open(server.url + "/")
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
        browser.type("Add?")
        browser.press_enter()
        browser.until(f"{ANSWERED} === 1")
        assert "sk-key" not in " ".join(browser.addresses())


def test_the_page_waits_for_a_model_that_loads(browser: Browser, chat_model: Model) -> None:
    with running(chat_model) as server:
        model, server.service.model = server.service.model, None
        browser.open(server.url + "/")
        browser.until("document.getElementById('kind').textContent === 'loading'")
        server.service.model = model
        browser.until("document.getElementById('name').textContent === 'tiny-chat'")
