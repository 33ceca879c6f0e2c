"""The resume state of a training: weights, optimisers, loader position, random state. safetensors and JSON, never
pickle.

    .work/<stage>/step-00001200/   model.safetensors  optimizer.safetensors  state.json (written last, with digests)

A checkpoint is complete or absent: it is written aside, synced and renamed. The last two are kept; a damaged one is
passed
over with a warning.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmctl import console
from llmctl.artifact import digest, hash_file
from llmctl.errors import RunError

KEPT = 2


@dataclass
class State:
    """Where a training stands; everything a bitwise continuation needs beside the tensors."""

    step: int = 0  # finished steps
    position: int = 0  # of the loader
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sessions
    skipped: int = 0
    train_loss: float = 0.0  # nats a token, smoothed


def save(work: Path, state: State, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Writes a checkpoint of the last finished step.

    Raises:
        RunError: the disk is full; the checkpoints before this one are whole.
    """
    final = work / f"step-{state.step:08}"
    if final.exists():
        return
    staging = work / f".staging-{final.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        random = {"random.cpu": torch.get_rng_state()}
        save_file(_tied_once(model), staging / "model.safetensors")
        save_file(_flat(model, optimizers) | random, staging / "optimizer.safetensors")
        files = {file.name: hash_file(file) for file in sorted(staging.iterdir())}
        written = {**asdict(state), "files": files}
        (staging / "state.json").write_text(json.dumps({**written, "digest": digest(written)}, indent=1))
        for path in (*staging.iterdir(), staging):
            _sync(path)
        staging.rename(final)
        _sync(work)
    except (OSError, SafetensorError) as reason:
        shutil.rmtree(staging, ignore_errors=True)
        why = getattr(reason, "strerror", None) or str(reason)
        hint = "make room and run the same command again: it goes on from the checkpoint before this one"
        raise RunError(f"cannot save the checkpoint of step {state.step}: {why}", file=work, hint=hint) from reason
    for old in checkpoints(work)[KEPT:]:
        shutil.rmtree(old)


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
                return folder, State(**raw)
            reason = "its bytes are not those that were written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            reason = str(problem)
        console.warn(f"checkpoint {folder.name} is damaged ({reason}); going back to the one before it")
        shutil.rmtree(folder, ignore_errors=True)  # or it would stand in the way of a whole one of the same step
    return None


def restore(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Loads a checkpoint into a model and its optimisers, in place, and the random state with it."""
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("random.cpu"))
    names = dict(model.named_parameters())
    for index, optimizer in enumerate(optimizers):
        optimizer.state.clear()
        for key, tensor in tensors.items():
            owner, _, rest = key.partition("/")
            name, _, slot = rest.rpartition("/")
            if owner == str(index):
                kept = tensor.to(names[name].device) if slot != "step" else tensor
                optimizer.state.setdefault(names[name], {})[slot] = kept


def _flat(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Optimiser state by names: "<optimiser>/<parameter>/<slot>"."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{index}/{names[id(p)]}/{slot}": tensor.detach().cpu().contiguous()
        for index, optimizer in enumerate(optimizers)
        for p, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def _tied_once(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
