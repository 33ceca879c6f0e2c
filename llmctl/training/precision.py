"""What a training computes in, and what fp16 needs so that its gradients survive."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What the matrix products are computed in; weights, gradients and optimiser state are fp32."""

    device: torch.device
    dtype: str = "fp32"  # or "bf16", "fp16"

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype])


PATIENCE, FIRST = 2000, 2.0**16  # as torch.amp.GradScaler has them


@dataclass
class LossScale:
    """Keeps fp16's small gradients from becoming zero (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    Halved when a gradient overflows, and that step is skipped; doubled after PATIENCE steps without one.
    """

    scale: float = FIRST
    good: int = 0  # steps since it changed

    def follow(self, overflowed: bool) -> None:
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale = max(1.0, self.scale / 2)
        elif self.good == PATIENCE:
            self.scale, self.good = self.scale * 2, 0
