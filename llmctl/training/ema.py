"""A moving average of the weights (Polyak and Juditsky 1992): steadier than the weights of any one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """The average of a model's trained parameters over its steps; with a decay of 0, of nothing.

    `tensors` has it by parameter name, in the parameters' shapes, dtypes and places (sharded where they are): what a
    checkpoint holds and fills in again.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and decay}
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in trained.items()}
        self._weights, self._decay = [p.detach() for p in trained.values()], decay

    def follow(self, number: int) -> None:
        """Takes in the weights after step `number` (1 is the first).

        The decay grows from 2/11 to its full value as (1 + number) / (10 + number) (tf.train.ExponentialMovingAverage),
        or the average of a short run would be mostly the weights it began with.
        """
        if not self.tensors:
            return
        decay = min(self._decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(list(self.tensors.values()), self._weights, 1 - decay)

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """The model has the averaged weights for as long as the block runs."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """The model gets the averaged weights, and `tensors` the model's."""
        for weight, average in zip(self._weights, self.tensors.values(), strict=True):
            kept = weight.clone()  # exact, and no more memory than the largest needs
            weight.copy_(average)
            average.copy_(kept)
