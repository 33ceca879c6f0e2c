"""The real openai client, and httpx where the bytes matter, against a server on a real socket."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI
from tests.serve.conftest import Running


@pytest.fixture()
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=30)


def test_chat_answers_what_was_learned(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-chat", messages=[{"role": "user", "content": "What is the cat doing?"}], temperature=0
    )
    assert answer.choices[0].message.content == "It sleeps on the mat."
    assert answer.choices[0].finish_reason == "stop"
