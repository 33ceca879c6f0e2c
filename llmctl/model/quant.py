"""Models whose matrices are quantised: rounding to nearest, reading them by their native names, writing the folder.

`hf.load` gives such a folder as an ordinary model; `read` gives the codes, for those who write them elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmctl.model import compressed, hf, storage
from llmctl.model.compressed import Quantized as Quantized
from llmctl.model.compressed import Scheme as Scheme
from llmctl.model.families import stated as keys
from llmctl.model.families.layout import Stored
from llmctl.model.jsonfile import write_json
from llmctl.model.origin import INDEX

BLOCKS = (128, 64, 32, 16)
LAYERS = (nn.Linear, nn.Embedding)


def nearest(matrix: Tensor, scheme: Scheme) -> Quantized:
    """Round to nearest: each block's scale spans its values, (out, in); no value moves by more than half a step."""
    blocked = blocks_of(matrix, scheme)
    low, high = blocked.amin(-1).clamp(max=0), blocked.amax(-1).clamp(min=0)
    top = (1 << scheme.bits) - 1
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scales = torch.where(span > 0, span / top, 1.0)
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    zeros = None if scheme.symmetric else (-low / scales).round().clamp(0, top).to(torch.uint8)
    return Quantized(scheme, codes_of(matrix, scheme, scales, zeros), scales, zeros)


def codes_of(matrix: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The nearest codes under given scales: (out, in), (out, blocks), (out, blocks) -> (out, in) uint8."""
    middle: Tensor | float = float(1 << (scheme.bits - 1)) if zeros is None else zeros.float()[:, :, None]
    codes = (blocks_of(matrix, scheme) / scales[:, :, None]).round() + middle
    return codes.clamp(0, (1 << scheme.bits) - 1).to(torch.uint8).flatten(1)[:, : matrix.shape[1]].contiguous()


def blocks_of(matrix: Tensor, scheme: Scheme) -> Tensor:
    """(out, in) -> (out, blocks, width) fp32, zeros behind a last block that is shorter."""
    columns, width = matrix.shape[1], scheme.width(matrix.shape[1])
    return F.pad(matrix.float(), (0, -columns % width)).view(len(matrix), -1, width)


def fitted(scheme: Scheme, columns: int) -> Scheme:
    """The scheme for rows of `columns`: with the largest block up to its own that divides them, because
    compressed-tensors knows no shorter last block; with its own where none does.
    """
    return scheme._replace(block=next((b for b in BLOCKS if b <= scheme.block and columns % b == 0), scheme.block))


def matrices(model: nn.Module) -> list[str]:
    """The native names of what is quantised: the matrices of the blocks, the token embedding and a head of its own.

    Tables of positions and token types, and the small heads of encoders, stay as they are.
    """
    found = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LAYERS)]
    return [name for name in found if ".layers." in name or name.endswith(("embed_tokens.weight", "lm_head.weight"))]


# -------------------------------------------------------------------------------------------------------------- folders


def read(folder: Path) -> dict[str, Quantized]:
    """The quantised matrices of a folder by their native names; empty where it holds a plain model.

    Raises:
        DataError: as `hf.load`.
    """
    model = hf.build(hf.read_config(folder))
    native = model.state_dict()
    found: dict[str, Quantized] = {}
    for name, (entry, place) in hf.places(model, folder).items():
        if isinstance(place, compressed.Packed):
            whole, start = compressed.unpack(name, place, hf.read), 0
            for part in entry.parts:
                rows = native[part].shape[0]
                found[part] = whole.rows(start, start + rows)
                start += rows
    return found


def write(model: hf.Model, quantized: Mapping[str, Quantized], folder: Path) -> int:
    """Writes config.json and the weights into `folder`, which has the tokenizer's files; returns the weights' bytes.

    Args:
        model: on the CPU in fp32; gives what is not quantised.
        quantized: by native name; what the family stores as one tensor has one scheme.
    """
    native, stored = model.state_dict(), hf.layout(model)
    whole = {
        name: compressed.stacked([quantized[part] for part in entry.parts])
        for name, entry in stored.items()
        if entry.parts[0] in quantized
    }
    modules = {name.removesuffix(".weight"): kind for name, entry in stored.items() if (kind := _kind(model, entry))}
    schemes = {name.removesuffix(".weight"): matrix.scheme for name, matrix in whole.items()}
    tables = {name for name, kind in modules.items() if kind is nn.Embedding}
    config = keys.config_to_json(model.config)
    config[compressed.KEY] = compressed.stating(schemes, sorted(modules.keys() - schemes.keys()), tables)
    write_json(folder / "config.json", config)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in stored.items():
        if name in whole:
            shapes |= compressed.layout(name, whole[name].scheme, *whole[name].codes.shape)
        else:
            shapes[name] = ("F32", entry.shape)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, entry in stored.items():
            if name in whole:
                yield from compressed.stored(name, whole[name]).items()
            else:
                yield name, hf.joined(entry, native).detach().float()

    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    storage.write(folder, shapes, ((name, hf.chunks(tensor)) for name, tensor in tensors()), storage.SHARD)
    return sum(path.stat().st_size for path in hf.tensor_files(folder))


def _kind(model: nn.Module, entry: Stored) -> type[nn.Module] | None:
    """Of the layer that a stored matrix belongs to; None for other tensors."""
    module, _, leaf = entry.parts[0].rpartition(".")
    layer = model.get_submodule(module)
    return next((kind for kind in LAYERS if leaf == "weight" and isinstance(layer, kind)), None)
