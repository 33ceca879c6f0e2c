"""Which matrix gets how many bits: "mixed", by what rounding each alone does to the model's answers.

A unit is what reads the same and is multiplied at once: q, k and v; gate and up. Each is rounded alone in the fewest
bits and the divergence from the model is measured; in more bits it is taken to shrink with the squared error of the
weights, as it does where errors are small. Then bits go, one step at a time, where a bit takes off most.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl import console
from llmctl.errors import UsageError
from llmctl.export.quantizing.methods import rounded
from llmctl.export.quantizing.rounding import searched
from llmctl.model import quant
from llmctl.model.quant import Scheme
from llmctl.model.transformer import Decoder
from llmctl.recipe import ExportSection

STEPS = ((4, 128), (4, 64), (4, 32), (8, 128))  # bits and block, the smallest first
LOGITS = 1 << 26  # of the model, kept to compare with
FLOPS = 2e12  # what all measurements together may cost, 2 a parameter and token
SAFE = 0.8  # of the allowed increase: the gate reads another text

Plan = dict[str, Scheme]


class Step(NamedTuple):
    """One way to round a unit: its schemes by matrix, the bits they take and the divergence they cost."""

    schemes: Plan
    bits: float
    divergence: float


def chosen(original: Decoder, section: ExportSection, method: str, ids: Tensor, allowed: float) -> Plan:
    """The scheme of every matrix.

    Args:
        ids: (B, T) windows to measure on.
        allowed: increase of the perplexity, a share, where `section.target_bits` says nothing.

    Raises:
        UsageError: `target_bits` is less than the smallest plan takes.
    """
    state = original.state_dict()
    units = measured(original, section.is_symmetric, ids)
    plain = 32 * sum(t.numel() for name, t in state.items() if not any(name in unit[0].schemes for unit in units))
    total = sum(tensor.numel() for tensor in state.values())

    def size(plan: tuple[Step, ...]) -> float:
        return float((plain + sum(step.bits for step in plan)) / total)

    if section.target_bits is not None:
        least = size(tuple(unit[0] for unit in units))
        if least > section.target_bits:
            raise UsageError(
                f"[export] target_bits = {section.target_bits:g}, but this model takes {least:.2f} at the least",
                hint=f"set target_bits to {least + 0.005:.2f} or more",
            )
        best = list(path(units, section.target_bits * total - plain))[-1]
    else:
        best = smallest(original, list(path(units)), method, ids, SAFE * allowed)
    plan = merged(best)
    console.detail(f"mixed: {size(best):.2f} bits a weight, expected divergence {divergence(best):.4f} nats")
    for name, scheme in plan.items():
        console.detail(f"  {name}: {scheme.bits} bits in blocks of {scheme.block}")
    return plan


def measured(original: Decoder, symmetric: bool, ids: Tensor) -> list[list[Step]]:
    """Every unit's steps, the smallest first."""
    names = quant.matrices(original)
    groups = joined(names)
    room = min(LOGITS // original.config.vocab_size, int(FLOPS / (2 * original.config.parameters * (len(groups) + 1))))
    sample = ids[:, : max(64, min(room, ids.shape[1]))]
    sample = sample[: max(1, room // sample.shape[1])]
    with torch.inference_mode():
        answers = original(sample).log_softmax(-1)
    model = copy.deepcopy(original)
    units: list[list[Step]] = []
    for group in groups:
        matrices = {name: model.get_parameter(name).data for name in group}
        steps: list[Step] = []
        base = 0.0
        for bits, block in STEPS:
            plan = {n: quant.fitted(Scheme(bits, block, symmetric), m.shape[1]) for n, m in matrices.items()}
            if steps and plan == steps[-1].schemes:
                continue
            values = {name: searched(matrix, plan[name]).values() for name, matrix in matrices.items()}
            error = sum(float((values[name] - matrix).square().sum()) for name, matrix in matrices.items())
            if not steps:
                for name in group:
                    model.get_parameter(name).data = values[name]
                with torch.inference_mode():
                    found = F.kl_div(model(sample).log_softmax(-1), answers, reduction="none", log_target=True)
                base = max(float(found.sum(-1).mean()), 0.0) / max(error, 1e-30)
                for name, matrix in matrices.items():
                    model.get_parameter(name).data = matrix
            size = sum(plan[name].size(*matrix.shape) for name, matrix in matrices.items())
            steps.append(Step(plan, size, base * error))
        units.append(steps)
    return units


def joined(names: list[str]) -> list[list[str]]:
    """The units: matrices of one layer that are multiplied at once, the others alone."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(re.sub(r"[qkv]_proj", "qkv_proj", re.sub(r"(gate|up)_proj", "gate_up_proj", name)), []).append(
            name
        )
    return list(units.values())


def path(units: list[list[Step]], room: float = math.inf) -> Iterator[tuple[Step, ...]]:
    """Plans from the smallest to the largest of at most `room` bits, each a step of one unit ahead of the last: the
    one that takes off most divergence a bit, of those that fit.
    """
    at = [0] * len(units)
    left = room - sum(unit[0].bits for unit in units)
    yield tuple(unit[0] for unit in units)
    while True:
        best, chosen, taken = -1.0, None, 0.0
        for i, unit in enumerate(units):
            for j in range(at[i] + 1, len(unit)):
                more = unit[j].bits - unit[at[i]].bits
                gain = (unit[at[i]].divergence - unit[j].divergence) / max(more, 1.0)
                if gain > best and more <= left:
                    best, chosen, taken = gain, (i, j), more
        if chosen is None:
            return
        at[chosen[0]], left = chosen[1], left - taken
        yield tuple(unit[i] for unit, i in zip(units, at, strict=True))


def divergence(plan: tuple[Step, ...]) -> float:
    """What the units cost together, if each adds its own."""
    return sum(step.divergence for step in plan)


def smallest(
    original: Decoder, plans: list[tuple[Step, ...]], method: str, ids: Tensor, allowed: float
) -> tuple[Step, ...]:
    """The first plan whose perplexity is at most `allowed` above the original's, found by halving.

    Plans are rounded for real; the last quarter of the windows is measured on, the others calibrate.
    """
    held = max(1, len(ids) // 4)
    calibration, text = (ids[:-held], ids[-held:]) if len(ids) > held else (ids, ids)
    before = surprise(original, text)

    def increase(plan: tuple[Step, ...]) -> float:
        model = copy.deepcopy(original)
        rounded(model, merged(plan), method, calibration)
        return float(torch.tensor(surprise(model, text) - before).exp()) - 1

    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        found = increase(plans[middle])
        console.detail(f"mixed: plan {middle} of {len(plans)}: perplexity {100 * found:+.2f} %")
        low, high = (low, middle) if found <= allowed else (middle + 1, high)
    return plans[low]


def merged(plan: tuple[Step, ...]) -> Plan:
    """The schemes of all units."""
    return {name: scheme for step in plan for name, scheme in step.schemes.items()}


def surprise(model: Decoder, ids: Tensor) -> float:
    """Nats a token of (B, T) windows."""
    with torch.inference_mode():
        each = [F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none") for row in ids]
    return float(torch.cat(each).double().mean())
