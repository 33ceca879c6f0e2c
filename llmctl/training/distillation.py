"""Learning from another model: the student's next-token probabilities are drawn to its teacher's, beside the labels.

    (1 - w) CE(student, labels) + w T^2 KL(softmax(teacher / T) || softmax(student / T))

Hinton et al. 2015 (arXiv:1503.02531): T^2 keeps the gradients' size as T grows. Both models' logits exist for a chunk
of positions at a time (`cross_entropy`), and only where a label counts.
"""

# B batch, T time, C channels of either model, V vocabulary, R rows of a chunk

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmctl.model.hf import Causal
from llmctl.training.batch import IGNORED
from llmctl.training.objectives import Learner, loss, states


class Distiller(Learner):
    """A student and its loss. The teacher is no part of the module: nobody trains, wraps, cuts up or saves it.

    Args:
        weight: of the teacher's probabilities in the loss.
        temperature: both models' logits are divided by it.
    """

    def __init__(self, model: Causal, teacher: Causal, weight: float, temperature: float) -> None:
        super().__init__(model)
        self._teacher, self.taught_by = (teacher.eval().requires_grad_(False),), teacher.config

        def each(x: Tensor, head: Tensor, labels: Tensor, cap: float | None, taught: Tensor) -> tuple[Tensor, Tensor]:
            return chunk(x, head, labels, cap, teacher.logits(taught), weight, temperature)

        self.each = each

    def forward(self, *tensors: Tensor, **named: Any) -> Tensor:
        """The arguments of `Learner`; the teacher reads the same inputs."""
        *inputs, _ = tensors
        with torch.no_grad():
            taught = states(self._teacher[0], *inputs, documents=named.get("documents"))
        return loss(self.model, *tensors, taught=taught, each=self.each, **named)


def chunk(
    x: Tensor, head: Tensor, labels: Tensor, cap: float | None, taught: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The summed loss of (R, C) states, and its gradient at the logits, (R, V) in their dtype; IGNORED rows count none.

    `taught` are the teacher's logits, (R, V) or a few columns more or fewer, where one model's embedding is padded: the
    columns that both have are compared.
    """
    logits = (x @ head.T).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    counted = (labels != IGNORED)[:, None]
    right = labels.clamp(min=0)[:, None]
    own = logits.log_softmax(-1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    nats, gradient = -own.gather(1, right), own.exp() - (columns == right).float()
    both = min(logits.shape[1], taught.shape[1])
    said = (logits[:, :both] / temperature).log_softmax(-1)
    wanted = (taught[:, :both].float() / temperature).log_softmax(-1)
    apart = (wanted.exp() * (wanted - said)).sum(-1, keepdim=True)
    total = torch.where(counted, (1 - weight) * nats + weight * temperature**2 * apart, 0.0).sum()
    gradient = (1 - weight) * gradient
    gradient[:, :both] += weight * temperature * (said.exp() - wanted.exp())
    if cap is not None:
        gradient = gradient * (1 - (logits / cap).square())
    return total, torch.where(counted, gradient, 0.0).to(x.dtype)
