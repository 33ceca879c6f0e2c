"""What a target names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.project import STAGES, Project

FINETUNE, ONNX = "finetune", "export/finetune/onnx-ort"


def said(project: Project, *args: object, env: dict[str, str] | None = None) -> str:
    done = project.llmctl("status", *args, env=env)
    assert done.code == 0, done.err
    return done.out.splitlines()[0]


def test_a_recipe_a_run_and_an_artifact(finished: Project) -> None:
    assert said(finished, "t.toml").split()[0] == "t"  # a recipe needs no words: it was named
    assert said(finished, "runs/t") == "run runs/t"
    short = finished.identities()[FINETUNE][:8]
    assert said(finished, "runs/t/finetune") == f"runs/t/finetune: finetune {short}"
    assert said(finished, finished.run / FINETUNE) == f"{finished.run / FINETUNE}: finetune {short}"


def test_the_artifact_that_was_named_is_the_one_that_is_taken(finished: Project) -> None:
    done = finished.llmctl("export", "runs/t/pretrain", "--hf", "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/t/export/pretrain/hf"
    done = finished.llmctl("eval", ONNX.join(["runs/t/", ""]), "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/t/eval/finetune.onnx-ort"


def test_an_artifact_that_is_no_model_is_refused_by_what_it_is(finished: Project) -> None:
    done = finished.llmctl("export", "runs/t/prep")
    assert done.code == 2
    assert "runs/t/prep holds tokens, not a model" in done.err


def test_without_a_target(finished: Project) -> None:
    other = finished.path / "runs" / "other"
    shutil.copytree(finished.run, other)
    assert said(finished) == "run runs/t (runs/current)"
    assert said(finished, env={"LLMCTL_RUN": "runs/other"}) == "run runs/other (LLMCTL_RUN)"
    assert said(finished, env={"LLMCTL_RUN": str(other)}) == f"run {other} (LLMCTL_RUN)"
    assert said(finished, "--run-dir", "runs/t", env={"LLMCTL_RUN": "runs/other"}) == "run runs/t (--run-dir)"
    assert said(finished, "runs/t", env={"LLMCTL_RUN": "runs/other"}) == "run runs/t"
    assert said(finished, "runs/current") == "run runs/t"
    assert said(finished, env={"LLMCTL_RUN": "runs/t/pretrain"}).startswith("runs/t/pretrain: pretrain ")


def test_without_a_target_and_without_a_run_the_candidates_are_listed(fresh: Project) -> None:
    for command in ("status", "export", "serve", "run", "verify", "report", "chat"):
        done = fresh.llmctl(command)
        assert done.code == 2, command
        assert "no target, and runs/current is not there" in done.err
        assert "recipes: t.toml" in done.err
    assert not (fresh.path / "runs").exists()


def test_candidates_name_the_runs(finished: Project) -> None:
    (finished.path / "runs" / "current").unlink()
    assert "runs: runs/t" in finished.llmctl("status").err
    empty = finished.path / "empty"
    empty.mkdir()
    assert "llmctl init FOLDER" in finished.warm.run("status", cwd=empty).err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("runs/typo", "runs/typo: no such recipe, run or artifact"),
        ("typo.toml", "no such recipe"),
        ("text", "text is neither a recipe nor a run, an artifact or a Hugging Face folder"),
        ("text/string.py", "not TOML"),
        ("a\0b", "no such recipe, run or artifact"),
        ("", "no such recipe, run or artifact"),
    ],
)
def test_a_mistyped_path_is_an_error_and_nothing_starts(finished: Project, target: str, message: str) -> None:
    """Fault 8."""
    before = finished.files()
    for command in ("pretrain", "run", "export", "status"):
        done = finished.llmctl(command, target)
        assert done.code == 2, (command, done.out)
        assert message in done.err
    assert finished.files() == before


@pytest.mark.parametrize(
    ("run_dir", "why"),
    [
        ("text", "text is no run"),
        ("t.toml", "t.toml is a file"),
        ("t.toml/x", "t.toml is a file"),
        ("", ". is no run"),
        (".", ". is no run"),
        ("runs/t/pretrian", "lies inside the run"),
        ("runs/t/pretrain", "lies inside the run"),
        ("runs/t/.work/pretrain/step-00000003", "lies inside the run"),
    ],
)
def test_a_mistyped_run_folder_is_an_error_and_nothing_starts(finished: Project, run_dir: str, why: str) -> None:
    """Fault 8, where a recipe is named too: what can be no run's folder is not made into one."""
    before = finished.files()
    for command in ("pretrain", "run"):
        done = finished.llmctl(command, "t.toml", "--run-dir", run_dir)
        assert done.code == 2, (command, done.out, done.err)
        assert why in done.err
    assert finished.files() == before


def test_a_run_folder_that_is_new_is_told(finished: Project) -> None:
    """Fault 8: a mistyped one that could be meant is never begun in silence."""
    done = finished.llmctl("prep", "t.toml", "--run-dir", "runs/tt")
    assert done.code == 0, done.err
    assert "note: runs/tt is a new run" in done.out
    assert "is a new run" not in finished.llmctl("prep", "t.toml", "--run-dir", "runs/tt").out
    (finished.path / "empty").mkdir()
    assert finished.llmctl("prep", "t.toml", "--run-dir", "empty").code == 0
    (finished.path / "ci").mkdir()
    (finished.path / "ci" / "doctor.json").write_text("{}")  # what a script wrote there before
    assert finished.llmctl("prep", "t.toml", "--run-dir", "ci").code == 0


@pytest.mark.parametrize(
    "source",
    ["runs/typo", "text", "t.toml", "runs", "runs/t/.work", "runs/t/checkpoints/pretrain/step-00000004", "a\0b", None],
)
def test_a_mistyped_model_to_start_from_is_an_error_and_nothing_trains(finished: Project, source: str | None) -> None:
    """Fault 8: `[model] from`; None is a script's variable that is not set."""
    (finished.run / ".work").mkdir(exist_ok=True)
    keys = json.dumps(source) if source is not None else ""
    done = finished.llmctl("pretrain", "t.toml", "--run-dir", "runs/new", "--set", f"model.from={keys}", "--json")
    assert done.code in (2, 3), done.err
    assert done.json["error"]["code"] in ("recipe", "data")
    assert not (finished.path / "runs/new/pretrain").exists()
    assert not (finished.path / "runs/new/.work/pretrain").exists()


@pytest.mark.parametrize("variable", ["runs/typo", "t.toml/x"])
def test_a_mistyped_variable_is_an_error(finished: Project, variable: str) -> None:
    done = finished.llmctl("status", env={"LLMCTL_RUN": variable})
    assert done.code == 2
    assert f"{variable} is not there" in done.err
    assert "runs: runs/t" in done.err


def test_a_run_folder_of_ones_own(fresh: Project) -> None:
    done = fresh.llmctl("prep", "t.toml", "--run-dir", "deep/er/mine")
    assert done.code == 0, done.err
    assert (fresh.path / "deep/er/mine/prep/artifact.json").exists()
    assert not (fresh.path / "runs").exists()
    assert said(fresh, "deep/er/mine") == "run deep/er/mine"


def bare(project: Project) -> Path:
    """A Hugging Face folder as one downloads it."""
    folder = project.path / "hub" / "My-Model"
    shutil.copytree(project.run / FINETUNE, folder, ignore=shutil.ignore_patterns("artifact.json", "*.jsonl"))
    return folder


def test_a_bare_folder_is_imported_first(finished: Project) -> None:
    bare(finished)
    before = finished.identities()
    done = finished.llmctl("export", "hub/My-Model", "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/My-Model/export/import/onnx-ort"
    assert "hub/My-Model, imported as runs/My-Model" in done.err
    assert (finished.path / "runs/My-Model/import/model.safetensors").read_bytes() == finished.weights(FINETUNE)
    again = finished.llmctl("export", "hub/My-Model", "--json")
    assert again.json["identity"] == done.json["identity"]
    hf = finished.llmctl("export", "hub/My-Model", "--hf", "--json")
    assert hf.json["artifact"] == "runs/My-Model/export/import/hf"
    assert finished.identities() == before
    assert said(finished, "runs/My-Model") == "run runs/My-Model"


def test_two_bare_folders_of_one_name_are_two_models(finished: Project) -> None:
    shutil.copytree(bare(finished), finished.path / "other" / "My-Model")
    shutil.copyfile(finished.run / "pretrain/model.safetensors", finished.path / "other/My-Model/model.safetensors")
    for folder, place in (("hub", FINETUNE), ("other", "pretrain"), ("hub", FINETUNE)):
        assert finished.llmctl("export", f"{folder}/My-Model", "--hf").code == 0
        weights = (finished.path / "runs/My-Model/export/import/hf/model.safetensors").read_bytes()
        assert weights == finished.weights(place)


def test_an_artifact_that_was_copied_out_of_its_run_is_a_model_like_any_other(finished: Project) -> None:
    shutil.copytree(finished.run / FINETUNE, finished.path / "hub" / "copied")
    done = finished.llmctl("export", "hub/copied", "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/copied/export/import/onnx-ort"
    assert [path.name for path in (finished.path / "hub").iterdir()] == ["copied"]


def test_a_dry_run_imports_nothing(finished: Project) -> None:
    bare(finished)
    done = finished.llmctl("export", "hub/My-Model", "--dry-run")
    assert done.code == 2
    assert "would be imported into a run first" in done.err
    assert not (finished.path / "runs" / "My-Model").exists()


def test_a_folder_with_pickled_weights_only_is_refused(finished: Project) -> None:
    """Fault 13: nothing is unpickled, whatever the folder is called."""
    folder = bare(finished)
    (folder / "model.safetensors").unlink()
    payload = b"cos\nsystem\n(S'touch hacked'\ntR."
    (folder / "pytorch_model.bin").write_bytes(payload)
    done = finished.llmctl("export", "hub/My-Model")
    assert done.code == 3
    assert not (finished.path / "hacked").exists()


def test_the_run_is_mended_before_it_is_read(finished: Project) -> None:
    """A kill between the two renames of publishing: every command, not just the next training, sees the old one."""
    for command in (("status",), ("export", "--dry-run"), ("verify",)):
        (finished.run / FINETUNE).rename(finished.run / ".old-finetune")
        done = finished.llmctl(command[0], "runs/t", *command[1:])
        assert done.code == 0, (command, done.err)
        assert (finished.run / FINETUNE).exists(), command
    assert "finetune" in finished.llmctl("export", "runs/t", "--json").json["artifact"]


def test_a_run_that_is_being_written_is_left_alone(finished: Project) -> None:
    (finished.run / FINETUNE).rename(finished.run / ".old-finetune")
    (finished.run / ".staging-finetune").mkdir()
    holder = """
import fcntl, os, time
fcntl.flock(os.open("runs/t/.lock", os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(30)
"""
    call = finished.start("--version", before=holder)
    call.until("held")
    try:
        assert finished.states("runs/t")["finetune"] != "up to date"
        assert (finished.run / ".staging-finetune").exists()
        assert (finished.run / ".old-finetune").exists()
    finally:
        call.kill()
        call.wait()


def test_a_run_whose_recipe_is_gone_is_still_a_run(finished: Project) -> None:
    (finished.run / "recipe.resolved.toml").unlink()
    (finished.path / "runs" / "current").unlink()
    finished.run.rename(finished.path / "runs" / "my run")
    assert "llmctl verify" in finished.llmctl("status", "runs/my run").err
    done = finished.llmctl("export", "runs/my run", "--hf", "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"] == "runs/my run/export/finetune/hf"


def test_a_run_that_cannot_be_written_can_be_looked_at(finished: Project) -> None:
    for path in (finished.run, finished.run / ".lock"):
        path.chmod(0o555)
    try:
        assert set(finished.states("runs/t").values()) == {"up to date"}
        assert set(finished.states("runs/t")) == set(STAGES)
    finally:
        finished.run.chmod(0o755)


def test_the_current_run_may_be_deleted(finished: Project) -> None:
    shutil.rmtree(finished.run)
    done = finished.llmctl("status")
    assert done.code == 2
    assert "runs/t is not there" in done.err
    assert os.path.lexists(finished.path / "runs" / "current")
