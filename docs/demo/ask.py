"""Asks the server at OPENAI_BASE_URL what some held-out functions do, and shows several models' answers side by side.

Usage: ask.py NAME EVAL_FOLDER ANSWERS.jsonl     asks, and adds the answers to the file
       ask.py --show ANSWERS.jsonl               shows them
"""

import json
import os
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

QUESTIONS = 3


def call(path: str, body: dict | None = None) -> dict:
    """GET without a body, POST with one."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{os.environ['OPENAI_BASE_URL']}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def answer(question: str) -> str:
    """What the model says: by chat, or for a base model, which can't chat, by going on where the question ends."""
    common = {"model": call("/models")["data"][0]["id"], "max_tokens": 48, "temperature": 0}
    try:
        choice = call("/chat/completions", {**common, "messages": [{"role": "user", "content": question}]})["choices"][
            0
        ]
        return choice["message"]["content"]
    except urllib.error.HTTPError as refused:
        if refused.code != 400:
            raise
    return call("/completions", {**common, "prompt": f"{question}\n"})["choices"][0]["text"]


def ask(name: str, evaluations: Path, answers: Path) -> None:
    """Adds this model's answers to the file."""
    samples = [json.loads(line) for path in sorted(evaluations.glob("*/samples.jsonl")) for line in path.open()]
    asked = [sample for sample in samples if sample["model"] == samples[-1]["model"]]
    if not asked:  # no conversations: a base model goes on with the beginnings that pretraining sampled from
        rows = [json.loads(line) for line in (evaluations.parent / "pretrain" / "samples.jsonl").open()]
        asked = [{"prompt": prompt, "reference": ""} for prompt in dict.fromkeys(row["prompt"] for row in rows)]
    with answers.open("a") as stream:
        by_length = sorted(asked, key=lambda sample: len(sample["prompt"]))
        for sample in by_length[len(by_length) // 3 :][:QUESTIONS]:  # neither one-liners nor pages
            said = {"model": name, "question": sample["prompt"], "reference": sample["reference"]}
            stream.write(json.dumps({**said, "answer": answer(sample["prompt"])}) + "\n")


def show(answers: Path) -> None:
    """A question, then a line a model."""
    rows = [json.loads(line) for line in answers.open()]
    width = max(len(row["model"]) for row in rows)
    for question in dict.fromkeys(row["question"] for row in rows):
        print("\n" + textwrap.indent(question, "  "))
        same = [row for row in rows if row["question"] == question]
        reference = [("its docstring", same[0]["reference"])] * bool(same[0]["reference"])
        for name, text in [*((row["model"], row["answer"]) for row in same), *reference]:
            print(f"  {name:<{width}}  {' '.join(text.split())[:110] or '(nothing)'}")


if __name__ == "__main__":
    show(Path(sys.argv[2])) if sys.argv[1] == "--show" else ask(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
