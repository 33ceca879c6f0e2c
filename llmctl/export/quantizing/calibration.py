"""What matrices are multiplied with on real text, block by block, so that each is rounded for what it will read.

B windows, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmctl.model.sublayers import Block
from llmctl.model.transformer import Decoder

ROWS = 8  # windows at once

Hessians = dict[str, Tensor]  # matrix, by its name in the block -> H of what it reads


def blockwise(model: Decoder, ids: Tensor, change: Callable[[int, Block, Hessians], None] | None) -> Tensor:
    """Runs (B, T) windows through the model one block after another; returns H of what the head reads, (C, C).

    Before a block passes its states on, `change` may round its matrices: the next one then reads what it will read.
    """
    trunk = model.model
    with torch.inference_mode():
        x = trunk.embed(ids, 0, None, None, None)
        masks, ropes = trunk.masks(x, 0, None, None), trunk.ropes(0, ids.shape[1], None)
        for index, block in enumerate(trunk.blocks):

            def run(x: Tensor, block: Block = block) -> Tensor:
                parts = [block(part, ropes.get(block.kind), masks[block.kind], None) for part in torch.split(x, ROWS)]
                return torch.cat(parts)

            if change is not None:
                with reading(block) as hessians:
                    run(x)
                change(index, block, hessians)
            x = run(x)
        return second_moment(trunk.norm(x))


@contextmanager
def reading(block: nn.Module) -> Iterator[Hessians]:
    """H of every linear layer in `block`, over all that passes meanwhile; layers that read the same share one."""
    found: Hessians = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def seen(_: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0]
            found[name] = found.get(name, 0.0) + second_moment(x) * x.shape[:-1].numel()
            counts[name] = counts.get(name, 0) + x.shape[:-1].numel()

        return seen

    linear = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linear]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, count in counts.items():
            found[name] /= count


def second_moment(x: Tensor) -> Tensor:
    """The mean of x x^T over all tokens: (..., C) -> (C, C)."""
    flat = x.flatten(0, -2).float()
    return flat.t() @ flat / len(flat)
