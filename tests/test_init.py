"""`llmctl init`: the recipe it writes fits the folder, and is one that every stage accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl import init as room
from llmctl import recipe
from llmctl.device import Device
from llmctl.errors import DataError, UsageError

CPU = Device("cpu", "test", 2, frozenset())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room.device, "pick", lambda: CPU)


def test_a_folder_of_prose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "my notes"
    notes.mkdir()
    (notes / "a.md").write_text("Words, many words, in a note. " * 20_000)
    (notes / "b.txt").write_text("слово " * 5_000)
    (notes / "c.png").write_bytes(b"\x89PNG")
    out = room.init(notes)
    made = recipe.load(out)
    assert out == tmp_path / "my-notes.toml"
    assert made.name == "my-notes"
    assert made.section("prep").sources == ("my notes",)
    assert made.section("prep").tokenizer.vocab_size == 1024
    assert made.section("model").depth == 4
    assert made.section("pretrain").epochs == 10
    assert (made.finetune, made.section("export").formats) == (None, ("onnx",))
    printed = capsys.readouterr().out
    assert "Latin 94 % · Cyrillic 6 %" in printed
    assert "passed over: .png 1" in printed
    assert "llmctl run my-notes.toml" in printed


def test_an_existing_recipe_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "a.toml").write_text("mine")
    with pytest.raises(UsageError, match="there already"):
        room.init(tmp_path / "a.txt")
    assert (tmp_path / "a.toml").read_text() == "mine"
    room.init(tmp_path / "a.txt", force=True)
    made = recipe.load(tmp_path / "a.toml")
    assert made.section("prep").sources == ("a.txt",)
    assert made.section("prep").tokenizer.type == "byte"


def test_chats_go_to_finetuning_and_an_unusual_key_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (data / "stories.jsonl").write_text(json.dumps({"tale": "Once upon a time there was a story."}) + "\n")
    made = recipe.load(room.init(data, tmp_path / "sub" / "x.toml"))
    assert made.section("finetune").sources == ("../data/chats.jsonl",)
    assert made.section("prep").sources == ("../data/stories.jsonl",)
    assert made.section("prep").text_key == "tale"
    only = recipe.load(room.init(data / "chats.jsonl"))
    assert only.prep is None
    assert only.section("finetune").sources == ("data/chats.jsonl",)


def test_a_recipe_inside_its_folder_reads_neither_itself_nor_its_runs(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text " * 100)
    (tmp_path / "b.txt").write_text("text " * 100)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "log.txt").write_text("log")
    made = recipe.load(room.init(tmp_path))
    assert made.section("prep").sources == ("b.txt", "docs")


def test_chinese_gets_a_larger_vocabulary(shared_data: Path) -> None:
    made = recipe.load(room.init(shared_data / "zh" / "classical"))
    assert made.section("prep").tokenizer.vocab_size == 8192
    found = room.survey(shared_data / "zh" / "classical")
    assert found.scripts["Han"] > 0.95
    assert 1.5 < found.bytes / found.tokens < 3


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no text in it"):
        room.init(tmp_path / "data")
    with pytest.raises(DataError, match="no such file"):
        room.init(tmp_path / "missing")
    assert not list(tmp_path.glob("*.toml"))
