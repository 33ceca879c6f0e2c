"""The resume state: whole or absent, never believed unread, and never pickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from llmctl.errors import DataError, RunError
from llmctl.model.transformer import Decoder
from llmctl.training import checkpoint, optim
from llmctl.training.checkpoint import Saver, State
from llmctl.training.guard import Guard
from llmctl.training.precision import LossScale
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
        Saver(work, *some).finish(State(step, position=4 * step, tokens=100 * step, train_loss=2.5))


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    torch.manual_seed(3)
    saved(tmp_path, some, 8)
    expected = torch.rand(3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    folder, state = found
    assert state == State(8, 32, 800, train_loss=2.5)
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


def test_the_last_ones_are_kept(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    saved(tmp_path, some, 2, 4, 10, 100)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    with Saver(tmp_path, *some, keep=3) as saver:
        saver.save(State(200))
        saver.save(State(300))
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00000300"]
    Saver(tmp_path, *some, keep=1).finish(State(300))
    Saver(tmp_path, *some, keep=1).finish(State(301))
    assert names(tmp_path) == ["step-00000301"]


def test_everything_that_a_continuation_needs(tmp_path: Path) -> None:
    """The average, fp16's scale and what the guard remembers, beside the model and its optimisers."""
    model, optimizers = built()
    ema = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    state = State(8, scale=LossScale(1024.0, 17), guard=Guard([2.5, 0.1 + 0.2], 3, 1))
    with Saver(tmp_path, model, optimizers, ema) as saver:
        saver.save(state)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == state
    other, others = built(seed=2, steps=0)
    average = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
    checkpoint.restore(found[0], other, others, average)
    assert all(torch.equal(average[name], ema[name]) for name in ema)


@pytest.mark.parametrize("how", ["another shape", "another optimiser", "an average", "no average of these"])
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, how: str) -> None:
    """Restored in part, it would train on with what nobody chose."""
    model, optimizers = built()
    with Saver(tmp_path, model, optimizers, {"x": torch.ones(2)} if how == "no average of these" else None) as saver:
        saver.save(State(8))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    other, others, ema = *built(steps=0), None
    if how == "another shape":
        other = Decoder.random(replace(SHAPES["qwen3"], vocab_size=SHAPES["qwen3"].vocab_size + 8), 1)
    elif how == "another optimiser":
        others = optim.build(other, "adamw", 0.01, 0.1)
    else:
        ema = {"y": torch.ones(2)}
    with pytest.raises(DataError, match="does not fit this training") as caught:
        checkpoint.restore(found[0], other, others, ema)
    assert caught.value.file == str(found[0])


# -------------------------------------------------------------------------------------------------- in the background


class Slow:
    """Writing that goes on only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began = threading.Semaphore(0), threading.Semaphore(0)
        self.fails: OSError | None = None
        really = checkpoint.save_file

        def slow(*args: Any) -> None:
            self.began.release()
            assert self.go.acquire(timeout=20)
            if self.fails is not None:
                raise self.fails
            really(*args)

        monkeypatch.setattr(checkpoint, "save_file", slow)


def test_what_is_written_is_what_was_saved_however_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, (model, optimizers) = Slow(monkeypatch), built()
    state, ema = State(5, guard=Guard([2.5])), {"x": torch.ones(3)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slots = {name: tensor.clone() for name, tensor in checkpoint.contents(model, optimizers, None)["optimizer"].items()}
    with Saver(tmp_path, model, optimizers, ema) as saver:
        saver.save(state)
        assert slow.began.acquire(timeout=20)
        assert names(tmp_path) == [".staging-step-00000005"]  # absent, until it is whole
        state.step = 6
        state.guard.recent.append(9.0)
        ema["x"].zero_()
        model(torch.arange(10)[None]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.rand(3)
        slow.go.release(3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == State(5, guard=Guard([2.5]))
    other, others = built(seed=2, steps=0)
    average = {"x": torch.zeros(3)}
    checkpoint.restore(found[0], other, others, average)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    again = checkpoint.contents(other, others, None)["optimizer"]
    assert again.keys() == slots.keys()
    assert all(torch.equal(tensor, slots[name]) for name, tensor in again.items())
    assert torch.equal(average["x"], torch.ones(3))


def test_the_copy_is_made_in_the_same_memory_each_time(tmp_path: Path, some: tuple[Decoder, list[Optimizer]]) -> None:
    places = []
    with Saver(tmp_path, *some) as saver:
        for step in range(1, 4):
            saver.save(State(step))
            copies = [tensor for tensors in saver._copies.values() for tensor in tensors.values()]
            places.append([tensor.data_ptr() for tensor in copies])
    assert places[0] == places[1] == places[2]


def test_one_is_written_at_a_time_and_the_last_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: tuple[Decoder, list[Optimizer]]
) -> None:
    slow, busy = Slow(monkeypatch), threading.active_count()
    with Saver(tmp_path, *some) as saver:
        assert threading.active_count() == busy  # no thread before the first save
        saver.save(State(1))
        assert slow.began.acquire(timeout=20)
        threading.Timer(0.2, slow.go.release, (6,)).start()
        saver.save(State(2))  # waits for the timer
        assert "step-00000001" in names(tmp_path)
        saver.finish(State(3))
        assert names(tmp_path) == ["step-00000002", "step-00000003"]
        saver.save(State(4))
        slow.go.release(2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert threading.active_count() == busy


@pytest.mark.parametrize("then", ["save", "finish", "the end"])
def test_a_failed_write_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: tuple[Decoder, list[Optimizer]], then: str
) -> None:
    """Fault 3: a disk that is full while the training goes on."""
    saved(tmp_path, some, 1, 2)
    slow = Slow(monkeypatch)
    slow.fails = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    slow.go.release(10)

    def training() -> None:
        with Saver(tmp_path, *some) as saver:
            saver.save(State(3))
            if then != "the end":
                getattr(saver, then)(State(4))

    with pytest.raises(RunError, match="cannot save the checkpoint of step 3: No space left on device") as caught:
        training()
    assert "make room" in caught.value.hint
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_failed_write_beside_another_error_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    some: tuple[Decoder, list[Optimizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = Slow(monkeypatch)
    slow.fails = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    slow.go.release(10)

    def training() -> None:
        with Saver(tmp_path, *some) as saver:
            saver.save(State(3))
            raise RunError("the loss was no number for 20 steps")

    with pytest.raises(RunError, match="no number"):
        training()
    assert "cannot save the checkpoint of step 3: No space left on device" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- damage and kills


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
        assert found is None or found[1] == State(4, 16, 400, train_loss=2.5), content[max(0, at - 20) : at + 20]
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


@pytest.mark.parametrize("background", [False, True])
def test_killed_at_any_moment_of_saving(
    tmp_path: Path, some: tuple[Decoder, list[Optimizer]], background: bool
) -> None:
    """Fault 1: the checkpoint before, or this one; staging is never taken for one, and is swept."""

    def save(work: Path) -> None:
        with Saver(work, *some) as saver:
            saver.save(State(6, 24)) if background else saver.finish(State(6, 24))

    steps = []
    for point in range(1000):
        work = tmp_path / str(point)
        saved(work, some, 2, 4)
        killed = killed_at(point, lambda work=work: save(work))
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
    with (
        disk_of(size),
        pytest.raises(RunError, match="cannot save the checkpoint of step 6"),
        Saver(tmp_path, *some) as saver,
    ):
        saver.save(State(6))
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
