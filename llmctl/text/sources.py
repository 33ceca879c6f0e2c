"""Where text comes from: files, folders, globs and the texts built into Python; and which documents are held out.

Standard library only: `llmctl status` imports this to see whether a source has changed.

A spec is a file, a folder, a glob or a `builtin:` name, relative to the recipe. A file named by itself must be readable
UTF-8 text. In a folder or a glob, what can't be read as text is counted by type and passed over. A `.jsonl` holds one
document a line; every other file is one document (one every `MAX_DOCUMENT` characters, so that any size streams).
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmctl.errors import DataError
from llmctl.text import builtin
from llmctl.text.jsonl import SKIP_HINT, OnError, Skipper, records, valid
from llmctl.text.markup import text_of_html

MAX_DOCUMENT = 8 << 20  # characters; what a longer file holds becomes several documents

JSONL = frozenset({".jsonl", ".ndjson"})
HTML = frozenset({".html", ".htm", ".xhtml"})
TEXT_KEYS = ("text", "content", "body", "document", "article", "passage", "markdown", "code", "raw_content")
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})  # and every hidden one (.git, .venv)
# Never text: passed over in a folder without being opened. Whatever else is no UTF-8 is found out by reading it.
BINARY = frozenset(
    f".{suffix}"
    for suffixes in (
        "7z bz2 gz jar lz4 parquet rar tar tgz whl xz zip zst",
        "bmp doc docx eot gif ico jpeg jpg otf pdf png ppt pptx tif tiff ttf webp woff woff2 xls xlsx",
        "avi flac mkv mov mp3 mp4 ogg wav webm",
        "a bin class db dll dylib exe gguf iso mo npy npz o onnx pt pth pyc pyd safetensors so sqlite",
    )
    for suffix in suffixes.split()
)
COMPRESSED = frozenset({".7z", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"})


@dataclass(frozen=True, slots=True)
class Document:
    """One text as its source has it."""

    text: str
    origin: str  # the file as shown, with its line for JSONL
    key: str = ""  # what the split hashes; empty: the text itself. For the built-ins the module's name

    @property
    def split_key(self) -> str:
        return self.key or self.text


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file's contents and what tells cheaply that they have not changed (as git's index does)."""

    path: str  # relative to the recipe; absolute where the spec is; `builtin:` for the built-ins
    bytes: int
    mtime_ns: int
    inode: int
    sha256: str


@dataclass
class Tally:
    """What reading has met so far; the caller prints it."""

    files: int = 0
    documents: int = 0
    bytes: int = 0  # of the documents' text in UTF-8, before cleaning
    passed_over: Counter[str] = field(default_factory=Counter)  # ".png": 12, ".txt (not UTF-8)": 1
    bad_lines: int = 0  # JSONL lines left out by on_error = "skip"
    text_keys: dict[str, str] = field(default_factory=dict)  # file -> the key guessed for it

    def counted(self, document: Document) -> Document:
        self.documents += 1
        self.bytes += len(document.text.encode())
        return document


class Splittable(Protocol):
    """A document or a conversation."""

    @property
    def split_key(self) -> str: ...


def is_held_out(item: Splittable, percent: float) -> bool:
    """Whether a document (or conversation) belongs to the validation split: a hash of its key, the same everywhere."""
    first = hashlib.sha256(item.split_key.encode()).digest()[:8]
    return int.from_bytes(first, "big") / 2**64 * 100 < percent


# --------------------------------------------------------------------------------------------------------- which files


def resolve(spec: str, root: Path) -> list[Path]:
    """The files a spec names, in a fixed order.

    Raises:
        DataError: nothing there, no file in it, or an unknown `builtin:` name.
    """
    if spec.startswith(builtin.PREFIX):
        return builtin.files(spec)
    path = root / Path(spec).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        mode = 0
    if stat.S_ISDIR(mode):
        found, what = list(_walk(path, set())), "the folder holds no files"
    elif stat.S_ISREG(mode):
        found, what = [path], ""
    elif mode:
        raise DataError("neither a file nor a folder", file=spec, hint="name a file, a folder or a glob")
    elif glob.has_magic(spec):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
        found, what = [Path(match) for match in matches if Path(match).is_file()], "no file matches"
    else:
        raise DataError("no such file or folder", file=spec, hint=_nearest(path, root))
    if not found:
        raise DataError(what, file=spec, hint=f"paths are relative to the recipe, in {root}")
    return found


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The files below a folder, sorted by name; each folder once, however many links lead to it."""
    info = folder.stat()
    if (info.st_dev, info.st_ino) in seen:
        return
    seen.add((info.st_dev, info.st_ino))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError as reason:
        raise DataError(
            "the folder cannot be read (permission denied)", file=folder, hint=f"chmod u+rx '{folder}'"
        ) from reason
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        try:
            mode = entry.stat().st_mode
        except OSError:  # a broken or circular link
            continue
        if stat.S_ISDIR(mode) and entry.name not in SKIPPED_FOLDERS:
            yield from _walk(path, seen)
        elif stat.S_ISREG(mode):  # neither a socket nor a pipe
            yield path


def _nearest(path: Path, root: Path) -> str:
    import difflib

    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return (
        f"did you mean {path.parent / near[0]}?"
        if near
        else f"paths are relative to the recipe, in {root}; built in: {', '.join(builtin.NAMES)}"
    )


def shown_as(path: Path, spec: str, root: Path) -> str:
    """A file's path as people see it: absolute where the spec is, else relative to the recipe.

    The bytes of a name that is no UTF-8 become escapes: such a name can't be printed, nor written into a manifest.
    """
    if spec.startswith(builtin.PREFIX):
        return builtin.shown(spec, path)
    shown = path if Path(spec).expanduser().is_absolute() else os.path.relpath(path, root)
    return os.fsencode(shown).decode("utf-8", "backslashreplace")


def scan(spec: str, root: Path, known: Mapping[str, SourceFile] | None = None) -> list[SourceFile]:
    """The contents of a spec's files as digests. A file whose size, time and inode are in `known` is not read again.

    Raises:
        DataError: missing, empty or unreadable.
    """
    known, named = known or {}, is_named(spec, root)
    scanned: list[SourceFile] = []
    for path in resolve(spec, root):
        if not named and path.suffix.lower() in BINARY:
            continue  # never read, so that it can't change what is made
        shown = shown_as(path, spec, root)
        try:
            info = path.stat()
            old = known.get(shown)
            if old is None or (old.bytes, old.mtime_ns, old.inode) != (info.st_size, info.st_mtime_ns, info.st_ino):
                with path.open("rb") as stream:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                old = SourceFile(shown, info.st_size, info.st_mtime_ns, info.st_ino, sha256)
        except OSError as reason:
            if named:
                raise _unreadable(shown, reason) from reason
            continue
        scanned.append(old)
    if not any(file.bytes for file in scanned):
        raise _empty(spec, scanned)
    return scanned


def is_named(spec: str, root: Path) -> bool:
    """Whether the spec names one file, which then must be readable."""
    return not spec.startswith(builtin.PREFIX) and (root / Path(spec).expanduser()).is_file()


def _unreadable(shown: str, reason: OSError) -> DataError:
    return DataError(f"the file cannot be read ({reason.strerror})", file=shown, hint=f"chmod u+r '{shown}'")


def _empty(spec: str, files: list[SourceFile]) -> DataError:
    found = (
        "the file is empty"
        if len(files) == 1
        else f"all {len(files)} files are empty"
        if files
        else "no file in it is text"
    )
    return DataError(found, file=spec, hint="name a source with text in it")


# ---------------------------------------------------------------------------------------------------------- documents


def documents(
    spec: str, root: Path, *, text_key: str = "", on_error: OnError = "stop", tally: Tally
) -> Iterator[Document]:
    """The documents of a spec, one after the other, in a fixed order; `tally` counts what was met.

    Raises:
        DataError: missing or empty; a file named by itself that is no UTF-8 text; a JSONL line that can't be used (with
            `on_error` "stop", or more than a tenth of the file's lines).
    """
    if spec.startswith(builtin.PREFIX):
        for text, origin, key in builtin.texts(spec):
            yield tally.counted(Document(text, origin, key))
        return
    before, named = tally.documents, is_named(spec, root)
    for path in resolve(spec, root):
        shown = shown_as(path, spec, root)
        by_line = path.suffix.lower() in JSONL  # each of its lines is judged by itself
        problem = None if by_line else unreadable_as_text(path, shown)
        if problem is not None:
            if named:
                raise problem
            tally.passed_over[kind_of(path, problem)] += 1
            continue
        tally.files += 1
        if by_line:
            yield from _records(path, shown, text_key, on_error, named, tally)
        else:
            for text in _parts(path):
                yield tally.counted(Document(text, shown))
    if tally.documents == before:
        passed = ", ".join(f"{count} {kind}" for kind, count in tally.passed_over.most_common(5))
        raise DataError(
            "no text in it" + (f" (passed over: {passed})" if passed else ""),
            file=spec,
            hint="name a source with text in it",
        )


def kind_of(path: Path, problem: DataError) -> str:
    """The type under which a file that was passed over is counted."""
    suffix = path.suffix.lower()
    kind = suffix if 1 < len(suffix) <= 8 and suffix[1:].isalpha() else "other"
    return kind if suffix in BINARY else f"{kind} ({problem.code_word})" if isinstance(problem, _NotText) else kind


class _NotText(DataError):
    """A file that is no text, and in a word why."""

    def __init__(self, code_word: str, message: str, *, hint: str, file: str, line: int | None = None) -> None:
        super().__init__(message, hint=hint, file=file, line=line)
        self.code_word = code_word


def unreadable_as_text(path: Path, shown: str) -> DataError | None:
    """Why a file can't be read as UTF-8 text, as the error to raise; None where it can. Reads a megabyte at a time."""
    suffix = path.suffix.lower()
    if suffix in BINARY:
        mend = "unpack it first" if suffix in COMPRESSED else "convert it to .txt, .md or .jsonl first"
        return _NotText("binary", f"{suffix} files are not read as text", hint=mend, file=shown)
    decoder, offset, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    try:
        with path.open("rb") as stream:
            while True:
                chunk = stream.read(1 << 20)
                if offset == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    hint = f"iconv -f UTF-16 -t UTF-8 '{shown}' > utf8.txt"
                    return _NotText("not UTF-8", "UTF-16 text; UTF-8 is expected", hint=hint, file=shown)
                nul = chunk.find(b"\0")
                if nul >= 0:
                    line += chunk.count(b"\n", 0, nul)
                    hint = "binary files are not read; if it is text, remove the NUL bytes: tr -d '\\000'"
                    return _NotText(
                        "binary", f"a NUL at byte {offset + nul:,}: this is no text", hint=hint, file=shown, line=line
                    )
                held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as reason:
                    at = reason.start - held
                    line += chunk.count(b"\n", 0, max(0, at))
                    found = reason.object[reason.start]
                    message = f"not UTF-8: byte 0x{found:02x} at offset {offset + at:,}"
                    hint = f"convert it: iconv -f LATIN1 -t UTF-8 '{shown}' > utf8.txt   (or GB18030, CP1252 ...)"
                    return _NotText("not UTF-8", message, hint=hint, file=shown, line=line)
                if not chunk:
                    return (
                        _NotText("empty", "the file is empty", hint="name a source with text in it", file=shown)
                        if offset == 0
                        else None
                    )
                offset += len(chunk)
                line += chunk.count(b"\n")
    except OSError as reason:
        return _unreadable(shown, reason)


def _parts(path: Path) -> Iterator[str]:
    """A text file in parts of at most `MAX_DOCUMENT` characters, cut after a newline where there is one."""
    html = path.suffix.lower() in HTML
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rest = ""
        while True:
            block = stream.read(MAX_DOCUMENT - len(rest))
            text = rest + block
            if not text:
                return
            cut = len(text) if not block or len(text) < MAX_DOCUMENT else (text.rfind("\n") + 1 or len(text))
            part, rest = text[:cut], text[cut:]
            yield text_of_html(part) if html else part


# -------------------------------------------------------------------------------------------------------------- JSONL


def _records(path: Path, shown: str, text_key: str, on_error: OnError, named: bool, tally: Tally) -> Iterator[Document]:
    skipper, key = Skipper(on_error, shown), text_key
    for number, record in records(path, shown, skipper):
        if not key and isinstance(record, dict):
            key = guess_key(record)
            if not key and not named:
                tally.passed_over[".jsonl (no text in it)"] += 1
                return
            if key:
                tally.text_keys[shown] = key
        try:
            text = _text_of(record, key, shown, number)
        except DataError as problem:
            skipper.take(problem)
            continue
        yield tally.counted(Document(text, f"{shown}:{number}"))
    tally.bad_lines += skipper.bad


def guess_key(record: Mapping[str, Any]) -> str:
    """The key that holds a record's text: a usual name, else the longest string; "" where there is none."""
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str):
            return key
    strings = {key: value for key, value in record.items() if isinstance(value, str) and len(value) >= 20}
    return max(strings, key=lambda key: len(strings[key]), default="")


def _text_of(record: Any, key: str, shown: str, number: int) -> str:
    text = record.get(key) if isinstance(record, dict) and key else record
    if isinstance(text, str):
        return valid(text)
    keys = (
        f"the line's keys are {', '.join(map(str, record))}"
        if isinstance(record, dict)
        else f"the line is a {type(record).__name__}"
    )
    wanted = f"no text under {key!r}" if key else "no key that holds text"
    chat = isinstance(record, dict) and not {"messages", "conversations", "prompt", "instruction"}.isdisjoint(record)
    hint = (
        "chats go under [finetune] sources"
        if chat
        else f"set [prep] text_key to the key that holds the text, or: {SKIP_HINT}"
    )
    raise DataError(f"{wanted}; {keys}", file=shown, line=number, hint=hint)
