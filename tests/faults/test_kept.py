"""Models that a training keeps on its way, and explicit paths to damaged ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.faults.harder import begun_again
from tests.project import Project


def test_so_many_checkpoints_as_asked_for(fresh: Project) -> None:
    """keep_last is operational: an unfinished training goes on with another one."""
    fresh.edit("save_every = 3", "save_every = 1\nkeep_last = 4")
    assert fresh.llmctl("pretrain", "t.toml", "--until-step", 7).code == 0
    work = fresh.run / ".work" / "pretrain"
    assert sorted(path.name for path in work.glob("step-*")) == [f"step-{step:08}" for step in (4, 5, 6, 7)]
    fresh.edit("keep_last = 4", "keep_last = 1")
    done = fresh.llmctl("pretrain", "t.toml", "--until-step", 8)
    assert "resuming at step 7 of 12" in done.out
    assert sorted(path.name for path in work.glob("step-*")) == ["step-00000008"]


def test_a_model_that_is_kept_is_that_of_its_step(whole: Project, tmp_path: Path) -> None:
    """The average at that step, where there is one; every command takes it."""
    made = begun_again(whole, "pretrain", tmp_path / "made")
    assert made.llmctl("pretrain", "t.toml", "--until-step", 8).code == 0
    average = load_file(made.run / ".work/pretrain/step-00000008/ema.safetensors")
    kept = load_file(made.run / "checkpoints/pretrain/step-00000008/model.safetensors")
    assert kept.keys() == average.keys()
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    folder = "runs/t/checkpoints/pretrain/step-00000008"
    done = made.llmctl("export", folder, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["artifact"]) == Path("runs/t/export/checkpoints.pretrain.step-00000008/onnx-ort")
    talk = made.llmctl("chat", folder, "-p", "x", "--max-tokens", "2")
    assert "checkpoints.pretrain.step-00000008/onnx-ort is a base model" in talk.err
    assert made.llmctl("eval", folder).code == 0
    done = made.llmctl("pretrain", "t.toml", "--run-dir", "runs/on", "--set", f"model.from={folder}", "--until-step", 1)
    assert done.code == 0, done.err
    assert made.llmctl("verify", "runs/t").code == 0


def test_a_finetune_is_kept_as_it_would_be_published(whole: Project) -> None:
    folder = whole.run / "checkpoints" / "finetune" / "step-00000016"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "chat_template.jinja"}
    assert whole.llmctl("chat", folder, "-p", "x", "--max-tokens", "2").code == 0


def test_a_damaged_model_that_is_named_is_an_error(whole: Project) -> None:
    """Fault 2: an explicit path never falls back to another one."""
    folder = Path("runs/t/checkpoints/pretrain/step-00000008")
    path = whole.path / folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = whole.identities()
    start = ("--run-dir", "runs/on", "--set", f"model.from={folder}")
    for args in (("eval", folder), ("export", folder), ("pretrain", "t.toml", *start)):
        done = whole.llmctl(*args, "--json")
        assert done.code == 3, (args, done.err)
        assert "model.safetensors is damaged" in done.json["error"]["message"]
        assert str(folder) in done.json["error"]["file"]
    assert whole.identities() == before
