"""Checkpoints of sharded trainings: every rank writes its shards, in safetensors.

torch.distributed.checkpoint does the work, over its Hugging Face storage: each file says in its header which part of
each tensor it holds, so nothing is pickled (torch's other storage has a pickled .metadata), and any number of ranks
reads what any other number wrote.

    step-00001200/   model/shard-00001-model-00001-of-00001.safetensors ...  optimizer/  ema/  state.json

What one process wrote (`checkpoint.write`) is read by sharded trainings too, and the other way round.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from llmctl.training import distributed

RANDOM = "random."  # rank 0's random states are the only ones that are kept, see `Ranks.stir`


def is_first() -> bool:
    """Whether this is the rank that writes what one rank alone writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree(flag: bool) -> bool:
    """What rank 0 says, on all ranks, once all have come here."""
    return distributed.here(torch.device("cpu")).firsts(flag)


def write(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes this rank's part of the tensors by file, into a folder that all ranks see. All ranks must come here.

    Raises:
        OSError: a rank could not write; on all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    agree(True)  # the others do not begin in what is being swept
    for name, tensors in files.items():
        mine = {key: tensor for key, tensor in tensors.items() if is_first() or not key.startswith(RANDOM)}
        try:
            save(mine, storage_writer=HuggingFaceStorageWriter(str(folder / name), save_distributed=True))
        except CheckpointException as problem:  # no Exception of Python's
            rank, (reason, _) = next(iter(problem.failures.items()))
            raise OSError(None, f"rank {rank}: {getattr(reason, 'strerror', None) or reason}") from problem


def read(folder: Path, name: str, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that lie in `folder` under a name, whoever wrote them; parts of them where `model` is sharded.

    Names are those of parameters, or "<optimiser>/<parameter>/<slot>". With a sharded model, all ranks must come here.
    """
    parameters = dict(model.named_parameters())
    sharded = distributed.is_sharded(parameters)
    file = folder / f"{name}.safetensors"
    if file.exists() and not sharded:
        return dict(load_file(file))

    def like(key: str, shape: Sequence[int]) -> Any:  # the DTensor whose parts this one has
        owner = parameters.get(key if "/" not in key else key.split("/")[1])
        return owner if sharded and owner is not None and tuple(owner.shape) == tuple(shape) else None

    found: dict[str, Tensor] = {}
    if file.exists():
        from torch.distributed.tensor import distribute_tensor

        for key, tensor in load_file(file).items():  # mapped: parts that are not ours are never read
            same = like(key, tensor.shape)
            mesh, placements = (None, None) if same is None else (same.device_mesh, same.placements)
            found[key] = tensor if same is None else distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        return found
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder / name))
    for key, told in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata)
        same, dtype = like(key, told.size), told.properties.dtype
        found[key] = torch.empty(told.size, dtype=dtype) if same is None else torch.empty_like(same, dtype=dtype)
    load(found, storage_reader=reader, no_dist=not sharded)
    return found


def names(folder: Path) -> set[str]:
    """What `folder` holds: "model", "optimizer", perhaps "ema"."""
    return {path.stem for path in folder.glob("*.safetensors")} | {
        path.name for path in folder.iterdir() if path.is_dir()
    }
