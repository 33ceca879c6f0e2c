"""What a command's target names: a recipe, an artifact, a run, or nothing at all."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from llmctl import chain, console, recipe
from llmctl.artifact import MANIFEST, Artifact, Run
from llmctl.errors import DataError, RecipeError, UsageError
from llmctl.model import origin
from llmctl.recipe import Recipe

RUNS = Path("runs")
RESOLVED = "recipe.resolved.toml"


@dataclass(frozen=True)
class Target:
    """A recipe and its run, and the artifact where one was named."""

    recipe: Recipe
    run: Run
    said: str  # the choice, in words, printed before anything else
    artifact: Artifact | None = None

    def model(self) -> Artifact:
        """The last model there is: the one named, else finetune, else pretrain, else import."""
        if self.artifact is not None:
            if self.artifact.kind not in ("model", "export"):
                raise UsageError(
                    f"{self.artifact.path} holds {self.artifact.kind}, not a model",
                    hint="name the run or a model's folder",
                )
            return self.artifact
        for place in chain.MODEL_PLACES:
            if (found := self.run.artifact(place)) is not None:
                return found
        raise UsageError(f"{self.run.path} has no model yet", hint=f"llmctl pretrain {self.recipe.file} makes one")

    def runnable(self) -> Artifact:
        """What serve and chat take: the newest export of the last model, else the model itself."""
        model = self.model()
        if model.kind == "export":
            return model
        exports = []
        for manifest in (self.run.path / chain.exports(model.place)).glob("onnx-*/" + MANIFEST):
            found = Artifact.open(manifest.parent)
            if any(entry["identity"] == model.identity for entry in found.inputs):
                exports.append(found)
            else:
                console.note(
                    f"{found.place} was made from another {model.place}; left aside (llmctl export makes it again)"
                )
        return max(exports, key=lambda export: float(export.manifest["times"]["started"]), default=model)


def resolve(
    name: str | None, *, run_dir: Path | None = None, overrides: tuple[str, ...] = (), dry_run: bool = False
) -> Target:
    """What `name` means; without one: --run-dir, else $LLMCTL_RUN, else runs/current.

    Raises:
        UsageError: nothing there, listing the candidates; or a folder that `dry_run` may not import.
    """
    if name is not None and name.lower().endswith(".gguf") and Path(name).is_file():
        return _bare(Path(name), run_dir, overrides, dry_run)
    if name is not None and (name.endswith(".toml") or Path(name).is_file()):
        made = recipe.load(Path(name), overrides)
        run = _run_in(run_dir) if run_dir is not None else Run(RUNS / made.name)
        run.mend()
        return Target(made, run, f"recipe {name} in {run.path}")
    path, why = _folder(name, run_dir)
    if (path / MANIFEST).exists():
        artifact = Artifact.open(path)
        depth = len(Path(artifact.place).parts)
        if not artifact.in_its_run():  # copied out of its run: a model like any other
            if artifact.kind == "model":
                return _bare(path, run_dir, overrides, dry_run)
            bare = Recipe(name=recipe.default_name(path.resolve().name), file=path / RESOLVED, root=path.absolute())
            return Target(bare, Run(path), f"{path}: {artifact.place} {artifact.short}, apart from its run", artifact)
        run = Run(path.parents[depth - 1] if len(path.parts) > depth else artifact.run_path())
        return Target(_recipe_of(run, overrides), run, f"{path}: {artifact.place} {artifact.short}{why}", artifact)
    if _is_run(path):
        run = Run(path)
        return Target(_recipe_of(run, overrides), run, f"run {path}{why}")
    if (path / "config.json").exists():
        return _bare(path, run_dir, overrides, dry_run)
    raise UsageError(f"{path} is neither a recipe nor a run, an artifact or a Hugging Face folder", hint=_candidates())


def _run_in(path: Path) -> Run:
    """The run of --run-dir, which may be a new one. A mistyped path must not train anew where nobody looks for it.

    Raises:
        UsageError: a file, a folder of something else, a folder inside a run.
    """
    inside = next((run for run in path.absolute().parents if (run / RESOLVED).is_file()), None)
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    if inside is not None or file is not None:
        why = f"lies inside the run {inside}" if inside is not None else f"is no folder: {file} is a file"
    elif not path.exists():
        console.note(f"{path} is a new run")
        return Run(path)
    else:  # an empty name, of a script's variable, is this folder
        only_logs = all(entry.suffix in LOGS and entry.is_file() for entry in path.iterdir())  # a script's, or nothing
        if _is_run(path) or (path / ".lock").exists() or (path != Path() and only_logs):
            return Run(path)
        why = "is no run"
    raise UsageError(f"--run-dir: {path} {why}", hint="name a run, or a folder that is new or empty")


_MADE, LOGS = ("prep", *chain.MODEL_PLACES), (".json", ".jsonl", ".log")


def _is_run(path: Path) -> bool:
    return any((path / place).exists() for place in (RESOLVED, *(f"{place}/{MANIFEST}" for place in _MADE)))


def _folder(name: str | None, run_dir: Path | None) -> tuple[Path, str]:
    path, why = _path_of(name, run_dir)
    with contextlib.suppress(ValueError):  # a NUL in the name
        for run in (path, *path.parents[:3]):
            if (run / RESOLVED).is_file():
                Run(run).mend()
        if path.is_dir() and name != "":
            return path, why
    missing = f"{name}: no such recipe, run or artifact" if name is not None else f"no target, and {path} is not there"
    of_a_hub = name is not None and name.startswith(origin.HUB)
    raise UsageError(missing, hint=f"llmctl import {name} brings it in" if of_a_hub else _candidates())


def _path_of(name: str | None, run_dir: Path | None) -> tuple[Path, str]:
    if name is not None:
        path = Path(name)
        return (path.parent / path.readlink() if path.is_symlink() else path), ""
    if run_dir is not None:
        return run_dir, " (--run-dir)"
    if os.environ.get("LLMCTL_RUN"):
        return Path(os.environ["LLMCTL_RUN"]), " (LLMCTL_RUN)"
    path = RUNS / "current"
    return (RUNS / path.readlink() if path.is_symlink() else path), " (runs/current)"


def _candidates() -> str:
    recipes = sorted(
        str(path)
        for folder in (Path(), Path("recipes"))
        for path in folder.glob("*.toml")
        if path.name != "pyproject.toml"
    )
    runs = sorted(str(path.parent) for path in RUNS.glob("*/" + RESOLVED) if path.parent.name != "current")
    found = [f"recipes: {', '.join(recipes)}"] * bool(recipes) + [f"runs: {', '.join(runs)}"] * bool(runs)
    return "\n".join(found) if found else "llmctl init FOLDER writes a recipe for your text"


def _recipe_of(run: Run, overrides: tuple[str, ...]) -> Recipe:
    """The recipe as the run keeps it. Where the file it came from says something else by now, that is told, not
    followed.
    """
    kept = run.path / RESOLVED
    if not kept.exists():
        return recipe.of({"name": recipe.default_name(run.path.resolve().name)}, overrides, kept.absolute())
    made = recipe.load(kept, overrides)
    if not overrides and (origin := origin_recipe(made)) is not None and _differs(origin, made):
        console.note(f"{origin.file} has changed since; {run.path} goes on as it was made (name the recipe to use it)")
    return made


def _differs(one: Recipe, other: Recipe) -> bool:
    return any(_declared(one, name) != _declared(other, name) for name in ("seed", *recipe.SECTIONS) if name != "serve")


def _declared(made: Recipe, name: str) -> object:
    value = getattr(made, name)
    return value.declared() if isinstance(value, recipe.Section) else value


def origin_recipe(made: Recipe) -> Recipe | None:
    """The recipe file that a run's kept recipe came from, as it is now; None where it is gone or broken."""
    if made.origin is None or not Path(made.origin.recipe).is_file():
        return None
    with contextlib.suppress(RecipeError):
        return recipe.load(Path(made.origin.recipe), made.origin.overrides)
    return None


def bring_in(
    source: str,
    name: str = "",
    *,
    run_dir: Path | None = None,
    overrides: tuple[str, ...] = (),
    convert_pickle: bool = False,
) -> Target:
    """The run that takes a model in from elsewhere: its recipe says `[model] from`, and what was said of it before.

    Args:
        source: a folder, a GGUF file, a run or an artifact; or `hf:org/name@revision`, whose commit is looked up now.
        name: the run's; empty for one that follows from the source's.

    Raises:
        UsageError: a name that is no run's; a run that a recipe made.
        DataError: nothing there.
    """
    found = origin.find(source, Path())
    if found.kind == "hub":
        from llmctl.importing import hub

        spec = f"{origin.HUB}{found.repository}@{hub.commit(found.repository, found.revision)}"
    else:
        spec = str(Path(source).expanduser().resolve())
    name = name or _name_of(found, Path(os.path.abspath(Path(source).expanduser())))  # noqa: PTH100 (follows no link)
    if not re.fullmatch(recipe.NAME, name) or name == "current":
        hint = "letters, digits, dots, hyphens and underscores, a letter or digit first, at most 64; not current"
        raise UsageError(f"{name!r} is no run's name", hint=hint)
    run = _run_in(run_dir) if run_dir is not None else Run(RUNS / name)
    if run_dir is None and run.path.is_symlink():
        raise UsageError(f"{run.path} is a link to {run.path.readlink()}", hint="name the run itself, or another one")
    if found.kind == "folder" and found.path.resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{source} lies in {run.path}, where it would be brought in", hint="--as OTHER-NAME")
    run.mend()
    made = _kept(run, source, overrides) or recipe.of({"name": name}, overrides, run.path / RESOLVED)
    model = made.section("model").model_copy(update={"source": spec, "convert_pickle": convert_pickle})
    return Target(made.model_copy(update={"model": model}), run, f"{source} as {run.path}")


def _name_of(found: origin.Origin, path: Path) -> str:
    """The name of the run that a source suggests: the repository's, the file's, the folder's; of an artifact the run's
    and its own; of a snapshot in a hub's cache the repository's.
    """
    if found.kind == "hub":
        return recipe.default_name(found.repository.rpartition("/")[2])
    if found.kind == "folder" and path.parent.name == "snapshots":
        return recipe.default_name(path.parents[1].name.rpartition("--")[2])
    folder = path.parent if path.is_file() else path  # an export's GGUF file lies in its artifact
    if (folder / MANIFEST).exists() and (artifact := Artifact.open(folder)).in_its_run():
        parts = [artifact.run_path().name, *Path(artifact.place).parts]
        return recipe.default_name("-".join(parts))
    return recipe.default_name(path if path.is_file() else path.name)


def _kept(run: Run, source: str, overrides: tuple[str, ...]) -> Recipe | None:
    """The recipe of a run that an import began, with what was added to it since; None for a run that is not there yet.

    Raises:
        UsageError: the run belongs to a recipe of its own.
    """
    kept = run.path / RESOLVED
    if not kept.exists():
        if found := next((place for place in ("prep", "pretrain", "finetune") if (run.path / place).exists()), None):
            raise UsageError(f"{run.path} holds {found} already", hint="--as OTHER-NAME")
        return None
    made = recipe.load(kept, overrides)
    if made.origin is not None and made.origin.recipe and Path(made.origin.recipe) != kept.absolute():
        raise UsageError(
            f"{run.path} belongs to the recipe {made.origin.recipe}",
            hint=f'--as OTHER-NAME, or [model] from = "{source}" in that recipe',
        )
    return made


def _bare(path: Path, run_dir: Path | None, overrides: tuple[str, ...], dry_run: bool) -> Target:
    """A bare Hugging Face folder or GGUF file: a run of its own, whose import stage brings it in first."""
    if dry_run:
        raise UsageError(
            f"{path} would be imported into a run first, and --dry-run does nothing",
            hint="leave --dry-run out, or name a run",
        )
    found = bring_in(str(path), run_dir=run_dir, overrides=overrides)
    chain.make(found.recipe, found.run, chain.import_steps(found.recipe, found.run), chain.Options())
    imported = found.run.artifact("import")
    if imported is None:
        raise DataError("the import left nothing", file=path)
    said = f"{path}, imported as {found.run.path}: {imported.short}"
    return replace(found, said=said, artifact=imported)
