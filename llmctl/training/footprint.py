"""What a training costs, known before it starts: memory by part, operations and time.

Memory is not estimated by formulas. A step of the real model, with the real loss and the real optimisers, is carried
out on tensors that have shapes and no values (torch's FakeTensorMode), and a ledger follows when each storage comes and
goes. So whatever a sublayer keeps for its backward pass is counted, and the plan is what is live at the worst moment.

What the plan leaves out: what a kernel takes and gives back within one call, and what the allocator keeps of memory
that was freed. With glibc that is a third to nine tenths more on a CPU (docs/plan.md), unless `give_back` is called.
"""

# B batch, T time, C channels, V vocabulary

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmctl.model import hf, lora, sublayers, trunk
from llmctl.model.config import Config
from llmctl.model.transformer import Decoder, Encoder
from llmctl.training import corruption, distributed, movement, optim
from llmctl.training.distillation import Distiller
from llmctl.training.ema import Ema
from llmctl.training.objectives import Learner
from llmctl.training.precision import Precision

PARTS = (
    "weights", "gradients", "optimiser", "average", "activations", "logits", "workspace", "checkpoint", "teacher",
)  # fmt: skip
ROOM = 0.8  # of the memory that is free may be planned with: kernels and the allocator want some too
M_MMAP_THRESHOLD = -3  # malloc.h
MASKED = 0.15  # of an encoder's tokens go through its head
HOLES = 1.9  # measured: what glibc's heap holds at most, in what is live (docs/plan.md)
returns = False  # whether `give_back` has been called


@dataclass(frozen=True)
class Training:
    """What decides how much memory a training step takes."""

    config: Config
    length: int  # tokens a sequence
    micro_batch: int  # sequences at a time
    dtype: str  # "fp32", "bf16", "fp16": of the matrix products
    optimizer: optim.Kind
    average: bool = False  # of the weights (`ema_decay`)
    checkpointing: bool = False  # of activations
    accumulates: bool = False  # several micro-batches a step: gradients lie in memory while the next is computed
    saves: bool = True  # checkpoints on the way: their copy lies in the host's memory
    gpu: bool = False
    ranks: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    lora: tuple[int, tuple[str, ...]] | None = None  # rank and target modules of adapters
    sparse: bool = False  # which weights stay zero is remembered
    teacher: Config | None = None  # of a student


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part, at the moment of a step when their sum is highest."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that operations make, from when it comes until it goes.

    Attributes:
        part: what is made from now on belongs to it.
        live: bytes of each part now; `peak`: when their sum was highest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "workspace"
        self.live = dict.fromkeys(PARTS, 0)
        self.peak = dict(self.live)
        self._known: dict[int, tuple[object, str, int]] = {}
        self._sum = self._highest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for found in tree_iter(out):
            if isinstance(found, Tensor):
                self._count(found)
        return out

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """Has these storages belong to another part."""
        for tensor in tensors:
            key = self._count(tensor)
            watch, old, size = self._known[key]
            self.live[old] -= size
            self.live[part] += size
            self._known[key] = watch, part, size

    def _count(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, functools.partial(self._gone, key)), self.part, size
            self.live[self.part] += size
            self._sum += size
            if self._sum > self._highest:
                self._highest, self.peak = self._sum, dict(self.live)
        return key

    def _gone(self, key: int, _: object) -> None:
        _, part, size = self._known.pop(key)
        self.live[part] -= size
        self._sum -= size


@functools.lru_cache(maxsize=256)
def memory(training: Training) -> Memory:
    """What a step takes on one of the training's ranks."""
    with _attention_of_a_gpu() if training.gpu else contextlib.nullcontext():
        parts = _traced(training)
    if training.ranks > 1 and training.strategy == "fsdp":
        whole = {part: parts[part] for part in ("weights", "gradients", "optimiser", "average", "checkpoint")}
        parts |= {part: -(-size // training.ranks) for part, size in whole.items()}
        # a block that computes and the next, gathered; and a gradient before it is cut up (FSDP2 prefetches one)
        parts["workspace"] += 3 * _largest_block(training.config) * (4 if training.dtype == "fp32" else 2)
    return Memory(parts)


def _traced(training: Training) -> dict[str, int]:
    """A first step's optimisers, which make their state, then a whole step."""
    model, ledger = hf.build(training.config), Ledger()
    teacher = hf.build(training.teacher) if training.teacher is not None else None
    precision = Precision(torch.device("cpu"), "fp32" if training.dtype == "fp32" else "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").train()
        if training.lora is not None and isinstance(model, Decoder):
            lora.apply(model, training.lora[0], 1.0, training.lora[1], seed=0)
        learner: nn.Module = Learner(model)
        if isinstance(teacher, hf.Causal) and isinstance(model, hf.Causal):
            learner = Distiller(model, teacher.to_empty(device="cpu"), 0.5, 1.0)
            ledger.move((*teacher.parameters(), *teacher.buffers()), "teacher")
        learner = distributed.wrap(learner, distributed.ALONE, checkpointing=training.checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers = optim.build(model, training.optimizer, 1e-3, dtype=training.dtype)
        average = Ema(model, 0.5 if training.average else 0.0)
        ledger.move((*model.parameters(), *model.buffers()), "weights")
        ledger.move(average.tensors.values(), "average")
        with ledger:
            if training.sparse:
                ledger.part = "optimiser"
                optim.hold_zeros(model, optimizers)
            for p in trained:
                p.grad = torch.empty_like(p)
            _optimise(ledger, trained, optimizers, average)
            kept = sum(ledger.live[part] for part in ("weights", "optimiser", "average"))
            copy = torch.empty(kept if training.saves and not training.gpu else 0, dtype=torch.uint8)
            ledger.move((copy,), "checkpoint")
            if training.accumulates:
                for p in trained:
                    p.grad = torch.empty_like(p)
                ledger.move((p.grad for p in trained if p.grad is not None), "gradients")
            ledger.part = "activations"
            with precision.autocast():
                loss = _loss(learner, model, training, ledger)
            ledger.part = "workspace"
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            _optimise(ledger, trained, optimizers, average)
    return ledger.peak


def _loss(learner: nn.Module, model: hf.Model, training: Training, ledger: Ledger) -> Tensor:
    """The forward pass; what is made once the model has its states belongs to the logits."""
    shapes = [(training.micro_batch, length) for length in lengths(training.config, training.length)]
    inputs = [torch.zeros(shape, dtype=torch.long) for shape in shapes]
    hidden = model.hidden

    def states(*inputs: Any, **more: Any) -> Tensor:
        found: Tensor = hidden(*inputs, **more)
        ledger.part = "logits"
        return found

    with mock.patch.object(model, "hidden", states):
        if isinstance(model, Encoder):  # which tokens are hidden depends on values, and here are none
            x = model.hidden(*inputs).flatten(0, 1)
            at = torch.arange(max(1, round(MASKED * len(x))))
            return F.cross_entropy(model.logits(x[at]), inputs[-1].flatten()[at], reduction="sum")
        found: Tensor = learner(*inputs, inputs[-1])
        return found


def lengths(config: Config, window: int) -> tuple[int, ...]:
    """Tokens of each text that the model reads: of an encoder-decoder what is left of a window and what was cut out."""
    if config.kind != "encoder-decoder":
        return (window,)
    marks = np.arange(corruption.span_count(window))
    pair = corruption.spans(np.arange(window), np.random.default_rng(0), sentinels=marks, eos=0)
    return len(pair[0]), len(pair[1])


def _optimise(ledger: Ledger, trained: list[nn.Parameter], optimizers: list[Optimizer], average: Ema) -> None:
    """What the loop does with gradients."""
    ledger.part = "workspace"
    ledger.move((p.grad for p in trained if p.grad is not None), "gradients")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    before = movement.snapshot(trained)
    for optimizer in optimizers:
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        ledger.move((value for value in states if isinstance(value, Tensor)), "optimiser")
    average.follow(1)
    del before
    for p in trained:
        p.grad = None


@contextlib.contextmanager
def _attention_of_a_gpu() -> Iterator[None]:
    """Scores that are never kept, as FlashAttention's (Dao et al. 2022, arXiv:2205.14135), not a CPU's `blockwise`."""
    with mock.patch.object(sublayers, "BLOCKWISE", 0), mock.patch.object(trunk, "BLOCKWISE", 0):
        yield


def _largest_block(config: Config) -> int:
    blocks = [module for module in hf.build(config).modules() if isinstance(module, sublayers.Block)]
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=config.parameters)


def give_back() -> bool:
    """Has glibc give every larger piece of memory back to the system as soon as it is freed; whether it could be told.

    What a step takes at most is then what the plan says, where it is up to HOLES times that otherwise. The system
    clears each page again, which costs an eager step a third to a whole of its time: for trainings that fit no other
    way.
    """
    global returns
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None  # not in musl
    returns = mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 65_536))
    return returns
