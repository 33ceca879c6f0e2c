"""Where text comes from: what is read, what is passed over, what is an error and how it reads."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import DataError
from llmctl.text import sources
from llmctl.text.sources import Document, Tally, documents, is_held_out, scan


def read(spec: str, root: Path, **options: object) -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(documents(spec, root, tally=tally, **options)), tally  # type: ignore[arg-type]


def texts(spec: str, root: Path) -> list[str]:
    return [document.text for document in read(spec, root)[0]]


def test_a_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "Grüße\r\n你好\n".encode())
    [document], tally = read("a.txt", tmp_path)
    assert document.text == "Grüße\r\n你好\n"
    assert document.origin == "a.txt"
    assert tally.bytes == len("Grüße\r\n你好\n".encode())


def test_a_folder_is_walked_in_order_without_hidden_files_and_caches(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.md", "a/b.txt", ".git/config", "__pycache__/x.txt", ".hidden", "node_modules/x.js"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts("data", tmp_path) == ["a/b.txt", "a/z.md", "b.py"]
    assert texts("data/**/*.md", tmp_path) == ["a/z.md"]
    assert [file.path for file in scan("data", tmp_path)] == ["data/a/b.txt", "data/a/z.md", "data/b.py"]


def test_links_that_loop_or_lead_nowhere_end(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("text")
    (folder / "inner" / "up").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(folder / "pipe")
    assert texts("data", tmp_path) == ["text"]


def test_what_is_no_text_is_passed_over_in_a_folder_and_counted_by_type(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "figures.jsonl").write_text('{"loss": 1.5}\n')
    found, tally = read(".", tmp_path)
    assert [document.text for document in found] == ["text"]
    assert tally.passed_over == {
        ".txt (not UTF-8)": 2,
        ".png": 1,
        "other (binary)": 1,
        ".md (empty)": 1,
        ".jsonl (no text in it)": 1,
    }


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.txt", b"one\ntwo\nthr\xe9e\n", 3, "not UTF-8: byte 0xe9 at offset 11"),
        ("a.txt", b"one\n\0two", 2, "a NUL at byte 4"),
        ("a.txt", "text".encode("utf-16"), None, "UTF-16 text; UTF-8 is expected"),
        ("a.txt", b"cut \xe4\xbd", 1, "not UTF-8: byte 0xe4 at offset 4"),
        ("a.txt", b"", None, "the file is empty"),
        ("a.pdf", b"%PDF", None, ".pdf files are not read as text"),
        ("a.jsonl", b"", None, "no text in it"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', 2, "not JSON (Expecting value"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n', 2, "not UTF-8: byte 0xe9 at offset 10 of the line"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', 3, "no text under 'text'; the line's keys are body"),
        ("a.jsonl", b'{"n": 1}\n', 1, "no key that holds text; the line's keys are n"),
        ("a.jsonl", b"[" * 100_000, 1, "not JSON (nested too deep"),
    ],
)
def test_a_file_named_by_itself_must_be_readable(
    tmp_path: Path, name: str, content: bytes, line: int | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(name, tmp_path)
    assert message in caught.value.message
    assert (caught.value.file, caught.value.line) == (name, line)
    assert caught.value.hint


def test_the_offset_of_a_bad_byte_is_right_across_blocks(tmp_path: Path) -> None:
    # The block read at a time is a megabyte: a character lies across its end, the bad byte beyond it.
    content = b"a" * ((1 << 20) - 1) + "é".encode() + b"\n" + b"b\xff"
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match="byte 0xff at offset 1,048,579") as caught:
        read("a.txt", tmp_path)
    assert content[1_048_579] == 0xFF
    assert caught.value.line == 2


def test_missing_sources_are_named_with_a_mend(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such file") as caught:
        scan("note.txt", tmp_path)
    assert "did you mean" in caught.value.hint
    assert "notes.txt" in caught.value.hint
    for spec, message in (
        ("empty", "holds no files"),
        ("*.md", "no file matches"),
        ("builtin:novels", "no such built-in"),
    ):
        for reading in (lambda spec=spec: scan(spec, tmp_path), lambda spec=spec: texts(spec, tmp_path)):
            with pytest.raises(DataError, match=message):
                reading()


def test_jsonl_is_a_document_a_line_and_its_key_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"id": "x", "content": "one"}\n\n{"content": "two\\u0000\\ud800"}\n')
    found, tally = read("a.jsonl", tmp_path)
    assert [(document.text, document.origin) for document in found] == [
        ("one", "a.jsonl:1"),
        ("two\0\ufffd", "a.jsonl:3"),
    ]
    assert tally.text_keys == {"a.jsonl": "content"}
    lines = ['{"title": "short", "story": "a longer text of some words"}', '"a bare string"', '{"title": "no story"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="no text under 'story'; the line's keys are title"):
        read("b.jsonl", tmp_path)
    found, tally = read("b.jsonl", tmp_path, on_error="skip")
    assert [document.text for document in found] == ["a longer text of some words", "a bare string"]
    assert (tally.text_keys, tally.bad_lines) == ({"b.jsonl": "story"}, 1)


def test_skipping_stops_at_a_tenth_of_the_lines(tmp_path: Path) -> None:
    good, bad = '{"text": "fine"}\n', "no json\n"
    (tmp_path / "a.jsonl").write_text(good * 180 + bad * 20)
    found, tally = read("a.jsonl", tmp_path, on_error="skip")
    assert (len(found), tally.bad_lines) == (180, 20)
    (tmp_path / "b.jsonl").write_text(good * 179 + bad * 21)
    with pytest.raises(DataError, match=r"21 of 200 lines can't be used \(first: line 180"):
        read("b.jsonl", tmp_path, on_error="skip")


def test_html_is_stripped(tmp_path: Path) -> None:
    page = """<html><head><title>A &amp; B</title><style>p { color: red }</style></head><body>
      <script>if (1 < 2) alert("<p>no</p>")</script><h1>Head</h1><p>One   <b>two</b>
      three&nbsp;&eacute;.<br>Four</p><pre>  x\n    y</pre><ul><li>a<li>b</ul></body></html>"""
    (tmp_path / "a.html").write_text(page)
    assert texts("a.html", tmp_path) == ["A & B\n\nHead\n\nOne two three é.\nFour\n\n  x\n    y\n\na\nb\n"]


def test_a_long_line_streams_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 1000)
    text = "x" * 2500 + "\n" + "é" * 300 + "\n" + "y" * 800
    (tmp_path / "a.txt").write_text(text)
    found = texts("a.txt", tmp_path)
    assert "".join(found) == text
    assert max(map(len, found)) <= 1000
    assert found[2] == "x" * 500 + "\n" + "é" * 300 + "\n"  # cut after a newline where there is one


def test_a_line_of_a_hundred_megabytes_takes_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("w") as stream:
        for _ in range(100):
            stream.write("0123456789" * 100_000)
    program = """
import resource, sys
from pathlib import Path
from llmctl.text.sources import Tally, documents
resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)
print(sum(len(found.text) for found in documents("a.txt", Path(sys.argv[1]), tally=Tally())))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "100000000", done.stderr


def test_scan_reads_again_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    first = scan(".", tmp_path)
    known = {file.path: file for file in first}
    opened: list[str] = []
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *rest, **more: (opened.append(self.name), original(self, *rest, **more))[1]
    )
    assert scan(".", tmp_path, known) == first
    assert opened == []
    (tmp_path / "b.txt").write_text("other")
    second = scan(".", tmp_path, known)
    assert [name for name in opened if name == "b.txt"]
    assert "a.txt" not in opened
    assert second[0] == first[0]
    assert second[1].sha256 != first[1].sha256


def test_the_split_is_a_stable_hash() -> None:
    held = [number for number in range(10_000) if is_held_out(Document(f"document {number}", ""), 6.0)]
    assert held[:5] == [21, 22, 55, 59, 75]  # for ever: finetune and eval of old artifacts depend on it
    assert 520 < len(held) < 680
    assert is_held_out(Document("other text", "", key="document 21"), 6.0)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_text_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.txt", "a.jsonl"):
        (folder / name).write_bytes(content)
        try:
            for text in texts(name, folder):
                text.encode()
        except DataError as problem:
            assert problem.file  # noqa: PT017
            assert problem.hint  # noqa: PT017


def test_importing_sources_stays_light() -> None:
    heavy = ("torch", "numpy", "onnx", "pydantic", "rich", "tokenizers")
    program = f"import sys, llmctl.text.conversations; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
