"""The random states that a training draws from: torch's on the host and, on a GPU, that GPU's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CPU, CUDA = "random.cpu", "random.cuda"  # the names under which a checkpoint has them


def states(device: torch.device) -> dict[str, Tensor]:
    """The states as they are now, by name; tensors on the host. No device waits for it."""
    on_gpu = {CUDA: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {CPU: torch.get_rng_state(), **on_gpu}


def put_back(kept: Mapping[str, Tensor], device: torch.device) -> None:
    """Goes back to those states; a GPU's only where there is one."""
    torch.set_rng_state(kept[CPU])
    if CUDA in kept and device.type == "cuda":
        torch.cuda.set_rng_state(kept[CUDA], device)
