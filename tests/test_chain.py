"""What is up to date, what is not and why; and that making touches just that."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from llmctl import chain
from llmctl.artifact import Run
from llmctl.errors import GateError, RecipeError
from llmctl.recipe import Recipe
from tests.project import STAGES, Project
from tests.test_artifact import job, published

PREP, PRETRAIN, FINETUNE, EVAL, EXPORT = STAGES


def up_to_date(*places: str) -> dict[str, str]:
    return {place: "up to date" if place in places else "stale" for place in STAGES}


# ------------------------------------------------------------------------------------------------------------- plans


def steps(**sections: object) -> list[str]:
    made = Recipe.model_validate({"name": "x", **sections})
    return [step.place for step in chain.steps(made, Run(Path("/nowhere")))]


def test_a_section_that_is_absent_is_a_stage_that_is_absent() -> None:
    prep, chats = {"sources": ["a"]}, {"sources": ["b"]}
    assert steps(prep=prep) == ["prep"]
    assert steps(prep=prep, pretrain={}, export={}) == ["prep", "pretrain", "export/pretrain/onnx-ort"]
    assert steps(model={"from": "m"}, finetune=chats, eval={}) == ["import", "finetune", "eval/finetune"]
    both = steps(model={"from": "m"}, export={"formats": ["onnx", "hf"]})
    assert both == ["import", "export/import/onnx-ort", "export/import/hf"]


@pytest.mark.parametrize(
    ("export", "places"),
    [
        ({"quantize": "int4"}, ["hf-int4", "onnx-ort-int4"]),
        ({"quantize": "int4", "formats": ["hf"]}, ["hf-int4"]),
        ({"quantize": "int4", "formats": ["onnx", "hf", "gguf"]}, ["hf-int4", "onnx-ort-int4", "gguf-f16"]),
        ({"quantize": "int8", "profile": "portable"}, ["hf-int8-symmetric", "onnx-portable-int8"]),
        ({"quantize": "int8-dynamic", "profile": "portable"}, ["hf-int8-dynamic", "onnx-portable-int8-dynamic"]),
        ({"target_bits": 5.0}, ["hf-mixed", "onnx-ort-mixed"]),
        ({"max_ppl_increase": "2%"}, ["hf-mixed", "onnx-ort-mixed"]),
        ({"quantize": "int4", "max_ppl_increase": "2%"}, ["hf-int4", "onnx-ort-int4"]),
        ({"dtype": "fp16"}, ["onnx-ort-fp16"]),
        ({"dtype": "fp16", "formats": ["tensorrt"]}, ["tensorrt-fp16"]),
    ],
)
def test_what_is_quantised_is_made_of_a_quantised_model(export: dict[str, object], places: list[str]) -> None:
    made = Recipe.model_validate({"name": "x", "model": {"from": "m"}, "export": export})
    found = {step.place.rpartition("/")[2]: step for step in chain.export_steps(made, "import")}
    assert list(found) == places
    for name, step in found.items():
        assert step.inputs["model"] == "import"
        quantised = places[0].startswith("hf-") and name[:2] not in ("hf", "gg")
        assert step.inputs.get("quantized") == (f"export/import/{places[0]}" if quantised else None)


def test_a_finetune_without_a_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="no model to start from"):
        steps(finetune={"sources": ["b"]})


def test_what_a_stage_needs() -> None:
    made = Recipe.model_validate(
        {"name": "x", "prep": {"sources": "a"}, "pretrain": {}, "finetune": {"sources": "b"}, "eval": {}, "export": {}}
    )
    every = chain.steps(made, Run(Path("/nowhere")))
    assert [step.place for step in chain.upstream(every, "pretrain")] == ["prep", "pretrain"]
    assert [step.place for step in chain.upstream(every, EXPORT)] == ["prep", "pretrain", "finetune", EXPORT]


def test_a_metric_that_is_no_number_passes_no_gate(tmp_path: Path) -> None:
    made = published(job(tmp_path, "eval/x", kind="evaluation"), metrics={"val_loss": float("nan"), "accuracy": 0.5})
    for rule in ("<9", ">0"):
        with pytest.raises(GateError, match="val_loss is no number"):
            chain.gate(Recipe.model_validate({"name": "x", "eval": {"require": {"val_loss": rule}}}), made)
    both = Recipe.model_validate({"name": "x", "eval": {"require": {"val_loss": "<9", "accuracy": ">=0.6"}}})
    with pytest.raises(GateError, match=r"val_loss is no number, required <9; accuracy is 0\.5, required >=0\.6"):
        chain.gate(both, made)
    chain.gate(Recipe.model_validate({"name": "x", "eval": {"require": {"accuracy": ">=0.5"}}}), made)


# ------------------------------------------------------------------------------------------- up to date, and what not


def test_a_second_run_does_no_work(finished: Project) -> None:
    assert finished.states("t.toml") == up_to_date(*STAGES)
    before = finished.files()
    done = finished.llmctl("run", "t.toml", before="import sys; sys.modules['llmctl.prep.stage'] = None")
    assert done.code == 0, done.err
    assert "Nothing to do" in done.out
    assert finished.files() == before


def test_nothing_but_contents_counts(finished: Project) -> None:
    """Another time, inode or owner of a source is no reason to make anything again."""
    source = finished.path / "text" / "string.py"
    os.utime(source, (1, 1))
    copy = source.with_suffix(".new")
    shutil.copyfile(source, copy)
    copy.replace(source)
    assert finished.states("t.toml") == up_to_date(*STAGES)
    assert "Nothing to do" in finished.llmctl("run", "t.toml").out


def test_one_byte_of_prep_remakes_what_depends_on_it(finished: Project) -> None:
    source = finished.path / "text" / "string.py"
    text = source.read_bytes()
    source.write_bytes(text[:100] + bytes([text[100] ^ 1]) + text[101:])
    before = finished.identities()
    assert finished.states("t.toml") == up_to_date()
    assert finished.reasons(PREP, "t.toml") == ["text changed (string.py)"]
    assert finished.reasons(PRETRAIN, "t.toml") == ["its input is not up to date"]
    assert finished.llmctl("run", "t.toml").code == 0
    after = finished.identities()
    assert [place for place in STAGES if before[place] == after[place]] == []
    source.write_bytes(text)
    assert finished.llmctl("run", "t.toml").code == 0
    assert finished.identities() == before  # the same in, the same out


def test_one_byte_of_the_chats_leaves_pretraining_alone(finished: Project) -> None:
    chats = finished.path / "chats.jsonl"
    chats.write_text(chats.read_text().replace("It is 4.", "It is 5."))
    assert finished.reasons(FINETUNE, "t.toml") == ["chats.jsonl changed (chats.jsonl)"]
    before, inodes = finished.identities(), finished.files()
    assert finished.llmctl("run", "t.toml").code == 0
    after = finished.identities()
    assert {place for place in STAGES if before[place] == after[place]} == {PREP, PRETRAIN}
    weights = str(finished.run / PRETRAIN / "model.safetensors")
    assert finished.files()[weights] == inodes[weights]


def test_a_file_more_and_a_file_less_are_named(finished: Project) -> None:
    (finished.path / "text" / "more.py").write_text("x = 1\n")
    assert finished.reasons(PREP, "t.toml") == ["text changed (more.py)"]
    (finished.path / "text" / "more.py").unlink()
    (finished.path / "text" / "string.py").unlink()
    assert finished.reasons(PREP, "t.toml") == ["text changed (string.py)"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are always UTF-8")
def test_a_file_name_that_is_no_utf8(fresh: Project) -> None:
    """An old archive's caf\\xe9.txt: read like any other, and named so that a terminal and a manifest can take it."""
    path = os.fsencode(fresh.path / "text") + b"/caf\xe9.txt"
    with open(path, "wb") as stream:
        stream.write(b"something to read " * 100)
    assert fresh.llmctl("prep", "t.toml").code == 0
    with open(path, "ab") as stream:
        stream.write(b"and more")
    assert fresh.reasons(PREP, "t.toml") == ["text changed (caf\\xe9.txt)"]


CHANGES = {
    "a key": ("vocab_size = 400", "vocab_size = 401", PREP, "[prep.tokenizer] vocab_size 400 -> 401"),
    "a default": ("depth = 1", "depth = 1\nfamily = 'llama'", PRETRAIN, "[model] family qwen3 -> llama"),
    "a derived value": ("depth = 1", "depth = 1\nhidden_size = 64", PRETRAIN, "[model] hidden_size default -> 64"),
    "the seed": ("seed = 3", "seed = 4", PREP, "seed 3 -> 4"),
    "a list": ('["text"]', '["text", "chats.jsonl"]', PREP, '[prep] sources ["text"] -> ["text", "chats.jsonl"]'),
    "finetune": ("save_every = 2\n", "save_every = 2\nmethod = 'lora'\n", FINETUNE, "[finetune] method full -> lora"),
    "eval": ("max_new_tokens = 8", "max_new_tokens = 9", EVAL, "[eval] max_new_tokens 8 -> 9"),
    "export": ("[export]", '[export]\ntext = "text"', EXPORT, '[export] text "" -> text'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_is_stale_for_the_exact_reason(finished: Project, change: str) -> None:
    old, new, place, reason = CHANGES[change]
    finished.edit(old, new)
    assert reason in finished.reasons(place, "t.toml")
    states = finished.states("t.toml")
    before = STAGES[: STAGES.index(place)]
    assert {name for name in STAGES if states[name] == "up to date"} >= set(before)
    assert states[place] == "stale"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("save_every = 3", "save_every = 4"),
        ("save_every = 3\nlog_every = 1", "save_every = 3\nlog_every = 5"),
        ("[export]", '[eval.require]\nval_loss = "<99"\n[export]'),
        ("[export]", "[serve]\nport = 9000\n[export]"),
        ("[model]", "# a comment\n[model]"),
    ],
)
def test_how_a_call_runs_makes_nothing_stale(finished: Project, old: str, new: str) -> None:
    finished.edit(old, new)
    assert finished.states("t.toml") == up_to_date(*STAGES)


def test_a_new_version_of_the_data_makes_it_stale(finished: Project) -> None:
    newer = (
        "import dataclasses; from llmctl import chain; "
        "chain.STAGES['export'] = dataclasses.replace(chain.STAGES['export'], version=99)"
    )
    done = finished.llmctl("status", "t.toml", "--json", before=newer)
    assert done.json["stages"][EXPORT]["reasons"] == ["llmctl writes other export now (version 2 -> 99)"]


# ------------------------------------------------------------------------------------------------------- unverifiable


def moved(project: Project) -> Project:
    """runs/ alone, in a folder on a machine that has neither the recipe nor the sources."""
    folder = project.path.parent / "elsewhere"
    shutil.copytree(project.path / "runs", folder / "runs", symlinks=True)
    shutil.rmtree(project.path)
    return Project(folder, project.warm)


def test_runs_copied_without_their_sources_are_unverifiable(finished: Project) -> None:
    copied = moved(finished)
    states = copied.states()
    assert states == {
        PREP: "unverifiable",
        PRETRAIN: "up to date",
        FINETUNE: "unverifiable",
        EVAL: "unverifiable",
        EXPORT: "up to date",
    }
    assert copied.reasons(PREP) == ["not here: text"]


def test_runs_copied_without_their_sources_still_work(finished: Project) -> None:
    copied = moved(finished)
    before = copied.identities()
    assert "Nothing to do" in copied.llmctl("run", "runs/t").out
    hf = copied.llmctl("export", "runs/t", "--hf")
    assert hf.code == 0, hf.err
    shutil.rmtree(copied.run / "export" / "finetune" / "onnx-ort")
    onnx = copied.llmctl("export", "--onnx")
    assert onnx.code == 0, onnx.err
    after = copied.identities()
    assert after.items() >= before.items()  # nothing was trained again, and the export is the same to the last byte
    base = copied.llmctl("eval", "runs/t/pretrain")  # on the validation split, which travels in prep
    assert base.code == 0, base.err
    shutil.rmtree(copied.run / "eval")
    evaluated = copied.llmctl("eval", "--set", f"eval.text={copied.run / 'pretrain' / 'config.json'}")
    assert evaluated.code == 3  # its chats are not here
    assert "chats.jsonl" in evaluated.err


def test_an_absent_source_that_must_be_read_is_an_error(finished: Project) -> None:
    copied = moved(finished)
    shutil.rmtree(copied.run / PREP)
    done = copied.llmctl("prep", "runs/t")
    assert done.code == 3
    assert "text" in done.err
    assert copied.states()[PREP] == "missing"  # and status still tells how the rest stands


# ------------------------------------------------------------------------------------------------------------- flags


def test_dry_run_says_what_it_would_do_and_does_nothing(fresh: Project, finished: Project) -> None:
    done = fresh.llmctl("run", "t.toml", "--dry-run")
    assert done.code == 0
    assert done.out.count("would be made (missing)") == 5
    assert not (fresh.path / "runs").exists()
    finished.edit("max_steps = 6", "max_steps = 7")
    before = finished.files()
    told = finished.llmctl("run", "t.toml", "--dry-run").out.splitlines()
    assert [line.split()[0] for line in told if "would be kept" in line] == [PREP, PRETRAIN]
    assert any("[finetune] max_steps 6 -> 7" in line for line in told)
    assert finished.files() == before


def test_rebuild_makes_what_was_named_again(finished: Project) -> None:
    inode = {place: (finished.run / place).stat().st_ino for place in STAGES}
    identities = finished.identities()

    def remade(*args: str) -> list[str]:
        done = finished.llmctl(*args, "--rebuild")
        assert done.code == 0, done.err
        now = {place: (finished.run / place).stat().st_ino for place in STAGES}
        changed = [place for place in STAGES if now[place] != inode[place]]
        inode.update(now)
        return changed

    assert remade("prep", "t.toml") == [PREP]
    assert remade("finetune", "t.toml") == [FINETUNE]
    assert remade("eval", "t.toml") == [EVAL]
    assert remade("export") == [EXPORT]
    assert remade("run", "t.toml") == list(STAGES)
    assert finished.identities() == identities


def test_no_upstream_refuses_instead(fresh: Project) -> None:
    done = fresh.llmctl("finetune", "t.toml", "--no-upstream")
    assert done.code == 2
    assert "prep is missing, and --no-upstream was given" in done.err
    assert not list((fresh.path / "runs").rglob("artifact.json"))
    assert fresh.llmctl("prep", "t.toml", "--no-upstream").code == 0
    assert fresh.llmctl("pretrain", "t.toml", "--no-upstream").code == 0


def test_training_stages_make_what_is_missing_before_them_and_others_do_not(fresh: Project) -> None:
    for stage in ("eval", "export", "serve", "chat"):
        done = fresh.llmctl(stage, "t.toml")
        assert done.code == 2, (stage, done.err)
        assert "no model yet" in done.err
    assert not list(fresh.path.rglob("artifact.json"))
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert set(fresh.identities()) == {PREP, PRETRAIN}


def test_a_stage_the_recipe_does_not_have(fresh: Project) -> None:
    fresh.recipe.write_text(fresh.recipe.read_text().partition("[finetune]")[0])
    done = fresh.llmctl("finetune", "t.toml")
    assert done.code == 2
    assert "has no [finetune] section" in done.err


def test_overrides_are_part_of_what_was_made(finished: Project) -> None:
    assert finished.llmctl("finetune", "t.toml", "--set", "finetune.max_steps=5").code == 0
    assert finished.reasons(FINETUNE, "t.toml") == ["[finetune] max_steps 5 -> 6"]
    assert finished.states("runs/t")[FINETUNE] == "up to date"


# ---------------------------------------------------------------------------------------- expensive, and unfinished


def costing(project: Project, place: str, seconds: float) -> None:
    path = project.run / place / "artifact.json"
    manifest = json.loads(path.read_text())
    manifest["times"]["seconds"] = seconds
    path.write_text(json.dumps(manifest))


def test_an_expensive_artifact_is_only_remade_when_told_to(finished: Project) -> None:
    costing(finished, PRETRAIN, 3600)
    finished.edit("max_steps = 12", "max_steps = 11")
    before = finished.files()
    done = finished.llmctl("run", "t.toml")
    assert done.code == 2
    assert "pretrain is stale ([pretrain] max_steps 12 -> 11) and took 1 h 00 min to make" in done.err
    assert "llmctl pretrain t.toml --rebuild" in done.err
    assert finished.files() == before
    assert finished.llmctl("pretrain", "t.toml", "--rebuild").code == 0
    assert finished.llmctl("run", "t.toml").code == 0


def test_an_expensive_artifact_is_refused_before_its_cheap_input_is_remade(finished: Project) -> None:
    costing(finished, PRETRAIN, 3600)
    finished.edit("vocab_size = 400", "vocab_size = 410")
    before = finished.files()
    done = finished.llmctl("run", "t.toml")
    assert done.code == 2
    assert "pretrain is stale (prep: [prep.tokenizer] vocab_size 400 -> 410)" in done.err
    assert finished.files() == before


def test_a_damaged_expensive_artifact_is_not_remade_unasked(finished: Project) -> None:
    costing(finished, PRETRAIN, 3600)
    (finished.run / PRETRAIN / "model.safetensors").unlink()
    done = finished.llmctl("run", "t.toml")
    assert done.code == 2
    assert "model.safetensors is missing" in done.err


def test_a_damaged_cheap_artifact_is_remade(finished: Project) -> None:
    before = finished.identities()
    (finished.run / PRETRAIN / "model.safetensors").write_bytes(b"short")
    assert finished.states("t.toml")[PRETRAIN] == "stale"
    assert finished.llmctl("run", "t.toml").code == 0
    assert finished.identities() == before


STOP = """
import os, llmctl.training.checkpoint as c
write = c.write
def deadly(work, state, *more):
    write(work, state, *more)
    if state['step'] == {}:
        os.kill(os.getpid(), 9)
c.write = deadly
"""


def unfinished(project: Project, stage: str = "pretrain", step: int = 6) -> None:
    """A training that was killed right after its checkpoint of `step`."""
    assert project.llmctl(stage, "t.toml", before=STOP.format(step)).code == -9
    assert (project.run / ".work" / stage / f"step-{step:08}").exists()


def test_an_unfinished_training_goes_on(fresh: Project, finished: Project) -> None:
    unfinished(fresh)
    assert fresh.states("t.toml")[PRETRAIN] == "unfinished"
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0
    assert "resuming at step 6 of 12" in done.out
    assert fresh.weights() == finished.weights()
    assert not (fresh.run / ".work" / "pretrain").exists()


def test_an_unfinished_training_with_another_recipe_is_refused_with_a_diff(fresh: Project, finished: Project) -> None:
    """Fault 7, from the recipe's side."""
    unfinished(fresh)
    fresh.edit("max_steps = 12", "max_steps = 20")
    fresh.edit("depth = 1", "depth = 2")
    before = fresh.files()
    for command in ("pretrain", "run", "finetune"):
        done = fresh.llmctl(command, "t.toml", "--json")
        assert done.code == 2, done.err
        error = done.json["error"]
        assert "the unfinished pretrain in runs/t was started with other settings:" in error["message"]
        assert "   [model] depth 1 -> 2\n" in error["message"]
        assert "   [pretrain] max_steps 12 -> 20\n" in error["message"]
        assert "Nothing was touched." in error["message"]
        assert "llmctl pretrain runs/t" in error["hint"]
        assert "--rebuild" in error["hint"]
        assert fresh.files() == before
    done = fresh.llmctl("pretrain", "runs/t")  # goes on as it was
    assert done.code == 0, done.err
    assert "t.toml has changed since" in done.out
    assert "resuming at step 6 of 12" in done.out
    assert fresh.weights() == finished.weights()


def test_an_unfinished_training_whose_data_changed_is_refused_before_prep_is_remade(
    fresh: Project, finished: Project
) -> None:
    """Fault 7, from the data's side."""
    unfinished(fresh)
    source = fresh.path / "text" / "string.py"
    source.write_text("# more\n" + source.read_text())
    before = fresh.files()
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 2
    assert "   prep: text changed (string.py)\n" in done.err
    assert fresh.files() == before
    done = fresh.llmctl("pretrain", "runs/t")  # with the tokens that it was started with
    assert done.code == 0, done.err
    assert fresh.weights() == finished.weights()


def test_an_unfinished_finetune_whose_chats_changed_is_refused(finished: Project) -> None:
    shutil.rmtree(finished.run / FINETUNE)
    unfinished(finished, "finetune", 4)
    chats = finished.path / "chats.jsonl"
    chats.write_text(chats.read_text().replace("It is 4.", "It is 5."))
    for target in ("t.toml", "runs/t"):
        done = finished.llmctl("finetune", target)
        assert done.code == 2
        assert "chats.jsonl changed" in done.err
        assert "go on as it was" not in done.err  # it can't: the chats it was started with are gone


def test_an_unfinished_training_can_be_dropped(fresh: Project) -> None:
    unfinished(fresh)
    fresh.edit("max_steps = 12", "max_steps = 4")
    done = fresh.llmctl("pretrain", "t.toml", "--rebuild")
    assert done.code == 0
    assert "starting pretrain over; its unfinished work is dropped" in done.out
    assert fresh.manifest(PRETRAIN)["metrics"]["steps"] == 4


def test_leftovers_of_a_finished_training_are_never_resumed(finished: Project) -> None:
    """Killed while tidying up after publishing: checkpoints may lie there without the settings they belong to."""
    shutil.rmtree(finished.run / FINETUNE)
    unfinished(finished, "finetune", 4)
    (finished.run / ".work" / "finetune" / "settings.json").unlink()
    finished.edit("max_steps = 6", "max_steps = 5")
    done = finished.llmctl("finetune", "t.toml")
    assert done.code == 0, done.err
    assert "resuming" not in done.out
    assert finished.manifest(FINETUNE)["metrics"]["steps"] == 5


def test_the_kept_recipe_changes_only_when_something_is_made(fresh: Project) -> None:
    unfinished(fresh)
    kept = (fresh.run / "recipe.resolved.toml").read_text()
    fresh.edit("max_steps = 12", "max_steps = 20")
    fresh.llmctl("pretrain", "t.toml")
    fresh.llmctl("status", "t.toml")
    assert (fresh.run / "recipe.resolved.toml").read_text() == kept
    assert fresh.llmctl("prep", "t.toml").code == 0  # up to date: what is begun still goes on as it was
    assert fresh.llmctl("prep", "t.toml", "--rebuild").code == 0
    assert (fresh.run / "recipe.resolved.toml").read_text() == kept
    assert "resuming at step 6 of 12" in fresh.llmctl("pretrain", "runs/t").out


def test_the_kept_recipe_follows_keys_that_make_nothing(finished: Project) -> None:
    finished.edit("[export]", "[serve]\nport = 9123\n[export]")
    assert "Nothing to do" in finished.llmctl("run", "t.toml").out
    assert "port = 9123" in (finished.run / "recipe.resolved.toml").read_text()


# ------------------------------------------------------------------------------------------------------ runs/current


def test_only_a_stage_that_succeeded_becomes_the_current_run(fresh: Project) -> None:
    current = fresh.path / "runs" / "current"
    fresh.edit("vocab_size = 400", "vocab_size = 100_000")
    assert fresh.llmctl("prep", "t.toml").code == 3
    assert not os.path.lexists(current)
    fresh.edit("vocab_size = 100_000", "vocab_size = 400")
    assert fresh.llmctl("prep", "t.toml").code == 0
    assert os.readlink(current) == "t"
    fresh.recipe.write_text(fresh.recipe.read_text().replace('"t"', '"u"').replace("400", "100_000"))
    assert fresh.llmctl("prep", "t.toml").code == 3
    assert os.readlink(current) == "t"
    assert fresh.llmctl("status", "runs/t").code == 0
    assert os.readlink(current) == "t"


# ------------------------------------------------------------------------------------------------ models from outside


def test_weights_of_a_model_from_outside_are_watched(finished: Project) -> None:
    """A bare folder whose weights were replaced is another model: yesterday's import of it must not be measured."""
    bare = finished.path / "bare"
    shutil.copytree(finished.run / FINETUNE, bare, ignore=shutil.ignore_patterns("artifact.json", "*.jsonl"))
    first = finished.llmctl("export", "bare", "--hf", "--json")
    assert first.code == 0, first.err
    assert finished.llmctl("export", "bare", "--hf", "--json").json["identity"] == first.json["identity"]
    shutil.copyfile(finished.run / PRETRAIN / "model.safetensors", bare / "model.safetensors")
    second = finished.llmctl("export", "bare", "--hf", "--json")
    assert second.code == 0, second.err
    assert second.json["identity"] != first.json["identity"]


def test_a_tokenizer_from_outside_is_watched_but_not_its_neighbours(finished: Project) -> None:
    other = finished.path / "other"
    shutil.copytree(finished.run / PREP, other)
    finished.edit("vocab_size = 400", 'from = "other"')
    assert finished.llmctl("prep", "t.toml").code == 0
    (other / "README.md").write_text("hello")
    assert finished.states("t.toml")[PREP] == "up to date"
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert finished.reasons(PREP, "t.toml") == ["other changed (tokenizer.json)"]
