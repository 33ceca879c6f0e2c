"""The one place that opens a pickle: pytorch_model.bin, when the user asks for it, to make safetensors of it.

`torch.load(weights_only=True)` interprets the pickle itself and knows tensors and containers only: nothing that a file
names is imported or called. Files of the zip format, which torch has written since 2020, are mapped and not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model import hf
from llmctl.model.origin import PICKLED, PICKLED_INDEX


def files(folder: Path) -> list[Path]:
    """pytorch_model.bin, or the shards that its index names; none where the folder has neither.

    Raises:
        DataError: an index that names no files beside it.
    """
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    index = folder / PICKLED_INDEX
    return hf.indexed(index) if index.is_file() else []


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, their bytes still on disk.

    Raises:
        DataError: no file of weights only: another object, or a pickle that wants to run something.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as reason:  # torch raises whatever the unpickler stumbles over
        told = str(reason).partition("\n")[0][:200]
        raise DataError(
            f"is not a file of weights alone, and nothing else is unpickled ({told})",
            file=path,
            hint="get the model's safetensors, or have someone you trust convert it",
        ) from None
    if not isinstance(state, Mapping):
        raise DataError(f"holds a {type(state).__name__}, not tensors by name", file=path)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise DataError(f"holds {name!r}: {type(tensor).__name__}, which is no plain tensor", file=path)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise DataError(f"says that {name} is {list(tensor.shape)}, and holds fewer values", file=path)
    return dict(state)
