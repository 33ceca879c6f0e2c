"""What a source names, which of its files count, and what they are worth as a digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmctl.errors import DataError
from llmctl.model import origin
from llmctl.text.sources import SourceFile
from tests import folders

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "hub" / "Tiny")


def test_paths_and_repositories(folder: Path, tmp_path: Path) -> None:
    assert origin.find("hub/Tiny", tmp_path).path == folder
    assert origin.find(str(folder), Path("/")).kind == "folder"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert (origin.find("x.gguf", tmp_path).kind, origin.find("x.gguf", tmp_path).path) == ("gguf", tmp_path / "x.gguf")
    found = origin.find("hf:org/name@refs/pr/1", tmp_path)
    assert (found.kind, found.repository, found.revision) == ("hub", "org/name", "refs/pr/1")
    assert origin.find("hf:gpt2", tmp_path).revision == "main"


def test_a_run_means_its_last_model(folder: Path, tmp_path: Path) -> None:
    for place in ("import", "pretrain"):
        made = folders.write(tmp_path / "runs" / "r" / place)
        (made / "artifact.json").write_text("{}")
        assert origin.find("runs/r", tmp_path).path == made
    (tmp_path / "runs/r/.old-pretrain").mkdir()
    assert origin.find("runs/r/import", tmp_path).path == tmp_path / "runs/r/import"


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("nothing", "no such folder or file", "name a model's folder or a .gguf file"),
        ("org/name", "no such folder or file", "from a hub: llmctl import hf:org/name"),
        ("hub", "holds no config.json", ""),
        ("README.md", "is neither a model's folder nor a .gguf file", ""),
        ("a\0b", "no such folder or file", ""),
        ("hf:", "names no repository", "hf:org/name@revision"),
        ("hf:../x", "names no repository", "hf:org/name@revision"),
        ("hf:a/../b", "names no repository", "hf:org/name@revision"),
        ("hf:a/b@../../x", "names no repository", "hf:org/name@revision"),
        ("hf:/etc", "names no repository", "hf:org/name@revision"),
        ("hf:a/b@x\0", "names no repository", "hf:org/name@revision"),
    ],
)
def test_what_is_no_model(folder: Path, tmp_path: Path, spec: str, message: str, hint: str) -> None:
    (tmp_path / "README.md").write_text("# text")
    with pytest.raises(DataError, match=message) as caught:
        origin.find(spec, tmp_path)
    assert hint in caught.value.hint


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in origin.files(folder)]


def test_the_files_that_count(folder: Path) -> None:
    for name in ("modules.json", "sentence_bert_config.json", "vocab.txt", "NOTICE"):
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for name in ("training_args.bin", "modeling_x.py", "optimizer.pt", "extra.safetensors", "special_tokens_map.json"):
        (folder / name).write_text("")
    expected = ["1_Pooling/config.json", "LICENSE", "NOTICE", "chat_template.jinja", "config.json"]
    expected += ["generation_config.json", "modules.json", "sentence_bert_config.json", "tokenizer.json"]
    assert names(folder) == sorted([*expected, "tokenizer_config.json", "vocab.txt"])
    assert origin.weights(folder) == [folder / "model.safetensors"]


def test_weights_in_shards_and_in_pickles(folder: Path) -> None:
    folders.shard(folder)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in origin.weights(folder)] == [*shards, "model.safetensors.index.json"]
    folders.pickle(folders.write(folder / "old"))
    assert [path.name for path in origin.weights(folder / "old")] == ["pytorch_model.bin"]
    assert not origin.has_safetensors(folder / "old")
    assert origin.has_safetensors(folder)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(DataError, match="is a link out of its folder") as caught:
        origin.files(folder)
    assert "cp -rL" in caught.value.hint
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert names(snapshot) == ["config.json"]
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(DataError, match="is a link out of its folder"):
        origin.files(snapshot)


def test_the_digest_is_of_contents(folder: Path, tmp_path: Path) -> None:
    first = {file.path: file.sha256 for file in origin.scan("hub/Tiny", tmp_path, {})}
    assert all(path.startswith("hub/Tiny/") for path in first)
    assert "hub/Tiny/model.safetensors" in first
    (folder / "README.md").write_text("another card")
    assert {file.path: file.sha256 for file in origin.scan("hub/Tiny", tmp_path, {})} == first
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    second = {file.path: file.sha256 for file in origin.scan("hub/Tiny", tmp_path, {})}
    assert [path for path in first if first[path] != second[path]] == ["hub/Tiny/chat_template.jinja"]


def test_what_has_not_changed_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    known = {file.path: file for file in origin.scan(str(folder), tmp_path, {})}
    path = str(folder / "model.safetensors")
    known[path] = SourceFile(path, known[path].bytes, known[path].mtime_ns, known[path].inode, "as it was")
    assert {file.path: file.sha256 for file in origin.scan(str(folder), tmp_path, known)}[path] == "as it was"


def test_a_repositorys_digest_is_its_commit(tmp_path: Path) -> None:
    (found,) = origin.scan(f"hf:org/name@{COMMIT}", tmp_path, {})
    assert found.sha256 == COMMIT
    with pytest.raises(DataError, match="names no commit"):
        origin.scan("hf:org/name@main", tmp_path, {})


def test_every_part_of_a_split_gguf_counts(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        (tmp_path / f"m-0000{part}-of-00003.gguf").write_bytes(b"GGUF" + bytes([part]))
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    found = origin.scan("m-00001-of-00003.gguf", tmp_path, {})
    assert [file.path for file in found] == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(DataError, match="the file is empty") as caught:
        origin.find("m.gguf", tmp_path)
    assert caught.value.hint == "copy it again"
