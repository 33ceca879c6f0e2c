"""Several ranks at one training: who computes which rows, and torch's own engines (DDP, FSDP2) around the learner.

A rank is a process with a device of its own (`llmctl.launch` starts and joins them). All ranks frame the same global
batch and take their rows of it; gradients are added up, never averaged, because the loss is already divided by the
supervised tokens of the whole batch. So a run has the same loss and the same order of samples on any number of ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from llmctl import launch
from llmctl.model import hf
from llmctl.model.hf import Model
from llmctl.model.sublayers import Block
from llmctl.training.batch import Batch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed.fsdp import FSDPModule

Strategy = Literal["ddp", "fsdp"]
M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    size: int
    local_rank: int  # on its machine
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints, writes and publishes."""
        return self.rank == 0

    def mine(self, batch: Batch) -> Batch:
        """The rows of a global batch that this rank computes: as many as every other."""
        share, left = divmod(len(batch), self.size)
        assert not left, "see launch.check_batch"
        return batch if self.size == 1 else batch.rows(slice(self.rank * share, (self.rank + 1) * share))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same to the last bit on each."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def greatest(self, number: int) -> int:
        """The greatest over all ranks. It travels between the CPUs: no GPU waits for it."""
        if self.size == 1:
            return number
        told = torch.tensor(number)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank; all learn it at the same place."""
        return bool(self.greatest(flag))

    def firsts(self, flag: bool) -> bool:
        """What rank 0 says, on all of them."""
        return self.any(flag and self.is_first)

    def stir(self, seed: int, step: int) -> None:
        """Gives this rank random numbers of its own, which follow from the step: nobody has to keep their state.

        Rank 0 goes on with those that one process would have, and its state is part of the checkpoint.
        """
        if self.rank:
            torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1)[0]))

    @contextlib.contextmanager
    def first_goes(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, which so find the files that it wrote."""
        if not self.is_first:
            self.any(False)
        yield
        if self.is_first:
            self.any(False)


ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def here(device: torch.device) -> Ranks:
    """This process's place in the process group that it has joined, if it has."""
    if not dist.is_initialized():
        return Ranks(0, 1, 0, device)
    return Ranks(dist.get_rank(), dist.get_world_size(), launch.local_rank(), device)


# -------------------------------------------------------------------------------------------------------------- engines


def wrap(
    learner: nn.Module, ranks: Ranks, strategy: Strategy = "ddp", *, checkpointing: bool = False, bf16: bool = False
) -> nn.Module:
    """The learner as each rank calls it. Optimisers are built after this: FSDP shards the parameters in place.

    Args:
        strategy: ddp keeps whole weights on every rank (Li et al. 2020, arXiv:2006.15704). fsdp cuts weights, gradients
            and optimiser state up between them, and gathers a block when it is computed (Zhao et al. 2023,
            arXiv:2304.11277).
        checkpointing: keep each block's input alone, and compute the rest again in the backward pass (Chen et al. 2016,
            arXiv:1604.06174).
        bf16: with fsdp, gather weights in bf16; gradients are still added up in fp32.
    """
    blocks = [module for module in learner.modules() if isinstance(module, Block)]
    for block in blocks if checkpointing else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if ranks.size == 1:
        return learner
    if strategy == "fsdp":
        return _sharded(learner, blocks, bf16)
    wrapped = DistributedDataParallel(learner, gradient_as_bucket_view=True, forward_sync_buffers=False)
    wrapped.register_comm_hook(None, lambda _, bucket: _added(bucket))
    return wrapped


def _added(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Gradients are added up: DDP's own hook takes their mean."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda found: found.value()[0])  # type: ignore[no-any-return]


def _sharded(learner: nn.Module, blocks: list[Block], bf16: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = next(learner.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    frees = device.type != "cpu"  # after a block's forward pass; ranks on CPUs share their memory, and gather once
    for block in blocks:
        if (cross := getattr(block, "cross_attn", None)) is not None:  # it reads the encoder before its block is called
            fully_shard(cross, mesh=mesh, mp_policy=policy, reshard_after_forward=frees)
            register_fsdp_forward_method(cross, "read")
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=frees)
    fully_shard(learner, mesh=mesh, mp_policy=policy)
    for module in shards(learner):
        module.set_gradient_divide_factor(1.0)  # added up, as in DDP; by plain sums, the only ones gloo has
        module.set_force_sum_reduction_for_comms(True)
    return learner


def shards(learner: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP gathers and frees; none of another learner."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in learner.modules() if isinstance(module, FSDPModule)]


def accumulating(learner: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Around a micro-batch, forward and backward: only after the last one do gradients go between the ranks."""
    if isinstance(learner, DistributedDataParallel):
        return contextlib.nullcontext() if last else learner.no_sync()
    synchronise: Callable[[bool], None] | None = getattr(learner, "set_requires_gradient_sync", None)  # FSDP's
    if synchronise is not None:
        synchronise(last)
    return contextlib.nullcontext()


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down to a global norm of at most `limit`: their norm before that, (), over all ranks' shards."""
    trained = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    norm = whole_tensor(norm)
    torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that is cut up between the ranks, put together on each; any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


# ---------------------------------------------------------------------------------------------------------- whole again


@contextlib.contextmanager
def one_alone(learner: nn.Module) -> Iterator[bool]:
    """Whether this is rank 0, which may use the model alone for as long as the block runs: its weights are whole.

    All ranks must come here. Weights may be read, not changed.
    """
    modules = shards(learner) if dist.is_initialized() else []
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        for number, module in enumerate(modules):
            module.reshard()
            frees = number > 0 and next(learner.parameters()).device.type != "cpu"
            module.set_reshard_after_forward(frees, recurse=False)  # the outermost keeps its own


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether they are cut up between the ranks."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


def whole(model: M) -> M:
    """The model with all its weights, for measuring and publishing: itself, unless it is sharded.

    Then a copy on rank 0, on its CPU; the others get the sharded one back. All ranks must come here.
    """
    state = model.state_dict()
    if not is_sharded(state):
        return model
    found = {}
    for name, tensor in state.items():
        gathered = whole_tensor(tensor)
        if dist.get_rank() == 0:
            found[name] = gathered.detach().cpu()
    if not found:
        return model
    plain = cast(M, hf.build(model.config))
    plain.load_state_dict(found, assign=True)
    return plain
