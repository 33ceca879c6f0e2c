"""How far an exported graph may be from its model: by what it computes in, and by what quantising may cost.

fp32 has fixed limits: kernels that merely sum in another order stay one to two decades below them. What rounds more
than that is held against its *natural error*: what the same rounding does to the same model in torch, read on the same
text. A graph is one more draw of that noise, so it may be thrice as far in its worst logit, and four times in its mean
divergence, which is twice in the size of the noise. Measured over 257 tokens, worst logit as a share of the largest and
divergence in nats a token: fp16 0.1 to 0.4 % and up to 2e-5, bf16 0.8 to 4 % and up to 1.3e-3, int8 products 0.5 to
5 % and up to 4e-3 (tiny random models, stories260K, SmolLM2-135M). `CEILING` stops a model that the dtype is not for.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model import hf
from llmctl.model.dynamic import DynamicHead, DynamicLinear
from llmctl.recipe import ExportSection

LOGITS, DIVERGENCE = 3.0, 4.0  # times the natural error
CEILING = {"fp16": 0.03, "bf16": 0.2, "int8": 0.3}  # of the worst logit, whatever the natural error
BLOCK = 32  # values that share a scale where a product rounds its inputs to int8
TOKENS = 257  # on which the natural error is measured

# What quantising may add to the perplexity by default, as a share; "": of the cache alone. Four bits cost a model of
# 6 M parameters 1.6 %, one of 0.26 M 7 %, and SmolLM2-135M, whose weights come from another grid of four bits, 14 %:
# the limit stops what is broken, and from `NOTABLE` on the stage warns.
INCREASE = {"": 0.005, "int8": 0.005, "int8-dynamic": 0.05, "int4": 0.25, "mixed": 0.25}
NOTABLE = 0.05

M = TypeVar("M", bound=hf.Model)


class Limits(NamedTuple):
    """The largest difference of two logits, as a share of the largest logit (at least 1); the mean KL divergence, in
    nats a token; the change of the perplexity as a share, either way."""

    logits: float
    kl: float
    perplexity: float


class Quality(NamedTuple):
    """What quantising may cost: perplexity as a share, nats a token of divergence, the share of best tokens lost."""

    increase: float
    kl: float
    lost: float


FP32 = Limits(1e-4, 1e-5, 1e-4)


def limits(dtype: str, natural: tuple[float, float], tokens: int) -> Limits:
    """The limits of a graph that computes in `dtype`.

    Args:
        natural: the largest difference of two logits and the mean divergence that the rounding costs by itself.
        tokens: of the text. The surprise of two models whose mean divergence is kl differs by kl on average, and by
            about sqrt(2 kl / tokens) by chance; four times that is allowed.
    """
    if dtype == "fp32":
        return FP32
    error, kl = natural
    kl = max(FP32.kl, DIVERGENCE * kl)
    logits = min(CEILING[dtype], max(FP32.logits, LOGITS * error))
    return Limits(logits, kl, max(FP32.perplexity, kl + 4 * math.sqrt(2 * kl / max(1, tokens))))


def quality(increase: float) -> Quality:
    """The limits that follow from what the perplexity may rise by.

    A model that is right about its text pays its divergence in surprise, nat for nat; where it is wrong the two drift
    apart, so that four times is allowed: 0.2 nats for the default of int4, 0.02 for int8. By Pinsker's inequality a
    best token that changes was at most sqrt(2 kl) likelier than the other: as often may it change.
    """
    kl = 4 * math.log1p(increase)
    return Quality(increase, kl, min(1.0, math.sqrt(2 * kl)))


def allowed_increase(section: ExportSection) -> float:
    """What `[export]` lets quantising add to the perplexity, as a share: `max_ppl_increase`, else `INCREASE`."""
    stated = section.max_ppl_increase
    return float(stated.rstrip("%")) / 100 if stated else INCREASE[section.variant]


@contextlib.contextmanager
def rounding(model: M, dtype: str) -> Iterator[M]:
    """The model as `dtype` alone would have it: cast to fp16 or bf16, or with what its products read rounded to int8,
    or not rounded where they do so already (`model.dynamic.DynamicLinear`).

    The first is a copy of half the size; the others are the model itself, for as long as the block runs.
    """
    if dtype == "fp32":
        yield model
    elif dtype != "int8":
        twin = hf.build(model.config)
        state = {name: tensor.to(hf.DTYPES[dtype]) for name, tensor in model.state_dict().items()}
        twin.load_state_dict(state, assign=True)
        yield twin.to(model.device).eval()  # type: ignore[misc]
    else:
        every = dict(model.named_modules())
        dynamic = [module for module in every.values() if isinstance(module, DynamicLinear | DynamicHead)]
        plain = [module for module in every.values() if isinstance(module, nn.Linear) and module not in dynamic]
        hooks = [module.register_forward_pre_hook(lambda _, given: (to_int8(given[0]),)) for module in plain]
        last = every.get("decoder.norm" if model.config.kind == "encoder-decoder" else "model.norm")
        if (
            model.config.tie_word_embeddings
            and last is not None
            and not isinstance(every.get("head_proj"), DynamicHead)
        ):
            hooks.append(last.register_forward_hook(lambda *given: to_int8(given[2])))  # the head, no module, reads it
        for module in dynamic:
            exact = functools.partial(F.linear, weight=module.weight, bias=getattr(module, "bias", None))
            module.__dict__["forward"] = exact
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()
            for module in dynamic:
                del module.__dict__["forward"]


def to_int8(x: Tensor) -> Tensor:
    """Rounds (..., C) to the int8 grid of each block of a row, as MatMulNBits with accuracy_level 4 does."""
    block = BLOCK if x.shape[-1] % BLOCK == 0 else x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scale).round() * scale).view(x.shape)
