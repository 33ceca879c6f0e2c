"""The pages are true: the tutorial runs, links lead somewhere, commands parse, recipes are recipes, and what a page
says of exit codes, limits and the artifact is what the code does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from llmctl import cli, errors, recipe
from llmctl.serve import limits

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
WRITTEN = [page for page in PAGES if not page.read_text().splitlines()[2].startswith("*Generated")]
TUTORIAL = ROOT / "docs" / "tutorial.md"
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PICTURES = {"docs/report.png"}  # taken of a finished run of recipes/small.toml


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line of text


def blocks(page: Path, *languages: str) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(match[2], match[3], text.count("\n", 0, match.start(3)) + 1))
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# -------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What GitHub names the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        there = file.exists() or str(file.relative_to(ROOT)) in PICTURES
        if not there or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {str(page.relative_to(ROOT)) for page in PAGES} - linked - {"README.md"} == set()


# ----------------------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every llmctl command of a page, with its line: in blocks that a shell reads, and in code within the prose."""
    for block in blocks(page, "bash", "console"):
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines(), block.line):
            if "llmctl " not in line or (block.language == "console" and not line.startswith("$ ")):
                continue
            for words in split(line.removeprefix("$ ")):
                yield number, words
    for number, line in enumerate(prose(page).splitlines(), 1):
        for code in re.findall(r"`(llmctl [^`]+)`", line):
            for words in split(code):
                yield number, words


def split(line: str) -> Iterator[list[str]]:
    """The llmctl commands of a shell line, pipes and lists taken apart; without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            while words and re.match(r"[A-Z_]+=", words[0]):  # variables before the command
                del words[0]
            if words and words[0] == "llmctl":
                yield words[1:]
            words = []
        elif set(word) <= set("<>"):
            words = [*(words[:-1] if words and words[-1].isdigit() else words), word]
        elif words and set(words[-1]) <= set("<>"):
            words.pop()  # a redirection and its file
        else:
            words.append(word)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    for number, words in commands(page):
        if not words or words[0].startswith("-"):
            continue
        where = f"{page.name}:{number}: llmctl {' '.join(words)}"
        assert words[0] in group.commands, where
        with contextlib.suppress(SystemExit):  # --help
            try:
                group.commands[words[0]].make_context(words[0], list(words[1:]))
            except Exception as problem:
                pytest.fail(f"{where}: {problem}")


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_are_recipes(page: Path, tmp_path: Path) -> None:
    """A snippet is read on top of recipes/tiny.toml: it need not be whole."""
    for block in blocks(page, "toml"):
        path = tmp_path / "snippet.toml"
        based = block.text if block.text.startswith("base") else f'base = "{ROOT}/recipes/tiny.toml"\n{block.text}'
        path.write_text(based, encoding="utf-8")
        try:
            recipe.load(path)
        except errors.RecipeError as problem:
            pytest.fail(f"{page.name}:{block.line}: {problem}")


def test_the_tutorials_recipe_is_whole(tmp_path: Path) -> None:
    written = re.findall(r"cat > mine.toml <<'END'\n(.*?)^END$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(written[0])
    recipe.load(tmp_path / "mine.toml")


# ------------------------------------------------------------------------------------------------- what the code says


@pytest.mark.parametrize("page", NAMES)
def test_code_that_a_page_quotes_is_the_code(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for file, quoted in re.findall(r"<!-- source: (\S+) -->\n```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert quoted in (ROOT / file).read_text(encoding="utf-8"), f"{page} quotes {file} as it was"


def test_every_family_is_told() -> None:
    from llmctl.model.families import FAMILIES

    told = re.findall(
        r"^\| `([\w-]+)` \| ([\w-]+) \| ([\w-]+) \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE
    )
    assert sorted(told) == sorted((name, family.model_type, family.kind) for name, family in FAMILIES.items())


def test_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_exit_codes_are_all_told(page: str) -> None:
    told = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", (ROOT / page).read_text(), re.M) for code in row.split(",")
    }
    raised = {kind.exit_code for kind in errors.LlmctlError.__subclasses__() if kind is not errors.Interrupted}
    assert told == raised | {0, 1, errors.BUG, 130, 143}


def test_the_servers_limits_are_told() -> None:
    told = (ROOT / "docs" / "security.md").read_text()
    row = next(line for line in told.replace("\n  ", " ").splitlines() if line.startswith("- **Limits**"))
    figures = {int(figure.replace(",", "")) for figure in re.findall(r"\b\d[\d,]*\b", row)}
    wanted = {value for name, value in vars(limits).items() if name.startswith(("MAX_", "SLOTS", "BODY_S", "HEADER_S"))}
    assert {int(value) for value in wanted} - {limits.MAX_BODY_BYTES} | {limits.MAX_BODY_BYTES >> 20} <= figures


def test_both_readmes_say_the_same() -> None:
    english, chinese = (
        [re.sub(r" +# .*", "", block.text) for block in blocks(ROOT / name)]
        for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese  # comments apart
    first, second = (re.findall(r"\]\(([^)\s]+)\)", prose(ROOT / name)) for name in ("README.md", "README.zh-CN.md"))
    assert first[1:] == second[1:]  # the first link of each leads to the other


# ------------------------------------------------------------------------------------------------------- the tutorial


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its bash blocks, in order, in one shell; then artifact.md's reader on everything they made."""
    script = "set -euo pipefail\n" + "\n".join(block.text for block in blocks(TUTORIAL, "bash"))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LLMCTL_", "GITHUB_", "OPENAI_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**clean, "PATH": path}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing to do." in done.stdout
    assert "required <1" in done.stderr
    assert "exit code 5" in done.stdout
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()

    reader: dict[str, Any] = {}
    exec(blocks(ROOT / "docs" / "artifact.md", "python")[0].text, reader)
    made = sorted((tmp_path / "runs" / "mine").glob("**/artifact.json"))
    assert len(made) == 6
    for manifest in made:
        reader["check"](manifest.parent)
