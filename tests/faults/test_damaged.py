"""Damaged and hostile files where a training resumes and where a model is loaded."""

from __future__ import annotations

import pickle
import shutil

import pytest

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
    unfinished(fresh, step=6)
    work = fresh.run / ".work" / "pretrain"
    path = work / name if (work / name).exists() else work / "step-00000006" / name
    path.write_bytes(pickle.dumps(Payload()))
    done = fresh.llmctl("pretrain", "t.toml", "--json")
    assert done.code == 0, done.err
    assert not list(fresh.path.rglob("hacked"))
    assert fresh.weights() == finished.weights()
