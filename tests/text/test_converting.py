"""Folders without a tokenizer.json: SentencePiece's own ids, transformers' ids for vocab.json and vocab.txt."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llmctl.errors import DataError
from llmctl.text import converting
from llmctl.text.tokenizer import Tokenizer
from tests.text import kinds
from tests.text.kinds import TEXTS, chinese, english


def trained(**options: Any) -> bytes:
    """A SentencePiece model as other projects train them."""
    written = io.BytesIO()
    lines = [line for text in [*english(), *chinese()] for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=900, minloglevel=2, num_threads=1, **options
    )
    return written.getvalue()


LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True}
LLAMA |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}


@pytest.mark.parametrize(
    ("options", "begins", "ends"),
    [
        (LLAMA, "<s>", None),  # Llama 2
        ({**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<start_of_turn>"]}, "<s>", None),  # Gemma
        ({"model_type": "unigram", "pad_id": 3, "character_coverage": 0.9995}, None, "</s>"),  # T5
        ({"model_type": "unigram", "byte_fallback": True, "pad_id": 3}, None, "</s>"),
    ],
)
def test_a_sentencepiece_model_keeps_its_ids(
    options: dict[str, Any], begins: str | None, ends: str | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer.load(tmp_path)
    texts = [*TEXTS, *english()[:60], *chinese(), " x", "a <s> b"]
    for text in texts:
        assert ours.encode(text) == reference.encode(text), text
        if ours.unk_id not in ours.encode(text):
            assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text))
    assert (ours.begin_id is not None, ours.encode_for_model("x")[0][-1] == ours.eos_id) == (
        begins == "<s>",
        bool(ends),
    )
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert theirs.encode(text, split_special_tokens=True) == ours.encode_for_model(text)[0]


def test_t5_has_its_sentinels_behind_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(model_type="unigram", pad_id=3))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    ours = Tokenizer.load(tmp_path)
    assert len(ours) == 1000
    assert (ours.special("<extra_id_99>"), ours.special("<extra_id_0>")) == (900, 999)
    assert ours.special_ids.isdisjoint(ours.encode("<extra_id_0></s>")) or ours.unk_id is not None
    assert 999 not in ours.encode("a <extra_id_0> b")


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "qwen2"])
def test_vocab_and_merges_give_transformers_ids(kind: str, tmp_path: Path) -> None:
    theirs = kinds.KINDS[kind]()
    theirs.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert ours.encode_for_model(text)[0] == theirs(text)["input_ids"]
    assert ours.encode_for_model("a", "b")[0] == theirs("a", "b")["input_ids"]
    assert ours.encode_with_specials("a <mask> b <|im_end|>") == theirs.encode(
        "a <mask> b <|im_end|>", add_special_tokens=False
    )
    assert ours.eos_id == theirs.eos_token_id
    ours.save(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_list_of_words_gives_transformers_ids(lowercase: bool, tmp_path: Path) -> None:
    theirs = kinds.bert(lowercase)
    words = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    ours = Tokenizer.load(tmp_path)
    for text in TEXTS:
        expected = theirs(text, "second")
        assert ours.encode_for_model(text, "second") == (expected["input_ids"], expected["token_type_ids"])
    assert (ours.begin_id, ours.end_id, ours.pad_id) == (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id)


def test_folders_that_can_not_be_converted_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"lacks \[UNK\]"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match=r"not the merges of vocab\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_stories260k_reads_its_own_pieces(shared_data: Path, tmp_path: Path) -> None:
    """llama2.c keeps pieces and scores in a form of its own; its ids are written down in golden.json."""
    folder = shared_data / "models" / "stories260K"
    listed = json.loads((folder / "hf" / "tok512.json").read_text())
    golden = json.loads((folder / "golden.json").read_text())
    types = [converting.UNKNOWN, converting.CONTROL, converting.CONTROL] + [converting.BYTE] * 256
    types += [converting.NORMAL] * (len(listed["pieces"]) - len(types))
    texts = [text.replace("\n<s>\n", "<s>").replace(" ", "\u2581") for text in listed["pieces"]]
    made = converting.sentencepiece_bpe(map(converting.Piece, texts, listed["scores"], types), dummy_prefix=True)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    for sentence in golden["sentences"]:
        assert [1, *ours.encode(sentence["text"])] == sentence["ids"]
    assert ours.decode(golden["greedy_from_bos_256"]) == golden["greedy_text"]
