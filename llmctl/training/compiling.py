"""torch.compile, block by block, where it pays.

Blocks of one shape share their code, so a model of any depth costs one compilation of a block (half the time of
compiling the whole step, at the same speed: docs/benchmarks.md). Whether that pays is known after a few eager steps:
what they took, what compiling cost on this machine before, and how many steps are left. The decision is stored with the
resume state, as every choice that a clock makes.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmctl.artifact import digest, write_json
from llmctl.model.sublayers import Block
from llmctl.training import distributed
from llmctl.training.loop import Step
from llmctl.training.objectives import Learner

WATCHED = 4  # eager steps before the decision; the first of them warms up
SECONDS, GAIN = 30.0, 1.3  # where nothing was measured here yet: 13.8 M parameters on two cores took 18 and 1.35
CACHED = 0.25  # of the seconds, where Inductor has the code in its cache


@dataclass
class Compiling:
    """Compiles a learner in place: at once, after some steps, or never.

    Attributes:
        since: the step (0-based) from which it is compiled; None where it is not, or not yet.
        undecided: whether the first steps will tell.
    """

    learner: Learner
    steps: int
    key: str  # of what is compiled: the shape, the batch, the machine
    since: int | None
    undecided: bool
    decided: Callable[[int | None, str], None]  # stores the choice, and says it
    _eager: list[float] = field(default_factory=list)
    _compiled: list[float] = field(default_factory=list)
    _on: bool = False

    def begin(self, step: int) -> None:
        """Before step `step` (0-based): a resumed run that was compiled is compiled."""
        if self.since is not None and step >= self.since:
            self._compile()

    def follow(self, step: Step) -> None:
        """Learns from a finished step, and decides when it knows enough."""
        if self._on:
            self._measure(step.seconds)
        elif self.undecided:
            self._eager.append(step.seconds)
            if len(self._eager) == WATCHED:
                self._decide(step.number)
        elif self.since is not None and step.number >= self.since:
            self._compile()

    def eagerly(self) -> contextlib.AbstractContextManager[object]:
        """For evaluations and samples: their shapes are others, and each would be compiled anew."""
        return torch.compiler.set_stance("force_eager") if self._on else contextlib.nullcontext()

    def _decide(self, number: int) -> None:
        self.undecided = False
        each, left = statistics.median(self._eager[1:]), self.steps - number
        seconds, gain, known = _expected(self.key)
        saved = left * each * (1 - 1 / gain)
        pays = distributed.here(torch.device("cpu")).firsts(saved > seconds)
        why = (
            f"{seconds:.0f} s to compile ({known}) against {saved:.0f} s that {left:,} steps of {each:.2g} s save by it"
        )
        self.since = number if pays else None
        self.decided(self.since, f"{'torch.compile' if pays else 'eager'}: {why}")
        if pays:
            self._compile()

    def _compile(self) -> None:
        self._on = True
        for module in self.learner.modules():
            if isinstance(module, Block):
                module.compile()
        self.learner.each = torch.compile(self.learner.each)

    def _measure(self, seconds: float) -> None:
        """Remembers what compiling cost and brought, beside the code that Inductor cached."""
        self._compiled.append(seconds)
        if len(self._compiled) == WATCHED:
            each = statistics.median(self._compiled[1:])
            made = {"seconds": max(0.0, self._compiled[0] - each)}
            if self._eager:
                made["gain"] = statistics.median(self._eager[1:]) / each
            with contextlib.suppress(OSError):
                if not (path := _records() / f"{self.key}.json").exists():
                    write_json(path, made)


def possible(device: torch.device, kind: str) -> str:
    """Why a model of this kind cannot be compiled here, or gains nothing by it; empty where it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler (Debian: apt-get install g++)"
    if kind == "recurrent":
        return "torch's LSTM is one kernel, which compiling leaves as it is"
    return ""


def key(*parts: object) -> str:
    """Names what is compiled; equal names find their code in Inductor's cache."""
    return digest([torch.__version__, *map(str, parts)])[:16]


def _records() -> Path:
    """In Inductor's own cache, so that they are lost together."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(cache or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}") / "llmctl"


def _expected(key: str) -> tuple[float, float, str]:
    """Seconds to compile, times faster, and how that is known."""
    found: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        for path in sorted(_records().glob("*.json")):
            found[path.stem] = {name: float(value) for name, value in json.loads(path.read_text()).items()}
    gains = [entry["gain"] for entry in found.values() if entry.get("gain", 0) > 1]
    gain = found.get(key, {}).get("gain") or (statistics.median(gains) if gains else GAIN)
    if key in found:
        return CACHED * found[key]["seconds"], max(1.0, gain), "cached"
    if found:
        return statistics.median(entry["seconds"] for entry in found.values()), gain, "as others took here"
    return SECONDS, gain, "assumed"
