"""Which stage feeds which, what is up to date and what is not, and making what is missing.

A stage is named as "module:function" and imported when it runs, so that `llmctl status` loads no torch. `version`
belongs to
the data a stage writes: a new llmctl that writes something else counts it up, and what the old one wrote is stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl import console, launch, recipe
from llmctl.artifact import MANIFEST, Artifact, Job, Run, Settings, write_json
from llmctl.errors import DataError, GateError, Interrupted, Paused, RecipeError, TimeUp, UsageError
from llmctl.model import origin
from llmctl.recipe import ExportSection, Recipe
from llmctl.text import sources

if TYPE_CHECKING:
    from llmctl.device import Device

EXPENSIVE = 600.0  # seconds: a stale artifact that cost more is only made again with --rebuild


@dataclass(frozen=True)
class Stage:
    """A stage as the chain knows it."""

    name: str
    function: str
    version: int
    kind: str
    sections: tuple[str, ...]
    resumes: bool = False  # keeps state in .work and goes on from it


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prep", "llmctl.prep.stage:prep", 2, "tokens", ("prep",)),
        Stage("import", "llmctl.importing.stage:import_model", 2, "model", ()),
        Stage("pretrain", "llmctl.pretrain.stage:pretrain", 2, "model", ("model", "pretrain"), resumes=True),
        Stage("finetune", "llmctl.finetune.stage:finetune", 1, "model", ("finetune",), resumes=True),
        Stage("eval", "llmctl.eval.stage:evaluate", 1, "evaluation", ("eval",)),
        Stage("export", "llmctl.export.stage:export", 2, "export", ("export",)),
    )
}
# [export] formats -> the folder and the keys that it is made from, beside `text`
VARIANTS = {
    "onnx": ("onnx-{0.profile}", ("profile", "dtype", "kv_cache", "adapter", "max_ppl_increase")),
    "hf": ("hf", ("quantize_method", "block_size", "target_bits", "max_ppl_increase")),
    "gguf": ("gguf-{0.gguf_type}", ("gguf_type",)),
    "tensorrt": ("tensorrt", ("dtype", "max_ppl_increase")),
}
MODEL_PLACES = origin.PLACES  # the last model first


@dataclass(frozen=True)
class Step:
    """One artifact of a run that a recipe asks for."""

    stage: Stage
    place: str
    inputs: Mapping[str, str]  # role -> place
    format: str = ""  # of an export


@dataclass(frozen=True)
class Options:
    """What this call asked for, beside the recipe."""

    device: str = "auto"
    rebuild: bool = False
    upstream: bool = True
    dry_run: bool = False
    wait_lock: bool = False
    deadline: float | None = None
    until_step: int | None = None  # of the training that was asked for
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """How a step stands."""

    word: str  # up to date, stale, missing, unverifiable, unfinished
    reasons: tuple[str, ...] = ()
    artifact: Artifact | None = None
    settings: Settings | None = None  # None where an input has to be made first
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.word in ("up to date", "unverifiable")


# --------------------------------------------------------------------------------------------- what a recipe asks for


def steps(made: Recipe, run: Run) -> list[Step]:
    """The steps of a recipe, in order."""
    found: list[Step] = []
    model = ""
    if made.prep is not None:
        found.append(Step(STAGES["prep"], "prep", {}))
    if made.model is not None and made.model.source:
        model = "import"
        found.append(Step(STAGES["import"], model, {}))
    elif (run.path / "import" / MANIFEST).exists() and made.pretrain is None:
        model = "import"
    for name in ("pretrain", "finetune"):
        if getattr(made, name) is None:
            continue
        inputs = ({"data": "prep"} if name == "pretrain" else {}) | ({"model": model} if model else {})
        if name == "finetune" and not model:
            raise RecipeError(
                "[finetune] has no model to start from",
                file=made.file,
                hint='add [pretrain], or [model] with from = "PATH"',
            )
        found.append(Step(STAGES[name], name, inputs))
        model = name
    if model:
        found += [eval_step(made, model)] if made.eval is not None else []
        found += export_steps(made, model) if made.export is not None else []
    return found


def upstream(every: list[Step], place: str) -> list[Step]:
    """The steps that `place` needs, and itself, in order."""
    needed = {place}
    for step in reversed(every):
        if step.place in needed:
            needed |= set(step.inputs.values())
    return [step for step in every if step.place in needed]


def import_steps(made: Recipe, run: Run) -> list[Step]:
    """The step that brings `[model] from` in, alone."""
    return upstream(steps(made, run), "import")


def eval_step(made: Recipe, subject: str) -> Step:
    """The evaluation of the artifact at `subject`, beside the model a finetune started from."""
    inputs = {"model": subject}
    if subject == "finetune":
        inputs["before"] = "import" if made.pretrain is None else "pretrain"
    if made.prep is not None:
        inputs["data"] = "prep"
    return Step(STAGES["eval"], f"eval/{subject.removeprefix('export/').replace('/', '.')}", inputs)


def export_steps(made: Recipe, subject: str) -> list[Step]:
    """One step a format, and one that quantises before those that take quantised weights."""
    section = made.section("export")
    folder, stage = exports(subject), STAGES["export"]
    found, inputs = dict[str, Step](), {"model": subject}
    if section.variant and set(section.formats) - {"gguf"}:
        place = f"{folder}/{variant('hf', section)}"
        found[place] = Step(stage, place, inputs, "hf")
        inputs = {**inputs, "quantized": place}
    for name in section.formats:
        place = f"{folder}/{variant(name, section)}"
        found.setdefault(place, Step(stage, place, {"model": subject} if name == "gguf" else inputs, name))
    return list(found.values())


def variant(format: str, section: ExportSection) -> str:
    """The folder of a format: hf-int4, onnx-ort, onnx-portable-fp16, onnx-ort-int4-kv8 ..."""
    name, small = VARIANTS[format][0].format(section), "-kv8" * (format == "onnx" and section.kv_cache == "int8")
    if format == "gguf":
        return name
    if section.variant:
        alike = section.is_symmetric and format == "hf" and section.variant != "int8-dynamic"
        return f"{name}-{section.variant}{'-symmetric' * alike}{small}"
    plain = format == "hf" or (format == "onnx" and section.dtype == "fp32")
    return f"{name}{small}" if plain else f"{name}-{section.dtype}{small}"


def exports(subject: str) -> str:
    """Where the exports of the model at `subject` lie."""
    return f"export/{subject.replace('/', '.')}"


# ------------------------------------------------------------------------------------------------------ how it stands


def states(made: Recipe, run: Run, wanted: list[Step] | None = None) -> dict[str, tuple[Step, State]]:
    """Every step and how it stands, in order, by place."""
    found: dict[str, tuple[Step, State]] = {}
    for step in wanted if wanted is not None else steps(made, run):
        found[step.place] = (step, _state(made, run, step, {place: state for place, (_, state) in found.items()}))
    return found


def _state(made: Recipe, run: Run, step: Step, upstream: Mapping[str, State]) -> State:
    artifact, damage = None, tuple[str, ...]()
    try:
        artifact = run.artifact(step.place)
    except DataError as problem:
        damage = (str(problem),)
    try:
        settings, index, absent = _settings(made, run, step, upstream, artifact)
    except DataError as problem:  # a source that is needed and can't be read; making the step raises it
        return State("missing" if artifact is None else "stale", (*damage, str(problem)), artifact)
    behind = "unfinished" if _started(run, step) else "missing" if artifact is None and not damage else "stale"
    if artifact is None:
        return State(behind, damage, None, settings, index)
    if settings is None:
        return State(behind, ("its input is not up to date",), artifact, None, index)
    reasons = difference(artifact.manifest, settings, index, _index(run, step.place))
    if reasons:
        return State(behind, tuple(reasons), artifact, settings, index)
    if absent:
        return State("unverifiable", (f"not here: {', '.join(absent)}",), artifact, settings, index)
    return State("up to date", (), artifact, settings, index)


def warn_if_behind(made: Recipe, run: Run, place: str) -> None:
    """Says when a model that is about to be measured, exported or served is not what the recipe asks for by now."""
    every = steps(made, run)
    if any(step.place == place for step in every):
        for step, state in states(made, run, upstream(every, place)).values():
            if state.word == "stale":
                console.warn(f"{step.place} is stale ({'; '.join(state.reasons)}); {place} is taken as it is")
                return


def _settings(
    made: Recipe, run: Run, step: Step, upstream: Mapping[str, State], artifact: Artifact | None
) -> tuple[Settings | None, dict[str, Any], list[str]]:
    """What a step would be made from now, the index of its sources, and the sources that are absent."""
    inputs = {}
    for role, place in step.inputs.items():
        state = upstream.get(place)
        source = (
            state.artifact if state is not None and state.usable else run.artifact(place) if state is None else None
        )
        if source is None:
            return None, {}, []
        inputs[role] = source.identity
    sections = _sections(made, step)
    files, index, absent = _scan(made, run, step, artifact)
    settings = Settings(step.stage.kind, step.stage.name, step.stage.version, made.seed, sections, inputs, files)
    return settings, index, absent


def _sections(made: Recipe, step: Step) -> dict[str, Any]:
    sections: dict[str, Any] = {name: made.section(name).declared() for name in step.stage.sections}
    if step.format:
        section, kept = made.section("export"), ("text", *VARIANTS[step.format][1])
        own = {key: value for key, value in sections["export"].items() if key in kept}
        sections["export"] = {"formats": [step.format], **own}
        if section.variant and step.format != "gguf":
            sections["export"] |= {"quantize": section.variant}
            if step.format == "hf":
                sections["export"] |= {"symmetric": section.is_symmetric}
        elif step.format == "hf":
            sections["export"] = {"formats": ["hf"]}
    return sections


def source_names(made: Recipe, step: Step) -> list[str]:
    """The texts that a step reads from outside the run."""
    names: dict[str, tuple[str, ...]] = {
        "prep": (*made.prep.sources, *filter(None, [made.prep.tokenizer.source])) if made.prep else (),
        "import": (made.model.source,) if made.model else (),
        "finetune": (*made.finetune.sources, *made.finetune.text, *teacher(made)) if made.finetune else (),
        "export": tuple(filter(None, [made.section("export").text])),
    }
    evaluation = made.section("eval")
    is_base = "pretrain" in re.split(r"[./]", step.inputs.get("model", ""))  # it has no turns
    chats = () if is_base else evaluation.conversations or (made.finetune.sources if made.finetune else ())
    names["eval"] = (*evaluation.text, *evaluation.tasks, *chats)
    return list(dict.fromkeys(names.get(step.stage.name, ())))


def teacher(made: Recipe) -> tuple[str, ...]:
    """The model from outside the run that finetuning learns from, if there is one."""
    name = made.finetune.taught_by if made.finetune is not None else ""
    return (name,) if name not in ("", "base") else ()


def _scan(
    made: Recipe, run: Run, step: Step, artifact: Artifact | None
) -> tuple[dict[str, dict[str, str]], dict[str, Any], list[str]]:
    """Digests of the sources' files: hashed again only where size, time or inode differ from the last time, as git
    does.

    A source that is absent counts as what the artifact says it was.
    """
    known, files, index, absent = _index(run, step.place), {}, {}, []
    for name in source_names(made, step):
        old = {path: sources.SourceFile(path, *entry) for path, entry in known.get(name, {}).items()}
        try:
            if step.stage.name == "import" or (step.stage.name == "finetune" and name in teacher(made)):
                found = origin.scan(name, made.root, old)
            elif made.prep is not None and name == made.prep.tokenizer.source:
                found = _scan_tokenizer(name, made.root, old)
            else:
                found = sources.scan(name, made.root, old)
        except DataError:
            if artifact is None or name not in artifact.manifest["sources"] or (made.root / name).exists():
                raise
            absent.append(name)
            continue
        files[name] = {file.path: file.sha256 for file in found}
        index[name] = {file.path: [file.bytes, file.mtime_ns, file.inode, file.sha256] for file in found}
    return files, index, absent


TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "config.json",
)


def _scan_tokenizer(name: str, root: Path, known: Mapping[str, sources.SourceFile]) -> list[sources.SourceFile]:
    """The files of a folder that make a tokenizer what it is."""
    folder = root / Path(name).expanduser()
    if not folder.is_dir():
        return sources.scan(name, root, known)
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    paths = sorted(path for path in files if path.stat().st_size)
    return [file for path in paths for file in sources.scan(str(Path(name) / path.name), root, known)]


def _started(run: Run, step: Step) -> dict[str, Any] | None:
    """The settings of an unfinished training. Those of the artifact itself are leftovers of a finished one: none."""
    found = _read_json(run.work(step.place) / "settings.json") if step.stage.resumes else None
    if found is not None and not {"version", "seed", "sections", "inputs", "sources"} <= found.keys():
        return None
    with contextlib.suppress(DataError):
        artifact = run.artifact(step.place) if found is not None else None
        if found is not None and artifact is not None:
            inputs = {entry["role"]: entry["identity"] for entry in artifact.inputs}
            same = all(artifact.manifest[key] == found.get(key) for key in ("version", "seed", "sections"))
            return None if same and inputs == found.get("inputs") else found
    return found


def _index(run: Run, place: str) -> dict[str, Any]:
    return _read_json(run.path / ".work" / f"sources-{place.replace('/', '.')}.json") or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def difference(
    before: Mapping[str, Any], now: Settings, index: Mapping[str, Any], old_index: Mapping[str, Any]
) -> list[str]:
    """Why `before` (a manifest, or the settings of an unfinished training) is not what `now` asks for: a line a
    reason.
    """
    after = now.as_json()
    reasons = []
    if before["version"] != after["version"]:
        reasons.append(f"llmctl writes other {now.kind} now (version {before['version']} -> {after['version']})")
    if before["seed"] != after["seed"]:
        reasons.append(f"seed {before['seed']} -> {after['seed']}")
    for name in after["sections"]:
        reasons += _changed(f"[{name}]", before["sections"].get(name, {}), after["sections"][name])
    inputs = (
        before["inputs"]
        if isinstance(before["inputs"], dict)
        else {entry["role"]: entry["identity"] for entry in before["inputs"]}
    )
    for role in sorted({*inputs, *now.inputs}):
        if inputs.get(role) != now.inputs.get(role):
            reasons.append(f"its {role} {inputs.get(role, 'none')[:8]} -> {now.inputs.get(role, 'none')[:8]}")
    for name, files in now.sources.items():
        entry = before["sources"].get(name)
        old = entry["sha256"] if isinstance(entry, dict) else entry
        if old is None:
            reasons.append(f"it was made from {', '.join(before['sources']) or 'nothing'}, not {name}")
        elif old != after["sources"][name]:
            reasons.append(f"{name} changed{_which(old_index.get(name, {}), files)}")
    return reasons


def _changed(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changed(f"{where[:-1]}.{key}]", old, new)
        elif old != new:
            yield f"{where} {key} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    return (
        "default"
        if value is None
        else value
        if isinstance(value, str) and value
        else json.dumps(value, ensure_ascii=False)
    )


def _which(before: Mapping[str, Any], now: Mapping[str, str]) -> str:
    if not before:
        return ""
    changed = [path for path, sha in now.items() if path not in before or before[path][3] != sha]
    changed += [path for path in before if path not in now]
    names = ", ".join(Path(path).name for path in changed[:3])
    return f" ({names}{f' and {len(changed) - 3} more' if len(changed) > 3 else ''})" if changed and names else ""


# ------------------------------------------------------------------------------------------------------------- making


def make(
    made: Recipe, run: Run, goal: list[Step], options: Options, asked: Collection[str] | None = None
) -> list[tuple[Step, Artifact, bool]]:
    """Makes the steps of `goal` that are not up to date, in order: (step, artifact, whether it was made now).

    `asked` are the places that the command itself is about, to which --rebuild applies; by default all of `goal`.

    Raises:
        UsageError: an expensive remake that was not allowed, an unfinished training with other settings or other data;
            before anything is touched.
        GateError: a metric that `[eval.require]` asks for was missed.
        Paused: --until-step was reached.
    """
    from llmctl import device

    if launch.rank() > 0:
        return _take_part(made, run, options)
    with contextlib.ExitStack() as held:
        held.enter_context(launch.leading())
        if not options.dry_run:
            held.enter_context(run.lock(options.wait_lock))
        chosen = device.pick(options.device)
        again = {step.place for step in goal if asked is None or step.place in asked} if options.rebuild else set()
        goal = _as_started(made, run, goal)
        _refuse_all(made, run, goal, again)
        for step in goal:
            if step.stage.resumes:
                launch.check_batch(made.section(step.stage.name).global_batch_size, f"[{step.place}] global_batch_size")
        done: list[tuple[Step, Artifact, bool]] = []
        before: dict[str, State] = {}
        for step in goal:
            if options.deadline is not None and time.monotonic() >= options.deadline:
                raise TimeUp(f"--max-time is over before {step.place}", hint="the same command again goes on from here")
            state = _state(made, run, step, before)
            remake = not state.usable or step.place in again
            if options.dry_run:
                _announce(step, state, remake)
            elif remake:
                if step.place in again:
                    _drop(run, step)
                else:
                    _refuse(made, run, step, state, [])
                until = options.until_step if step.place in (asked or ()) else None
                artifact = _run_step(made, run, step, state, chosen, dataclasses.replace(options, until_step=until))
                state = State("up to date", (), artifact, state.settings)
                done.append((step, artifact, True))
            else:
                assert state.artifact is not None
                _sweep(run, step)
                done.append((step, state.artifact, False))
            if step.stage.name == "eval" and state.artifact is not None and not options.dry_run:
                gate(made, state.artifact)
            before[step.place] = state
        if not options.dry_run and made.origin is None and not options.overrides:
            write_resolved(made, run, options)  # a gate or a port may have changed though nothing had to be made
        return done


def _announce(step: Step, state: State, remake: bool) -> None:
    why = f": {'; '.join(state.reasons)}" if state.reasons else ""
    console.say(f" {step.place:<24} {'would be made' if remake else 'would be kept'} ({state.word}{why})")


def _run_step(made: Recipe, run: Run, step: Step, state: State, chosen: Device, options: Options) -> Artifact:
    inputs = {role: _input(run, place) for role, place in step.inputs.items()}
    if state.settings is None:
        _scan(made, run, step, state.artifact)  # raises what is wrong with a source
        raise UsageError(f"{step.place} has an input that is not up to date", hint=f"llmctl run {_named(made, run)}")
    if state.word == "stale":
        console.say(f"{step.place} is stale: {'; '.join(state.reasons)}")
    if _started(run, step) is None:
        if state.artifact is None and any(run.work(step.place).glob("step-*")):
            console.warn(f"what {step.place} was begun with is not known any more; it starts over")
        _sweep(run, step)
    ends = (options.deadline, options.until_step)
    chosen = launch.share(chosen) if step.stage.resumes else chosen
    job = Job(made, run, step.place, state.settings, inputs, chosen, state.index, *ends)
    if step.stage.kind in ("tokens", "model") or not options.overrides:  # flags of eval and export are for this call
        write_resolved(made, run, options)
    if step.stage.resumes:
        start = {**state.settings.as_json(), "index": state.index}
        write_json(job.work / "settings.json", start)
    console.event("stage_started", stage=step.stage.name, place=step.place)
    with console.log_to(run.path / "logs" / f"{step.stage.name}.log"):
        try:
            with _together(job) if step.stage.resumes else contextlib.nullcontext():
                artifact = _work_of(step)(job)
            assert artifact is not None
        except (DataError, UsageError, RecipeError):
            if step.stage.resumes and not any(job.work.glob("step-*")):
                _sweep(run, step)  # refused before its first step: nothing is unfinished
            raise
    console.event(
        "stage_finished",
        stage=step.stage.name,
        place=step.place,
        identity=artifact.identity,
        metrics=dict(artifact.metrics),
    )
    point_current(run)
    return artifact


def _together(job: Job) -> contextlib.AbstractContextManager[None]:
    """Brings all ranks to a training."""
    word = {"inputs": {role: made.identity for role, made in job.inputs.items()}, "until_step": job.until_step}
    return launch.together(job.place, word, job.recipe.section(job.settings.stage).rank_timeout, job.device)


def _take_part(made: Recipe, run: Run, options: Options) -> list[tuple[Step, Artifact, bool]]:
    """What a rank but the first does: it trains what that one begins, and makes nothing of its own."""
    from llmctl import device

    chosen, stages = launch.share(device.pick(options.device)), {step.place: step for step in steps(made, run)}
    for place, word in launch.trainings():
        step, section = stages[place], made.section(place)
        met = launch.together(place, word, section.rank_timeout, chosen)
        with contextlib.suppress(Interrupted, TimeUp, Paused), met:
            inputs = {role: _input(run, where) for role, where in step.inputs.items()}
            launch.agree_on({role: found.identity for role, found in inputs.items()}, word["inputs"])
            settings = Settings("model", place, step.stage.version, made.seed, _sections(made, step), word["inputs"])
            _work_of(step)(Job(made, run, place, settings, inputs, chosen, until_step=word["until_step"]))
    return []


def _work_of(step: Step) -> Callable[[Job], Artifact | None]:
    """The stage's function. Of a training it returns None on all ranks but the first, which publishes."""
    module, _, function = step.stage.function.partition(":")
    found: Callable[[Job], Artifact | None] = getattr(importlib.import_module(module), function)
    return found


def _input(run: Run, place: str) -> Artifact:
    artifact = run.artifact(place)
    if artifact is None:
        raise UsageError(f"{place} is not there", hint=f"llmctl {place.split('/')[0]} makes it")
    artifact.verify()  # a flipped bit must not train a model
    return artifact


def _as_started(made: Recipe, run: Run, goal: list[Step]) -> list[Step]:
    """Where the run itself was named, not a recipe: an unfinished training goes on with the inputs that it was started
    with, whatever has become of their sources.
    """
    for step in reversed(goal) if made.origin is not None else ():
        started = _started(run, step)
        if started is None or not step.inputs:
            continue
        with contextlib.suppress(DataError):
            found = {role: run.artifact(place) for role, place in step.inputs.items()}
            if {role: made.identity for role, made in found.items() if made} == started.get("inputs"):
                before = upstream(goal, step.place)[:-1]
                return [other for other in goal if other not in before]
    return goal


def _refuse_all(made: Recipe, run: Run, goal: list[Step], again: Collection[str]) -> None:
    """Refuses before a cheap input is made anew what would be refused after it."""
    changed: dict[str, list[str]] = {}
    for step, state in states(made, run, goal).values():
        inherited = [reason for place in step.inputs.values() for reason in changed.get(place, ())]
        if step.place not in again:
            _refuse(made, run, step, state, inherited)
        known = state.artifact is not None and state.word == "stale" and state.settings is not None
        changed[step.place] = inherited or [f"{step.place}: {reason}" for reason in state.reasons if known]


def _refuse(made: Recipe, run: Run, step: Step, state: State, inherited: list[str]) -> None:
    """Raises UsageError where a step may not be made unasked. `inherited`: why its inputs will be others."""
    started, named = _started(run, step), _named(made, run)
    again = f"llmctl {step.stage.name} {named} --rebuild"
    if started is None:
        cost = _cost(run, step)
        if state.word == "stale" and cost > EXPENSIVE and (inherited or state.settings is not None):
            why = "; ".join(inherited or state.reasons)
            message = f"{step.place} is stale ({why}) and took {console.duration(cost)} to make"
            raise UsageError(message, file=run.path / step.place, hint=f"{again} makes it again")
        return
    settings = state.settings
    if settings is None:  # an input will be made first
        old = started.get("sections", {})
        now = _sections(made, step)
        own = [line for name in now for line in _changed(f"[{name}]", old.get(name, {}), now[name])]
        gone = False
    else:
        own = difference(started, settings, state.index, started.get("index", {}))
        gone = own != difference(started, dataclasses.replace(settings, sources={}), {}, {})
    if reasons := [*own, *inherited]:
        go_on = [] if gone or made.origin else [f"go on as it was: llmctl {step.stage.name} {run.path}"]
        lines = "\n".join(f"   {reason}" for reason in reasons)
        raise UsageError(
            f"the unfinished {step.place} in {run.path} was started with other settings:\n{lines}\n"
            "Nothing was touched.",
            file=named,
            hint=" · ".join([*go_on, f"start over: {again}", "train beside it: change `name`"]),
        )


def _cost(run: Run, step: Step) -> float:
    """The seconds that the artifact took, whole or damaged; 0 where nobody knows."""
    times = (_read_json(run.path / step.place / MANIFEST) or {}).get("times")
    found = times.get("seconds") if isinstance(times, dict) else None
    return float(found) if isinstance(found, (int, float)) else 0.0


def _named(made: Recipe, run: Run) -> str:
    """What a next command would call it: the recipe, or the run where that was named."""
    return str(run.path if made.origin is not None else made.file)


def _drop(run: Run, step: Step) -> None:
    if _started(run, step) is not None:
        console.note(f"starting {step.place} over; its unfinished work is dropped")
    _sweep(run, step)


def _sweep(run: Run, step: Step) -> None:
    """Drops what a process that was killed between publishing and tidying up left."""
    if run.work(step.place).exists():
        shutil.rmtree(run.work(step.place))


def write_resolved(made: Recipe, run: Run, options: Options) -> None:
    """Keeps the recipe as it was resolved beside what it makes, unless an unfinished training goes on with another."""
    if any(_is_other(made, run, name) for name in ("pretrain", "finetune")):
        return
    origin = made.origin
    if origin is not None and origin.recipe:  # the recipe of the run itself: its own origin stays
        made = made.model_copy(update={"file": Path(origin.recipe)})
    text = recipe.resolved(made, [*(origin.overrides if origin else ()), *options.overrides])
    path = run.path / "recipe.resolved.toml"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(".recipe.resolved.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _is_other(made: Recipe, run: Run, name: str) -> bool:
    """Whether a training of that name was begun and not finished with other sections than the recipe has now."""
    step = Step(STAGES[name], name, {})
    started = _started(run, step)
    if started is None:
        return False
    return getattr(made, name) is None or _sections(made, step) != started.get("sections")


def point_current(run: Run) -> None:
    """Lets `runs/current` name this run: what a command without a target means."""
    if run.path.parent.name != "runs":
        return
    link, temporary = run.path.parent / "current", run.path.parent / f".current.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.path.name)
    temporary.replace(link)


def gate(made: Recipe, artifact: Artifact) -> None:
    """Holds an evaluation against `[eval.require]`."""
    missed = []
    for metric, rule in made.section("eval").require.items():
        bound = rule.strip().lstrip("<>=")
        value = artifact.metrics.get(metric)
        if value is None and metric in artifact.metrics:
            missed.append(f"{metric} is no number, required {rule.strip()}")
            continue
        if not isinstance(value, (int, float)):
            known = ", ".join(sorted(key for key, found in artifact.metrics.items() if isinstance(found, (int, float))))
            raise RecipeError(
                f"[eval.require] {metric}: the evaluation has no such metric", file=made.file, hint=f"it has: {known}"
            )
        comparison = rule.strip()[: len(rule.strip()) - len(bound)]
        passed = {
            "<": value < float(bound),
            "<=": value <= float(bound),
            ">": value > float(bound),
            ">=": value >= float(bound),
        }[comparison]
        if not passed:
            missed.append(f"{metric} is {value:.4g}, required {rule.strip()}")
    if missed:
        raise GateError(
            "; ".join(missed), file=artifact.path, hint="the evaluation is published; the gate stands in [eval.require]"
        )


def verify(run: Run) -> Iterator[tuple[str, DataError | None]]:
    """Hashes every artifact of a run again: (place, what is wrong or None)."""
    for manifest in sorted(
        [*run.path.glob("*/" + MANIFEST), *run.path.glob("*/*/" + MANIFEST), *run.path.glob("*/*/*/" + MANIFEST)]
    ):
        place = manifest.parent.relative_to(run.path).as_posix()
        if place.startswith((".old-", ".staging-")) or "/." in place:
            continue
        try:
            Artifact.open(manifest.parent).verify()
            yield place, None
        except DataError as damage:
            yield place, damage
