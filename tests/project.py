"""A small project as a user has one: a recipe, a folder of real text, a file of chats; and llmctl run inside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm import Call, Done, Warm

# The whole chain in four seconds: real text, a real vocabulary, every stage.
RECIPE = """\
name = "t"
seed = 3

[prep]
sources = ["text"]

[prep.tokenizer]
vocab_size = 400

[model]
depth = 1
max_seq_length = 64

[pretrain]
max_steps = 12
global_batch_size = 4
dtype = "fp32"
compile = false
eval_every = 0
save_every = 3
log_every = 1

[finetune]
sources = ["chats.jsonl"]
max_steps = 6
global_batch_size = 4
dtype = "fp32"
compile = false
eval_every = 0
save_every = 2
log_every = 1

[eval]
max_examples = 4
max_new_tokens = 8

[export]
formats = ["onnx"]
"""
STAGES = ("prep", "pretrain", "finetune", "eval/finetune", "export/finetune/onnx-ort")
TEXTS = ("bisect", "heapq", "shlex", "string", "textwrap")  # modules of the standard library: 70 kB


@dataclass(frozen=True)
class Project:
    """A folder with t.toml, text/, chats.jsonl and, once something ran, runs/t."""

    path: Path
    warm: Warm

    @property
    def run(self) -> Path:
        return self.path / "runs" / "t"

    @property
    def recipe(self) -> Path:
        return self.path / "t.toml"

    def llmctl(self, *args: object, before: str = "", env: dict[str, str] | None = None) -> Done:
        return self.warm.run(*args, cwd=self.path, before=before, env=env)

    def start(self, *args: object, before: str = "", env: dict[str, str] | None = None) -> Call:
        return self.warm.start(*args, cwd=self.path, before=before, env=env)

    def edit(self, old: str, new: str) -> None:
        """Replaces something that stands in the recipe once."""
        text = self.recipe.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
        self.recipe.write_text(text.replace(old, new))

    def manifest(self, place: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / place / "artifact.json").read_text())
        return found

    def identities(self) -> dict[str, str]:
        """place -> identity of every artifact there is."""
        found = {path.parent.relative_to(self.run): path for path in sorted(self.run.glob("**/artifact.json"))}
        whole = {place: path for place, path in found.items() if not any(part.startswith(".") for part in place.parts)}
        return {str(place): json.loads(path.read_text())["identity"] for place, path in whole.items()}

    def weights(self, place: str = "pretrain") -> bytes:
        return (self.run / place / "model.safetensors").read_bytes()

    def states(self, *args: object) -> dict[str, str]:
        """place -> the word that `llmctl status` has for it."""
        done = self.llmctl("status", *args, "--json")
        assert done.code == 0, done.err
        return {place: stage["state"] for place, stage in done.json["stages"].items()}

    def reasons(self, place: str, *args: object) -> list[str]:
        found: list[str] = self.llmctl("status", *args, "--json").json["stages"][place]["reasons"]
        return found

    def files(self) -> dict[str, tuple[int, int]]:
        """path -> (inode, mtime) of every file of the run: equal before and after means that nothing was touched."""
        paths = [path for path in sorted(self.path.rglob("*")) if path.is_file() and path.name != ".lock"]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def write(folder: Path) -> None:
    """Puts the recipe and its sources into a folder."""
    (folder / "text").mkdir(parents=True)
    for name in TEXTS:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copyfile(spec.origin, folder / "text" / f"{name}.py")
    (folder / "t.toml").write_text(RECIPE)
    chats = [(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(40)]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in chats]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


def copy(project: Project, folder: Path) -> Project:
    """The project in another folder, as if it had been made there."""
    shutil.copytree(project.path, folder, symlinks=True)
    made = Project(folder, project.warm)
    if (kept := made.run / "recipe.resolved.toml").exists():
        kept.write_text(kept.read_text().replace(str(project.path), str(folder)))
    return made
