"""Asks the server at OPENAI_BASE_URL one question and fails unless it answers. Standard library only."""

import json
import os
import urllib.request

base, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]


def call(path: str, body: dict | None = None) -> dict:
    """GET without a body, POST with one."""
    request = urllib.request.Request(
        f"{base}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


model = call("/models")["data"][0]["id"]
question = [{"role": "user", "content": "What does this function do?\n\ndef add(a, b):\n    return a + b"}]
choice = call("/chat/completions", {"model": model, "messages": question, "max_tokens": 32, "temperature": 0})[
    "choices"
][0]
print(f"{model} answered ({choice['finish_reason']}): {choice['message']['content']!r}")
