"""The resume state of a training: weights, optimisers, loader position, random state. safetensors and JSON, never
pickle.

    .work/<stage>/step-00001200/   model.safetensors  optimizer.safetensors  ema.safetensors (where there is an average)
                                   state.json (written last, with digests)

A checkpoint is complete or absent: it is written aside, synced and renamed. The last ones are kept; a damaged one is
passed over with a warning. `Saver` copies what trains and writes it while the training goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmctl import console
from llmctl.artifact import digest, hash_file
from llmctl.errors import DataError, RunError
from llmctl.training import distributed, distributed_checkpoint, randomness
from llmctl.training.guard import Guard
from llmctl.training.precision import LossScale

KEEP = 2
Contents = dict[str, dict[str, Tensor]]  # file without its ending -> name -> tensor


@dataclass
class State:
    """Where a training stands; everything a bitwise continuation needs beside the tensors."""

    step: int = 0  # finished steps
    position: int = 0  # of the loader
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sessions
    skipped: int = 0
    train_loss: float = 0.0  # nats a token, smoothed
    scale: LossScale | None = None  # of fp16
    guard: Guard = field(default_factory=Guard)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> State:
        """What `asdict` made of it.

        Raises:
            TypeError: a key that is none of its fields.
        """
        scale, guard = raw.get("scale"), Guard(**raw.get("guard", {}))
        return cls(**{**raw, "scale": LossScale(**scale) if scale is not None else None, "guard": guard})


class Saver:
    """Saves a training of one process while it goes on; a context that ends when nothing is being written any more.

    A save copies what trains into memory of the host, which is reused by the next, and a thread writes the copy. One
    checkpoint at a time is written: a save waits for the one before it. A write that failed is raised by the next call,
    or at the end.

    Args:
        work: the stage's working folder.
        ema: averages of the weights by name, where the training keeps them.
        keep: so many checkpoints, the last ones, stay.
    """

    def __init__(
        self,
        work: Path,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        ema: Mapping[str, Tensor] | None = None,
        *,
        keep: int = KEEP,
    ) -> None:
        self._work, self._keep = work, keep
        self._training = (model, optimizers, ema)
        self._copies: Contents = {}
        self._writing: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, state: State) -> None:
        """Copies a checkpoint of the last finished step, which is then written in the background.

        Raises:
            RunError: the write before this one failed, see `write`.
        """
        if distributed.is_sharded(self._training[0].state_dict()):
            self.finish(state)  # all ranks write together, which no thread may do beside their training
        elif distributed_checkpoint.is_first():
            self.wait()
            copy, told = self._copy(contents(*self._training)), asdict(state)
            self._writing = threading.Thread(target=self._write, args=(told, copy), name="checkpoint")
            self._writing.start()

    def finish(self, state: State) -> None:
        """The last checkpoint of a session: whole when this returns. It takes no memory for a copy.

        Raises:
            RunError: this or the write before it failed, see `write`.
        """
        self.wait()
        if distributed_checkpoint.is_first() or distributed.is_sharded(self._training[0].state_dict()):
            write(self._work, asdict(state), contents(*self._training), self._keep)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except RunError as failed:
            if problem is None:
                raise
            console.warn(str(failed))

    def _copy(self, training: Contents) -> Contents:
        """The tensors in memory of their own, the same at every save."""
        copied: Contents = {}
        for file, tensors in training.items():
            kept = self._copies.setdefault(file, {})
            for name, tensor in tensors.items():
                if name not in kept:
                    kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                kept[name].copy_(tensor, non_blocking=True)
            copied[file] = {name: kept[name] for name in tensors}
        if _device(self._training[0]).type == "cuda":
            torch.cuda.synchronize()
        return copied

    def _write(self, state: dict[str, Any], tensors: Contents) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # they wake the thread that waits
        try:
            write(self._work, state, tensors, self._keep)
        except BaseException as reason:  # for the thread that trains
            self._failed = reason

    def restore(self, folder: Path) -> None:
        """Loads a checkpoint into the training, see `restore`."""
        restore(folder, *self._training)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RunError: the last write failed, see `write`.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed


def contents(model: nn.Module, optimizers: Sequence[Optimizer], ema: Mapping[str, Tensor] | None) -> Contents:
    """The tensors of a checkpoint as they lie in the training: nothing is copied but the random states."""
    slots = _flat(model, optimizers) | randomness.states(_device(model))
    files = {"model": dict(model.state_dict()), "optimizer": slots}
    return files | ({"ema": dict(ema)} if ema is not None else {})


def write(work: Path, state: Mapping[str, Any], tensors: Contents, keep: int = KEEP) -> None:
    """Writes a checkpoint, unless there is one of that step, and drops all but the last `keep`.

    Raises:
        RunError: the disk is full; the checkpoints before this one are whole.
    """
    final = work / f"step-{state['step']:08}"
    sharded = distributed.is_sharded(tensors["model"])  # then all ranks are here
    if distributed_checkpoint.agree(final.exists()) if sharded else final.exists():
        return
    staging = work / f".staging-{final.name}"
    try:
        if sharded:
            distributed_checkpoint.write(staging, tensors)
        else:
            _write(staging, tensors)
        if distributed_checkpoint.is_first():
            _seal(staging, final, state)
            for old in checkpoints(work)[keep:]:
                shutil.rmtree(old)
    except (OSError, SafetensorError) as reason:
        shutil.rmtree(staging, ignore_errors=True)
        why = getattr(reason, "strerror", None) or str(reason)
        hint = "make room and run the same command again: it goes on from the checkpoint before this one"
        raise RunError(f"cannot save the checkpoint of step {state['step']}: {why}", file=work, hint=hint) from reason
    if sharded:
        distributed_checkpoint.agree(True)  # it is there for everyone


def _write(staging: Path, tensors: Contents) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, found in tensors.items():
        here = {key: tensor.detach().cpu().contiguous() for key, tensor in found.items()}
        save_file(here, staging / f"{name}.safetensors")


def _seal(staging: Path, final: Path, state: Mapping[str, Any]) -> None:
    """The rename is what makes it a checkpoint."""
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    written = {**state, "files": {path.relative_to(staging).as_posix(): hash_file(path) for path in paths}}
    (staging / "state.json").write_text(json.dumps({**written, "digest": digest(written)}, indent=1))
    for path in (*staging.rglob("*"), staging):
        _sync(path)
    staging.rename(final)
    _sync(final.parent)


def checkpoints(work: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    return sorted(work.glob("step-*"), reverse=True)


def newest(work: Path) -> tuple[Path, State] | None:
    """The newest checkpoint that is what was written, to the last bit; damaged ones are dropped with a warning."""
    for folder in checkpoints(work):
        try:
            raw = json.loads((folder / "state.json").read_text())
            as_written = raw.pop("digest") == digest(raw)
            if as_written and all(hash_file(folder / name) == found for name, found in raw.pop("files").items()):
                return folder, State.from_json(raw)
            reason = "its bytes are not those that were written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            reason = str(problem)
        console.warn(f"checkpoint {folder.name} is damaged ({reason}); going back to the one before it")
        shutil.rmtree(folder, ignore_errors=True)  # or it would stand in the way of a whole one of the same step
    return None


def restore(
    folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], ema: Mapping[str, Tensor] | None = None
) -> None:
    """Loads a checkpoint into a model, its optimisers and its average, in place, and the random states with it.

    Raises:
        DataError: it is the checkpoint of another training: other parameters, or other optimisers over them.
    """
    files = {name: distributed_checkpoint.read(folder, name, model) for name in distributed_checkpoint.names(folder)}
    tensors = files["optimizer"]
    drawn = {name: tensors.pop(name) for name in (randomness.CPU, randomness.CUDA) if name in tensors}
    randomness.put_back(drawn, _device(model))
    _fill(folder, "model", model.state_dict(), files["model"])
    if ema is not None:
        _fill(folder, "ema", ema, files.get("ema", {}))
    names = dict(model.named_parameters())
    groups = [{id(p): group for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, tensor in tensors.items():
        index, _, rest = key.partition("/")
        name, _, slot = rest.rpartition("/")
        if name not in names or int(index) >= len(groups) or id(names[name]) not in groups[int(index)]:
            raise _of_another(folder, f"the optimiser's {key}")
        group, parameter = groups[int(index)][id(names[name])], names[name]
        on_host = slot == "step" and not (group.get("fused") or group.get("capturable"))  # as torch's optimisers count
        slots = optimizers[int(index)].state.setdefault(parameter, {})
        slots[slot] = tensor.to("cpu" if on_host else parameter.device, copy=True)


def _fill(folder: Path, file: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise _of_another(folder, f"{name} of {file}.safetensors")
        ours[name].copy_(theirs[name])


def _of_another(folder: Path, what: str) -> DataError:
    hint = "--rebuild starts over; the llmctl that began this training goes on with it"
    return DataError(f"{what} does not fit this training: another one wrote it", file=folder, hint=hint)


def _flat(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Optimiser state by names: "<optimiser>/<parameter>/<slot>"."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{index}/{names[id(p)]}/{slot}": tensor
        for index, optimizer in enumerate(optimizers)
        for p, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
