"""What training minimises: the summed loss of a micro-batch, in nats, so that its parts can be added up exactly."""

# B batch, T time, C channels, V vocabulary

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmctl.model.transformer import Decoder

IGNORED = -100  # a label that is not supervised (torch's and Hugging Face's convention)


def causal(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, summed over the supervised labels: (B, T), (B, T) -> ().

    `labels` are already shifted: labels[:, t] is what follows ids[:, t]. Logits are compared in fp32 under autocast
    too.
    """
    logits = F.linear(model.hidden(ids), model.head_weight())  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
