"""What the import contracts (`make check`) cannot see: who prints, what is never imported, how big a room gets."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmctl
from llmctl import chain

ROOT = Path(llmctl.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("name", TREES)
def test_only_the_console_prints(name: str) -> None:
    writes = {"print", "sys.stdout.write", "sys.stderr.write", "pprint.pprint", "typer.echo", "click.echo"}
    assert name == "console.py" or not writes & set(calls(TREES[name]))


@pytest.mark.parametrize("name", TREES)
def test_nothing_is_ever_unpickled(name: str) -> None:
    """Fault 13: weights are safetensors, everything else is text; one module reads a pickle's tensors when asked."""
    every = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    loads = [ast.unparse(node) for node in every if ast.unparse(node.func) == "torch.load"]
    assert not loads or name == "importing/pickled.py"
    assert all("weights_only=True" in call for call in loads)
    found = [word for node in ast.walk(TREES[name]) for word in imported(node)]
    assert not {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(found)
    assert not {"torch.save", "np.load", "numpy.load", "eval", "exec"} & set(calls(TREES[name]))
    assert "trust_remote_code" not in ast.unparse(TREES[name])


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


@pytest.mark.parametrize("name", TREES)
def test_what_is_public_is_explained(name: str) -> None:
    """Every module, and every public function that does not explain itself in a few lines."""
    tree = TREES[name]
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [node for node in functions if (node.end_lineno or 0) - node.lineno > 5 and not node.name.startswith("_")]
    assert ast.get_docstring(tree) or name.endswith("__init__.py")
    assert [node.name for node in long if not ast.get_docstring(node)] == []


def test_no_room_is_called_utils() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "helper", "common", "misc"}


# Past 400 lines a module wants a second look. These had one: every command, the chain's
# rules, the artifact with its run.
LONG = {"cli.py", "chain.py", "artifact.py"}


def test_rooms_stay_small() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {name for name, lines in sizes.items() if lines > 400} <= LONG


@pytest.mark.parametrize("name", chain.STAGES)
def test_a_stage_is_a_function_of_its_job(name: str) -> None:
    stage = chain.STAGES[name]
    module, _, function = stage.function.partition(":")
    made = getattr(importlib.import_module(module), function)
    signature = inspect.signature(made)
    assert list(signature.parameters) == ["job"]
    assert signature.return_annotation == ("Artifact | None" if stage.resumes else "Artifact")  # rank 0 publishes
    assert stage.version >= 1
