"""`llmctl init FOLDER`: looks at text and writes a short, commented recipe for it.

What it finds (types, scripts, bytes, chats, the device) decides the vocabulary, the model's size and the passes over
the text. The rules are rough and each stands beside its line in the recipe: the recipe is a beginning to edit.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from llmctl import console, device, recipe
from llmctl.device import Device
from llmctl.errors import DataError, UsageError
from llmctl.text import conversations, sources

SAMPLE = 1 << 16  # characters of each file that its scripts are judged by
BYTES_A_TOKEN = {
    "Han": 2.2,
    "Kana": 2.2,
    "Hangul": 2.2,
}  # 3.3 for the others; measured with vocabularies of 4,096 and 8,192
TOKENS = {"cpu": 3e6, "cuda": 1e9}  # that a first run should see: some minutes on two cores, an hour on a GPU
SCRIPTS = (  # first code point, last, name
    (0x0041, 0x024F, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x077F, "Arabic"),
    (0x0900, 0x0DFF, "Indic"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x3040, 0x30FF, "Kana"),
    (0x3400, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"),
    (0x20000, 0x3FFFF, "Han"),
)


@dataclass
class Survey:
    """What a folder holds."""

    text: Counter[str] = field(default_factory=Counter)  # suffix -> bytes
    files: Counter[str] = field(default_factory=Counter)  # suffix -> files
    passed_over: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)  # script -> letters of the samples
    keys: Counter[str] = field(default_factory=Counter)  # where JSONL files have their text
    chats: list[Path] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.text.total()

    @property
    def scripts(self) -> dict[str, float]:
        """The share of each script's letters, the largest first; below a hundredth they are left out."""
        total = max(1, self.letters.total())
        return {name: count / total for name, count in self.letters.most_common() if count >= total / 100}

    @property
    def tokens(self) -> float:
        """About how many tokens the text is."""
        per_token = sum(share * BYTES_A_TOKEN.get(name, 3.3) for name, share in self.scripts.items()) or 3.3
        return self.bytes / per_token


def init(folder: Path, out: Path | None = None, *, force: bool = False) -> Path:
    """Writes a recipe for the text in `folder` (or for one file) and says what it found; returns the recipe's path.

    Raises:
        UsageError: the recipe is there already, and `force` is false.
        DataError: no text in the folder.
    """
    folder = folder.absolute()
    name = recipe.default_name(Path(folder.name))
    out = (out or Path(f"{name}.toml")).absolute()
    if out.exists() and not force:
        raise UsageError(
            "the recipe is there already", file=out, hint="add --rebuild to write it anew, or name another with --out"
        )
    found, where = survey(folder), device.pick()
    console.say(
        f"{folder} · {console.size(found.bytes)} of text in {found.files.total():,} files · {where.describe()}",
        style="bold",
    )
    console.columns(
        [[suffix, f"{found.files[suffix]:,} files", console.size(size)] for suffix, size in found.text.most_common(8)]
    )
    console.say(" letters: " + " · ".join(f"{script} {100 * share:.0f} %" for script, share in found.scripts.items()))
    for path in found.chats:
        console.say(f" chats: {path.relative_to(folder) if path != folder else path.name}")
    if found.passed_over:
        console.say(
            " passed over: " + " · ".join(f"{kind} {count:,}" for kind, count in found.passed_over.most_common())
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(compose(folder, found, where, out), encoding="utf-8")
    recipe.load(out)
    shown = os.path.relpath(out)
    console.say(
        f"wrote {shown}.   Next:  " + (f"llmctl prep {shown} --preview 5" if found.text else f"set `from` in {shown}")
    )
    console.say(f"{'':{len(shown) + 9}}       llmctl run {shown}")
    return out


def survey(folder: Path) -> Survey:
    """Reads the beginning of each file below `folder`.

    Raises:
        DataError: missing, or without any text.
    """
    found = Survey()
    for path in sources.resolve(str(folder), Path()):
        suffix = path.suffix.lower() or path.name
        problem = sources.unreadable_as_text(path, str(path))
        if problem is not None:
            found.passed_over[sources.kind_of(path, problem)] += 1
            continue
        if suffix in conversations.SUFFIXES and _holds_chats(path):
            found.chats.append(path)
            continue
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            sample = stream.read(SAMPLE)
        if suffix in sources.JSONL:
            found.keys[_text_key(sample)] += 1
        found.files[suffix] += 1
        found.text[suffix] += path.stat().st_size
        weight = path.stat().st_size / max(1, len(sample.encode()))  # a sample speaks for its whole file
        for char, count in Counter(sample).items():
            found.letters[script(char)] += round(count * weight)
    del found.letters[""]
    if not found.text and not found.chats:
        raise DataError(
            "no text in it", file=folder, hint="name a folder or file with text: .txt .md .html .jsonl, source code"
        )
    return found


def script(char: str) -> str:
    """The script of a letter; "" for what is no letter."""
    code = ord(char)
    if code < 128:
        return "Latin" if char.isalpha() else ""
    if not unicodedata.category(char).startswith("L"):
        return ""
    return next((name for first, last, name in SCRIPTS if first <= code <= last), "other")


def _holds_chats(path: Path) -> bool:
    """Whether the first record of a JSON file is a conversation."""
    try:
        first = next(iter(conversations.conversations(str(path), Path(), on_error="stop")))
    except DataError:
        return False
    return bool(first.messages)


def _text_key(sample: str) -> str:
    line = next((line for line in sample.splitlines() if line.strip()), "")
    try:
        record = json.loads(line)
    except ValueError:
        return ""
    return sources.guess_key(record) if isinstance(record, dict) else ""


# ------------------------------------------------------------------------------------------------------- the recipe


def compose(folder: Path, found: Survey, where: Device, out: Path) -> str:
    """The recipe's text; paths in it are relative to `out`."""
    text = _sources(folder, found, out)
    chats = [_relative(path, out) for path in found.chats]
    depth, length = (4 if found.bytes < 3e6 else 6, 512) if where.kind == "cpu" else (12, 1024)
    parts = [
        f"# {console.size(found.bytes)} of text from {folder.name}; written by llmctl init, to be edited.",
        f"name = {_toml(recipe.default_name(out))}",
        "",
    ]
    if found.text:
        parts += ["[prep]", f"sources = {_toml(text)}"]
        keys = [key for key in found.keys if key]
        if len(keys) == 1 and keys[0] not in sources.TEXT_KEYS:
            parts += [_line(f"text_key = {_toml(keys[0])}", "where a line of JSONL has its text")]
        parts += ["", "[prep.tokenizer]", *_vocabulary(found), "", "[model]"]
        parts += [_line(f"depth = {depth}", f"layers; the width and all the rest follow from it ({where.describe()})")]
        parts += [_line(f"max_seq_length = {length}", "the longest text it sees at once, in tokens"), "", "[pretrain]"]
        parts += _passes(found, where)
    else:
        parts += [
            "[model]",
            _line('from = "FOLDER"', "a model to finetune: a Hugging Face folder or an artifact of llmctl"),
        ]
    parts += [""]
    if chats:
        parts += ["[finetune]", f"sources = {_toml(chats)}", ""]
    else:
        parts += [
            "# [finetune]",
            _line('# sources = ["chats.jsonl"]', 'lines of {"messages": [...]} teach it to answer'),
            "",
        ]
    return "\n".join([*parts, "[export]", _line('formats = ["onnx"]', "what llmctl serve runs"), ""])


def _sources(folder: Path, found: Survey, out: Path) -> list[str]:
    """The folder; or, where recipe and runs lie in it themselves, what is in it now. Chats are no text."""
    inside = out.parent == folder or out.parent.is_relative_to(folder)
    if not inside and not found.chats:
        return [_relative(folder, out)]
    if not folder.is_dir():
        return [_relative(folder, out)]
    names = sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in ("runs", out.name)
    )
    kept = [path for path in names if path not in found.chats and path.suffix.lower() not in sources.BINARY]
    return [_relative(path, out) for path in kept if path.is_file() or any(path.rglob("*"))]


def _vocabulary(found: Survey) -> list[str]:
    if found.bytes < 30_000:
        return [_line('type = "byte"', "so little text makes no vocabulary of words")]
    size = 1024 if found.bytes < 1e6 else 4096 if found.bytes < 5e7 else 16_384 if found.bytes < 1e9 else 32_768
    wide = sum(found.scripts.get(name, 0.0) for name in ("Han", "Kana", "Hangul")) > 0.2
    why = "pieces in all: a small model wants few" + (", a script of thousands of characters more" if wide else "")
    return [_line(f"vocab_size = {2 * size if wide else size}", why)]


def _passes(found: Survey, where: Device) -> list[str]:
    """Epochs until the model has seen as many tokens as a first run should, ten at most."""
    epochs = min(10.0, TOKENS[where.kind] / max(1.0, found.tokens))
    shown = f"{epochs:.0f}.0" if epochs >= 2 else "1.0" if epochs >= 0.8 else f"{max(0.01, epochs):.2f}"
    why = "some minutes on two cores; more learns more" if where.kind == "cpu" else "raise it while validation falls"
    lines = [_line(f"epochs = {shown}", f"over about {console.count(found.tokens)} tokens: {why}")]
    if epochs > 3:
        lines.append(_line("weight_decay = 0.2", "text seen often is soon known by heart"))
    return lines


def _line(text: str, comment: str) -> str:
    return f"{text:<40} # {comment}"


def _relative(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path, out.parent)).as_posix()


def _toml(value: str | list[str]) -> str:
    """A string or a list of strings in TOML; its basic strings are JSON's, but for DEL."""
    return re.sub("\x7f", r"\\u007F", json.dumps(value, ensure_ascii=False))
