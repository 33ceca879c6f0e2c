"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the ways to stretch it.

Frequencies are computed in fp32 in the order of operations of transformers' `modeling_rope_utils`, so that the two
agree bit for bit.
"""

# B batch, T time, H heads, D head size, R the part of a head that is turned

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmctl.model.config import Config, RopeScaling


class Rope(NamedTuple):
    """The cosines and sines of the positions at hand, each (T, 1, R/2) or (B, T, 1, R/2), fp32."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair (i, i + R/2) of (B, T, H, D) by its angle, in fp32; values from R on stay as they are."""
    half = rope.cos.shape[-1]
    if 2 * half == x.shape[-1]:
        a, b = x.float().chunk(2, -1)
        return torch.cat(_turned(a, b, rope), -1).to(x.dtype)
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat((*(part.to(x.dtype) for part in _turned(a, b, rope)), x[..., 2 * half :]), dim=-1)


def _turned(a: Tensor, b: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    cos, sin = rope
    return torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)


def frequencies(config: Config, *, local: bool = False, length: int = 0) -> Tensor:
    """The angle that each pair turns by from one position to the next, (R/2,) fp32.

    Args:
        local: of the sliding layers, where those have a base of their own; it is never scaled.
        length: of the text, which "dynamic" scaling depends on past the length that the model was trained for.
    """
    own_base = local and config.rope_local_theta is not None
    theta = (config.rope_local_theta if own_base else None) or config.rope_theta
    scaling, size = None if own_base else config.rope_scaling, config.rotary_dim
    if scaling is not None and scaling.kind == "dynamic":
        trained = scaling.original_max_position_embeddings
        stretch = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
        theta = theta * stretch ** (size / (size - 2))
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None or scaling.kind == "dynamic":
        return 1.0 / powers
    if scaling.kind == "linear":
        return 1.0 / powers / scaling.factor
    return _yarn(powers, scaling, config.rope_theta, size) if scaling.kind == "yarn" else _llama3(1.0 / powers, scaling)


def _llama3(turns: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: keep waves shorter than one wavelength, divide those longer than another, blend between the two."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = 2 * math.pi / turns
    blend = ((scaling.original_max_position_embeddings / waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * turns / scaling.factor + blend * turns


def _yarn(powers: Tensor, scaling: RopeScaling, theta: float, size: int) -> Tensor:
    """Waves that turn often within the trained length are kept, slow ones interpolated, with a ramp between."""

    def dimension(turns: float) -> float:
        """Which pair turns so often within the trained length."""
        trained = scaling.original_max_position_embeddings
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def amplitude(config: Config, *, local: bool = False) -> float:
    """What cosines and sines are multiplied with: YaRN's attention factor, else 1."""
    scaling = None if local and config.rope_local_theta is not None else config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)


def table(config: Config, length: int, *, local: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0 to `length` - 1, each (length, R/2) fp32, on the CPU."""
    with torch.device("cpu"):  # also while a model is built on the meta device
        turns = frequencies(config, local=local, length=length)
        angles = torch.arange(length, dtype=torch.float32).outer(turns)
    scale = amplitude(config, local=local)
    return angles.cos() * scale, angles.sin() * scale
