"""The resume state: whole or absent, never believed unread, and never pickled."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

from llmctl.errors import RunError
from llmctl.model.transformer import Decoder
from llmctl.training import checkpoint, optim
from llmctl.training.checkpoint import State
from tests.faults.killing import killed_at
from tests.shapes import SHAPES
from tests.test_artifact import disk_of

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def built(seed: int = 1, steps: int = 1) -> tuple[Decoder, list[Optimizer]]:
    model = Decoder.random(SHAPES["qwen3"], seed)
    optimizers = optim.build(model, "muon", 0.01, 0.1)
    for _ in range(steps):
        model(torch.arange(10)[None]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


@pytest.fixture(scope="module")
def some() -> tuple[Decoder, list[Optimizer]]:
    return built()


def saved(work: Path, some: tuple[Decoder, list[Optimizer]], *steps: int) -> None:
    for step in steps:
        checkpoint.save(work, State(step, position=4 * step, tokens=100 * step, train_loss=2.5), *some)


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    torch.manual_seed(3)
    saved(tmp_path, some, 8)
    expected = torch.rand(3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    folder, state = found
    assert state == State(8, 32, 800, 0.0, 0, 2.5)
    model, optimizers = built(seed=2, steps=0)
    checkpoint.restore(folder, model, optimizers)
    assert torch.equal(torch.rand(3), expected)
    for one, other in zip(some[0].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for mine, other in zip(some[1], optimizers, strict=True):
        before = [slots for p in mine.param_groups[0]["params"] for slots in [mine.state[p]]]
        after = [slots for p in other.param_groups[0]["params"] for slots in [other.state[p]]]
        for one, two in zip(before, after, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


def test_the_last_two_are_kept(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    saved(tmp_path, some, 2, 4, 10, 100)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "none") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_a_damaged_one_falls_back_with_a_warning(
    tmp_path: Path, some: tuple[Decoder, list[Optimizer]], capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    """Fault 2, in every file of it."""
    saved(tmp_path, some, 2, 4)
    path = tmp_path / "step-00000004" / name
    content = path.read_bytes()
    middle = content.index(b"16") if name == "state.json" else len(content) // 2  # its position, 16: a digit flips
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"flip": flipped, "cut": content[:-9], "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        path.unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1].step == 2
    assert "warning: checkpoint step-00000004 is damaged" in capsys.readouterr().out


def test_every_bit_of_the_state_counts(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    """A flipped digit of the position would train on other data, and nobody would ever know."""
    saved(tmp_path, some, 4)
    path = tmp_path / "step-00000004" / "state.json"
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.parent.mkdir(exist_ok=True)
        shutil.copytree(path.parent, tmp_path / "kept", dirs_exist_ok=True)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        found = checkpoint.newest(tmp_path)
        assert found is None or found[1] == State(4, 16, 400, 0.0, 0, 2.5), content[max(0, at - 20) : at + 20]
        shutil.copytree(tmp_path / "kept", path.parent, dirs_exist_ok=True)
        path.write_bytes(content)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(
    tmp_path: Path, some: tuple[Decoder, list[Optimizer]]
) -> None:
    saved(tmp_path, some, 2, 4)
    (tmp_path / "step-00000004" / "model.safetensors").write_bytes(b"")
    assert checkpoint.newest(tmp_path) is not None
    saved(tmp_path, some, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1].step == 4
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_killed_at_any_moment_of_saving(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    """Fault 1: the checkpoint before, or this one; staging is never taken for one, and is swept."""
    model, optimizers = some
    steps = []
    for point in range(1000):
        work = tmp_path / str(point)
        saved(work, some, 2, 4)
        killed = killed_at(point, lambda work=work: checkpoint.save(work, State(6, 24), model, optimizers))
        found = checkpoint.newest(work)
        assert found is not None
        steps.append(found[1].step)
        saved(work, some, 6, 8)
        assert names(work) == ["step-00000006", "step-00000008"]
        shutil.rmtree(work)
        if not killed:
            break
    assert set(steps) == {4, 6}
    assert steps == sorted(steps)
    assert len(steps) > 15


@pytest.mark.parametrize("size", [100, 5_000, 60_000])
def test_disk_full(tmp_path: Path, some: tuple[Decoder, list[Optimizer]], size: int) -> None:
    """Fault 3."""
    saved(tmp_path, some, 2, 4)
    with disk_of(size), pytest.raises(RunError, match="cannot save the checkpoint of step 6") as caught:
        saved(tmp_path, some, 6)
    assert "make room" in caught.value.hint
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


class Payload:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, ("hacked", "w"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_never_opened(
    tmp_path: Path,
    some: tuple[Decoder, list[Optimizer]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
) -> None:
    """Fault 13: even one whose digest is right."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "work", some, 4)
    folder = tmp_path / "work" / "step-00000004"
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(Payload()))
    else:
        torch.save(Payload(), folder / name)
    if name != "state.json":
        state = json.loads((folder / "state.json").read_text())
        state["files"][name] = checkpoint.hash_file(folder / name)
        state["digest"] = checkpoint.digest({key: value for key, value in state.items() if key != "digest"})
        (folder / "state.json").write_text(json.dumps(state))
    model, optimizers = built(steps=0)
    found = checkpoint.newest(tmp_path / "work")
    if found is not None:
        with pytest.raises(Exception, match="eader"):
            checkpoint.restore(found[0], model, optimizers)
    assert not (tmp_path / "hacked").exists()
