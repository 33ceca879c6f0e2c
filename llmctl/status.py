"""`run`, `status` and `verify`: the whole chain at a glance, and made in one go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmctl import chain, console, device
from llmctl.artifact import Artifact
from llmctl.chain import Options, State, Step
from llmctl.errors import DataError, UsageError
from llmctl.recipe import ENCODERS
from llmctl.reporting.story import source_name
from llmctl.target import Target, origin_recipe


def run(target: Target, options: Options) -> dict[str, Any]:
    """Makes every step of the recipe that is not up to date, and says what to do next."""
    made, place = target.recipe, target.run.path
    goal = chain.steps(made, target.run)
    if not goal:
        raise UsageError(
            f"{made.file} asks for nothing", hint="add [prep] and [pretrain]; llmctl init FOLDER writes a recipe"
        )
    start = time.monotonic()
    behind = [step for step, state in chain.states(made, target.run, goal).values() if not state.usable]
    if behind:
        chosen = device.pick(options.device)
        dtype, why = chosen.dtype(made.pretrain.dtype if made.pretrain else "auto")
        stages = "1 stage" if len(behind) == 1 else f"{len(behind)} stages"
        console.say(f"{made.name} · {stages} to do · {chosen.describe()}, {dtype} ({why})\n")
    done = chain.make(made, target.run, goal, options)
    if options.dry_run:
        return {"artifact": None, "identity": None, "metrics": {}}
    if any(fresh for _, _, fresh in done):
        console.say(f"\n{place} is complete in {console.duration(time.monotonic() - start)}.   Next:")
        talk = [[f"llmctl chat {place}"], [f"llmctl serve {place}", "a page at http://127.0.0.1:8000"]]
        writes = made.model is None or made.model.source or made.model.family not in ENCODERS
        has_model = writes and any(target.run.artifact(name) for name in chain.MODEL_PLACES)
        console.columns([*(talk if has_model else []), [f"llmctl report {place}"]], indent=3)
    else:
        kept = " · ".join(f"{step.place} {artifact.short}" for step, artifact, _ in done)
        console.say(f"{place} is up to date: {kept}. Nothing to do.")
    last = done[-1][1]
    fresh_or_not = {step.place: {"identity": artifact.identity, "made": fresh} for step, artifact, fresh in done}
    return {
        "artifact": str(last.path),
        "identity": last.identity,
        "metrics": dict(last.metrics),
        "stages": fresh_or_not,
    }


def show(target: Target) -> tuple[dict[str, Any], bool]:
    """A row a step; the JSON document, and whether anything is behind the recipe as it is now."""
    made = origin_recipe(target.recipe) or target.recipe
    found = chain.states(made, target.run)
    rows = [[target.run.name, "", "identity", "made", "from", "result"]]
    rows += [_row(step, state) for step, state in found.values()]
    if len(rows) == 1:
        raise UsageError(
            f"{target.run.path}: the recipe asks for nothing",
            hint=f"llmctl init FOLDER writes a recipe; llmctl verify {target.run.path} lists what lies here",
        )
    console.columns(rows)
    document = {
        place: {
            "state": state.word,
            "reasons": list(state.reasons),
            "identity": state.artifact.identity if state.artifact else None,
        }
        for place, (_, state) in found.items()
    }
    behind = any(not state.usable for _, state in found.values())
    return {"artifact": str(target.run.path), "identity": None, "metrics": {}, "stages": document}, behind


def _row(step: Step, state: State) -> list[str]:
    made = state.artifact
    if made is None:
        return [step.place, state.word, "", "", "", "; ".join(state.reasons)]
    age = console.ago(time.time() - float(made.manifest["times"]["started"]) - float(made.manifest["times"]["seconds"]))
    origin = ", ".join(
        f"{entry['path'] if entry['role'] != 'data' else 'prep'} {entry['identity'][:8]}" for entry in made.inputs[:1]
    )
    origin = origin or ", ".join(
        name if name.startswith("builtin:") else source_name(name) for name in made.manifest["sources"]
    )
    result = "; ".join(state.reasons) if state.reasons else headline(made)
    return [step.place, state.word, made.short, age, origin if len(origin) < 40 else origin[:37] + "...", result]


def headline(made: Artifact) -> str:
    """An artifact's one figure."""
    metrics: Mapping[str, Any] = made.metrics
    if made.kind == "tokens":
        return f"{console.count(metrics['tokens'])} tokens"
    if made.kind == "export":
        return console.size(sum(entry["bytes"] for entry in made.manifest["files"].values()))
    for key, text in (("answer_bits_per_byte", "bits/byte of answers"), ("val_bits_per_byte", "bits/byte")):
        if isinstance(metrics.get(key), (int, float)):
            return f"{metrics[key]:.3f} {text}"
    if isinstance(metrics.get("val_accuracy"), (int, float)):
        return f"{100 * metrics['val_accuracy']:.1f} % of hidden tokens right"
    return f"{console.count(metrics['parameters'])} parameters" if made.stage == "import" else ""


def verify(target: Target) -> dict[str, Any]:
    """Hashes everything again; raises DataError at the end when anything is damaged."""
    damaged: list[DataError] = []
    places = []
    for place, damage in chain.verify(target.run):
        places.append(place)
        console.say(f" {place:<28} {'whole' if damage is None else f'DAMAGED: {damage}'}")
        damaged += [damage] if damage else []
    if not places:
        raise UsageError(f"{target.run.path} holds no artifact", hint="llmctl run makes them")
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(places)} artifacts are damaged",
            file=target.run.path,
            hint="\n".join(f"{damage}\n   {damage.hint}" for damage in damaged),
        )
    return {"artifact": str(target.run.path), "identity": None, "metrics": {"artifacts": len(places)}}
