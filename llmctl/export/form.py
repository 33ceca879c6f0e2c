"""How a graph is spelled: for which runtime, and in which dtype its weights and sums are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from onnx import TensorProto

Profile = Literal["ort", "portable"]
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Form:
    """The spelling of a graph.

    Attributes:
        profile: "ort" uses ONNX Runtime's own fused operators, "portable" those of the ONNX standard alone.
        dtype: "fp32", "fp16" or "bf16": of the weights and of what flows between the nodes; logits are fp32.
        adapted: projections that take a low-rank change as an input, by their native names.
        cache: the scales of a cache in int8, as `kv_cache.scales` gives them; empty for one in `dtype`.
    """

    profile: Profile = "ort"
    dtype: str = "fp32"
    adapted: tuple[str, ...] = ()
    cache: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def opset(self) -> int:
        """Of the standard operators: 23 has RMSNormalization and RotaryEmbedding, 24 TensorScatter."""
        return 24 if self.profile == "portable" else 23

    @property
    def type(self) -> int:
        """The dtype as ONNX numbers it."""
        return int(TYPES[self.dtype])
