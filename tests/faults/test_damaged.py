"""Damaged and hostile files where a training resumes and where a model is loaded."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.faults.harder import begun_again
from tests.project import Project
from tests.test_chain import unfinished


def test_a_damaged_checkpoint_falls_back(fresh: Project, finished: Project) -> None:
    """Fault 2: to the one before it, with a warning; and the weights are the same in the end."""
    unfinished(fresh, step=9)
    path = fresh.run / ".work/pretrain/step-00000009/model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0
    assert "checkpoint step-00000009 is damaged" in done.out
    assert "resuming at step 6 of 12" in done.out
    assert fresh.weights() == finished.weights()


def test_a_file_of_the_checkpoint_that_is_cut_off_falls_back(fresh: Project, finished: Project) -> None:
    """Fault 2, truncated."""
    unfinished(fresh, step=9)
    path = fresh.run / ".work/pretrain/step-00000009/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = fresh.llmctl("pretrain", "t.toml")
    assert "checkpoint step-00000009 is damaged" in done.out
    assert fresh.weights() == finished.weights()


def test_when_all_checkpoints_are_damaged_it_starts_over_and_says_so(fresh: Project, finished: Project) -> None:
    unfinished(fresh, step=6)
    for path in (fresh.run / ".work/pretrain").glob("step-*/state.json"):
        path.write_text("{}")
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0
    assert "warning: no checkpoint is left; pretrain starts over" in done.out
    assert fresh.weights() == finished.weights()


class Payload:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, ("hacked", "w"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_pickle_in_a_models_folder_is_never_opened(finished: Project, name: str) -> None:
    """Fault 13: under the very names that are read."""
    folder = finished.path / "hub"
    shutil.copytree(finished.run / "finetune", folder, ignore=shutil.ignore_patterns("artifact.json", "*.jsonl"))
    (folder / name).write_bytes(pickle.dumps(Payload()))
    for extra in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / extra).write_bytes(pickle.dumps(Payload()))
    done = finished.llmctl("export", "hub", "--json")
    assert done.code == (0 if name == "generation_config.json" and done.code == 0 else 3), done.err
    assert not list(finished.path.rglob("hacked"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "settings.json", "choices.json"]
)
def test_a_pickle_in_the_working_folder_is_never_opened(fresh: Project, finished: Project, name: str) -> None:
    """Fault 13: what is damaged is passed over."""
    unfinished(fresh, step=6)
    work = fresh.run / ".work" / "pretrain"
    path = work / name if (work / name).exists() else work / "step-00000006" / name
    path.write_bytes(pickle.dumps(Payload()))
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 0, done.err
    assert not list(fresh.path.rglob("hacked"))
    assert fresh.weights() == finished.weights()


@pytest.mark.slow
def test_a_pickle_in_any_file_of_a_run_is_never_opened(whole: Project, tmp_path: Path) -> None:
    """Fault 13: whatever a training reads, of what was made before it and of its own; each file in turn."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    assert made.llmctl("pretrain", "t.toml", "--until-step", 18).code == 0
    kept = made.path / "kept"
    shutil.copytree(made.run, kept)
    files = [path.relative_to(made.run) for path in sorted(made.run.rglob("*")) if path.is_file()]
    files = [file for file in files if file.parts[0] not in ("checkpoints", "logs", ".lock")]
    names = {path.name for path in files}
    assert names >= {"artifact.json", "index.json", "tokenizer.json", "train-00000.bin", "state.json", "settings.json"}
    assert names >= {"choices.json", "metrics.jsonl", "recipe.resolved.toml"}
    for file in files:
        (made.run / file).write_bytes(pickle.dumps(Payload()))
        done = made.llmctl("pretrain", "runs/t")
        assert done.code in (0, 2, 3, 4), (file, done.err)
        assert not list(made.path.rglob("hacked")), file
        shutil.rmtree(made.run)
        shutil.copytree(kept, made.run)
