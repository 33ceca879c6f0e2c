"""How well a model fills in what was hidden from a text: the same masks and spans every time."""

# B batch, T time, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.model.config import Config
from llmctl.model.hf import Model
from llmctl.training.batch import IGNORED, Ids
from llmctl.training.objectives import Objective, states
from llmctl.training.precision import Precision

SEED = 0  # of what is hidden: fixed, so that figures of different runs are about the same tokens
LEAST = 4  # tokens of a window: fewer leave no room for a blank and what fills it
LOGITS = 1 << 24  # logits held at once: 64 MB in fp32


@dataclass(frozen=True)
class Validation:
    """What a model said of the hidden tokens.

    Attributes:
        nats: of surprise in all. targets: what it had to say: the hidden tokens, and for an encoder-decoder the
            sentinels and the end that order them, which T5's loss counts too.
        hidden: tokens of the text alone. correct: those of them that the model finds most likely.
        window_nats: (windows,) the nats of each window, for comparing two models on the same text in pairs.
    """

    nats: float
    targets: int
    hidden: int
    correct: int
    window_nats: npt.NDArray[np.float64] = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nats / self.targets

    @property
    def accuracy(self) -> float:
        """The share of hidden tokens that are said right."""
        return self.correct / self.hidden

    @property
    def metrics(self) -> dict[str, float]:
        """`val_loss`, `val_accuracy` and the standard error of that."""
        error = math.sqrt(self.accuracy * (1 - self.accuracy) / self.hidden)
        return {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_stderr": error}


def validate(
    model: Model, objective: Objective, tokens: Ids, *, max_seq_length: int, autocast: bool = False
) -> Validation:
    """`ask` of a model in torch, which stays in the mode it was in. `autocast`: as in training."""

    def said(*inputs: Tensor, documents: Tensor | None = None) -> Tensor:
        with torch.inference_mode(), Precision(model.device, "bf16" if autocast else "fp32").autocast():
            return model.logits(states(model, *inputs, documents=documents)).float()

    was_training = model.training
    model.eval()
    found = ask(said, model.config, objective, tokens, max_seq_length=max_seq_length, device=model.device)
    model.train(was_training)
    return found


def ask(
    said: Callable[..., Tensor],
    config: Config,
    objective: Objective,
    tokens: Ids,
    *,
    max_seq_length: int,
    device: torch.device,
) -> Validation:
    """Hides parts of a text (N,) window by window, as the objective does, and asks a model for them.

    What is left over at the end, less than a window, is not read.

    Args:
        said: the model: what a batch reads, on `device`, and `documents` where it has them, to logits (B, T, V).

    Raises:
        UsageError: too short a text to hide anything of.
    """
    length = min(max_seq_length, len(tokens) - 1)
    count = (len(tokens) - 1) // length if length >= LEAST else 0
    found: list[float] = []
    targets = hidden = correct = 0
    rows = max(1, LOGITS // (max(1, length) * config.vocab_size))
    order = torch.tensor([*objective.marks, *config.eos_ids, IGNORED], device=device)
    for first in range(0, count, rows):
        starts = range(first * length, min(first + rows, count) * length, length)
        batch = objective.frame(np.stack([tokens[at : at + length + 1] for at in starts]), SEED, first + len(starts))
        (*inputs, labels), named = batch.tensors(device)
        kept = {name: tensor for name, tensor in named.items() if name == "documents"}
        logits = said(*inputs, **kept)  # (B, T, V)
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        of_text = ~torch.isin(labels, order)
        targets, hidden = targets + batch.supervised, hidden + int(of_text.sum())
        correct += int(((logits.argmax(-1) == labels) & of_text).sum())
        found += nats.view_as(labels).double().sum(1).tolist()
    if not hidden:
        raise UsageError(f"{len(tokens)} tokens are too few to hide any of them", hint="give a longer text")
    return Validation(math.fsum(found), targets, hidden, correct, np.asarray(found))
