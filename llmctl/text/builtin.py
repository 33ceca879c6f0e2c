"""The texts every machine has: the running Python's own library, and questions and answers made from its docstrings.

`builtin:python-stdlib`      each module's source (without tests, generated codec tables and what the build wrote),
                             and each topic of Python's help (`pydoc_data.topics`), one document each
`builtin:python-docstrings`  pairs from the same modules: a function's source without its docstring and the question
                             what it does, answered by the docstring's first sentence. The answer is grounded in the
                             question, so that a small model can learn to give it

Both carry the module's name as their key, so the split holds the same modules out of both. Standard library only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmctl.errors import DataError

PREFIX = "builtin:"
STDLIB, DOCSTRINGS = "builtin:python-stdlib", "builtin:python-docstrings"
NAMES = (STDLIB, DOCSTRINGS)
TOPICS = "pydoc_data/topics.py"

QUESTION = "What does this function do?"
MAX_SOURCE = 1_200  # characters: with its answer within 512 tokens of a vocabulary of 4,096
MAX_ANSWER = 200  # characters
MIN_WORDS = 3

_NOT_OURS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "sitecustomize", "usercustomize")


def files(spec: str) -> list[Path]:
    """The files behind a built-in source, sorted by module.

    Raises:
        DataError: an unknown name, or a Python without the source of its library.
    """
    if spec not in NAMES:
        raise DataError("no such built-in source", file=spec, hint=f"there are {' and '.join(NAMES)}")
    found = list(_modules())
    if not found:
        raise DataError(
            f"this Python has no source of its library in {_folder()}",
            file=spec,
            hint="name files of your own, or use another Python",
        )
    return found


def shown(spec: str, path: Path) -> str:
    """`builtin:python-stdlib/asyncio/tasks.py`: the same on every machine."""
    return f"{spec}/{path.relative_to(_folder()).as_posix()}"


def texts(spec: str) -> Iterator[tuple[str, str, str]]:
    """(text, origin, key) of each document of a built-in source."""
    if spec == DOCSTRINGS:
        for question, answer, origin, key in pairs():
            yield f"{question}\n\n{answer}\n", origin, key
        return
    for path in files(spec):
        name = path.relative_to(_folder()).as_posix()
        if name == TOPICS:
            for topic, text in _topics(path):
                yield text, f"{shown(spec, path)}#{topic}", f"pydoc_data.topics.{topic}"
        else:
            yield _source(path), shown(spec, path), _module(path)


def pairs() -> Iterator[tuple[str, str, str, str]]:
    """(question, answer, origin, key) for each documented function whose source is short enough to show."""
    seen: set[str] = set()
    for path in files(DOCSTRINGS):
        if path.relative_to(_folder()).as_posix() == TOPICS:
            continue
        source = _source(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function, answer = _without_docstring(node, lines), first_sentence(ast.get_docstring(node) or "")
                if function and answer and function not in seen:
                    seen.add(function)
                    yield f"{QUESTION}\n\n{function}", answer, f"{shown(DOCSTRINGS, path)}:{node.lineno}", _module(path)


def first_sentence(docstring: str) -> str:
    """A docstring's first sentence on one line, ending with a period; "" where there is no plain sentence."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    found = re.match(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?])(?=\s|$)", paragraph)
    sentence = found[1] if found else paragraph
    if sentence[-1:] not in (".", "!", "?"):
        sentence = sentence.rstrip(" ,;") + "."
    plain = (
        sentence[:1].isalpha()
        and sentence.count("(") == sentence.count(")")
        and not re.search(r"->|>>>|^[\w.]+\(|[:{}|]\.$", sentence)
    )
    return sentence if plain and len(sentence.split()) >= MIN_WORDS and len(sentence) <= MAX_ANSWER else ""


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """A function's source less its docstring, dedented; "" where there is none, too much, or nothing left."""
    docstring, body = node.body[0], node.body[1:]
    if ast.get_docstring(node, clean=False) is None or not body or _trivial(body):
        return ""
    if (
        docstring.end_lineno is None
        or node.end_lineno is None
        or docstring.lineno == node.lineno
        or body[0].lineno <= docstring.end_lineno
    ):
        return ""  # the docstring shares a line with code
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    source = textwrap.dedent("".join(kept)).strip()
    return source if len(source) <= MAX_SOURCE else ""


def _trivial(body: list[ast.stmt]) -> bool:
    """Whether a body says nothing: `pass`, `...` or one `raise`."""
    only = body[0]
    return len(body) == 1 and (
        isinstance(only, ast.Pass | ast.Raise) or (isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant))
    )


@functools.cache
def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[Path]:
    """The library's own modules: no tests, nothing installed or written by the build, no codec tables."""
    folder = _folder()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        parts = path.relative_to(folder).parts
        if (
            _NOT_OURS.isdisjoint(parts)
            and not parts[0].startswith("config-")
            and not path.name.startswith(_WRITTEN_BY_THE_BUILD)
        ):
            if parts[0] == "encodings" and _is_table(path):
                continue
            yield path


def _is_table(path: Path) -> bool:
    """Whether a codec is a generated character map (gencodec.py)."""
    source = path.read_bytes()
    return b"decoding_table" in source or b"decoding_map" in source


def _module(path: Path) -> str:
    """`asyncio.tasks` for asyncio/tasks.py; a package's `__init__` is the package."""
    parts = path.relative_to(_folder()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _source(path: Path) -> str:
    """A module's text: its coding line honoured, newlines as \\n."""
    return importlib.util.decode_source(path.read_bytes())


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """Python's help topics, out of the dictionary that the file assigns."""
    for node in ast.parse(_source(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())
