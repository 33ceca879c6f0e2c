"""Quantised matrices, and how compressed-tensors stores them: the format that vLLM and transformers read.

config.json's `quantization_config` says which modules are quantised and how ("config_groups"); a module `m` of it has,
in place of `m.weight`,

    "pack-quantized": m.weight_packed int32 (out, in x bits / 32), the first value in the lowest bits; m.weight_scale
        (out, blocks); m.weight_zero_point int32 (out x bits / 32, blocks), packed down the rows, unless symmetric;
        m.weight_shape int64 [out, in]
    "int-quantized": m.weight int8 (out, in), less 128; m.weight_scale (out, blocks); m.weight_zero_point int8

(https://github.com/vllm-project/compressed-tensors; tests/model/test_quant.py holds both against the package). Codes
are unsigned here. A matrix that the family stores transposed lies (out, in) here; no other reader has such modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmctl.errors import DataError
from llmctl.model.jsonfile import read_json
from llmctl.model.storage import Layout, Stored

KEY = "quantization_config"
METHOD = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", "int-quantized"
LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
MEND = "copy the folder again, or quantise the model again: llmctl export --hf --quantize int4"


class Scheme(NamedTuple):
    """How a matrix is quantised.

    Attributes:
        bits: of a code, 4 or 8.
        block: values of a row that share a scale; 0: the whole row. The last block of a row may be shorter.
        symmetric: no zero points: the code 2^(bits - 1) stands for 0.
        dynamic: what the matrix is multiplied with is rounded too, to int8, with a scale a token.
    """

    bits: int
    block: int
    symmetric: bool
    dynamic: bool = False

    def width(self, columns: int) -> int:
        """Values that share a scale in rows of `columns`."""
        return self.block or columns

    def blocks(self, columns: int) -> int:
        """Scales a row."""
        return -(-columns // self.width(columns))

    def size(self, rows: int, columns: int) -> int:
        """Bits that a matrix takes, its fp32 scales and its zero points among them."""
        scales = rows * self.blocks(columns)
        return rows * columns * self.bits + scales * (32 + (0 if self.symmetric else self.bits))


@dataclass(frozen=True)
class Quantized:
    """A matrix in few bits: (codes - zero) * scale.

    Attributes:
        codes: (out, in) uint8, 0 .. 2^bits - 1.
        scales: (out, blocks) fp32, positive.
        zeros: (out, blocks) uint8; None: 2^(bits - 1) everywhere.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def values(self) -> Tensor:
        """The matrix, (out, in) fp32."""
        columns, width = self.codes.shape[1], self.scheme.width(self.codes.shape[1])
        short = -columns % width  # of the last block
        codes = F.pad(self.codes, (0, short)) if short else self.codes
        found = codes.float().view(len(codes), -1, width)  # (out, blocks, width)
        found -= float(1 << (self.scheme.bits - 1)) if self.zeros is None else self.zeros.float()[:, :, None]
        found *= self.scales[:, :, None]
        values: Tensor = found.flatten(1)
        return values[:, :columns].contiguous() if short else values

    def rows(self, start: int, stop: int) -> Quantized:
        """Some of its rows."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Quantized(self.scheme, self.codes[start:stop], self.scales[start:stop], zeros)


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one scheme and width, one below the other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Quantized(parts[0].scheme, codes, scales, torch.cat(zeros) if zeros else None)


# ------------------------------------------------------------------------------------------------------------ reading


class Packed(NamedTuple):
    """A quantised matrix in a file: `shape` is (out, in), or as the family's layout has it; `parts` its tensors."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]


class Group(NamedTuple):
    """An entry of `config_groups`: module names, or "Linear" and "Embedding" for all of a class."""

    targets: frozenset[str]
    scheme: Scheme
    format: str


def found(folder: Path, places: Mapping[str, Stored]) -> dict[str, Packed]:
    """The quantised matrices among the tensors of a folder, under the name that the plain weight would have.

    What the headers and config.json say has been held against each other; `unpack` checks the values.

    Raises:
        DataError: another method, a scheme that llmctl does not read, or tensors that do not fit it, each by name.
    """
    config = folder / "config.json"
    stated = read_json(config).get(KEY) if config.is_file() else None
    if stated is None:
        return {}
    groups = described(stated, config)
    packed: dict[str, Packed] = {}
    for name in [name for name in places if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        group = next((g for g in groups if module in g.targets), None) or next(
            (g for g in groups if g.targets & {"Linear", "Embedding"}), None
        )
        if group is None:
            raise DataError(f"no group of {KEY} names {module}, which has scales", file=config, hint=MEND)
        parts = {leaf: places[f"{module}.{leaf}"] for leaf in (*LEAVES, "weight") if f"{module}.{leaf}" in places}
        packed[f"{module}.weight"] = Packed(group.scheme, _shape(module, group, parts), parts)
    named = (module for group in groups for module in group.targets - {"Linear", "Embedding"})
    if plain := next((module for module in named if f"{module}.weight" not in packed), ""):
        raise DataError(f"{KEY} says that {plain} is quantised, but it has no scales", file=config, hint=MEND)
    return packed


def described(stated: Any, file: Path) -> list[Group]:
    """The groups that a `quantization_config` states.

    Raises:
        DataError: another method than compressed-tensors, or what llmctl has no scheme for.
    """
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise DataError(
            f"{KEY} is of {method!r}, which llmctl does not read",
            file=file,
            hint=f"take the model before quantising, or one stored by {METHOD}",
        )
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise DataError(f"{KEY} has no config_groups", file=file, hint=MEND)
    if stated.get("kv_cache_scheme"):
        raise DataError(f"{KEY} quantises the KV cache, which llmctl does not read", file=file)
    found = [_group(name, group, str(stated.get("format")), file) for name, group in groups.items()]
    if any(group.scheme.dynamic for group in found):  # a tied embedding says nothing of what it reads as the head
        found = [each._replace(scheme=each.scheme._replace(dynamic=each.format == PLAIN)) for each in found]
    return found


def _group(name: str, stated: dict[str, Any], format: str, file: Path) -> Group:
    def refuse(what: str) -> DataError:
        known = "4 or 8 bits of type int, strategy group or channel, activations left alone or int8 by token"
        return DataError(f"{KEY}: {name}: {what}, which llmctl does not read", file=file, hint=f"it reads {known}")

    weights, inputs, targets = stated.get("weights"), stated.get("input_activations"), stated.get("targets")
    format = str(stated.get("format") or format)
    if format not in (PACKED, PLAIN):
        raise refuse(f"the format {format!r}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise refuse("targets that are no list of names")
    if any(target.startswith("re:") for target in targets):
        raise refuse("a regular expression as a target")
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    if (
        not isinstance(weights, dict)
        or weights.get("type", "int") != "int"
        or type(bits) is not int
        or bits not in (4, 8)
    ):
        raise refuse(f"the weights {weights!r}")
    block, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy == "channel" and block in (None, -1):
        block = 0
    elif strategy != "group" or type(block) is not int or block < 1:
        raise refuse(f"strategy {strategy!r} with group_size {block!r}")
    if inputs is not None and not (isinstance(inputs, dict) and inputs.items() >= TOKENS.items()):
        raise refuse(f"the input_activations {inputs!r}")
    if stated.get("output_activations"):
        raise refuse("output_activations")
    scheme = Scheme(bits, block, weights.get("symmetric", True) is True, inputs is not None)
    return Group(frozenset(targets), scheme, format)


def _shape(module: str, group: Group, parts: Mapping[str, Stored]) -> tuple[int, int]:
    """(out, in) of a module, once every tensor of it has been found to have the shape that follows."""
    scheme, file = group.scheme, parts["weight_scale"].path

    def refuse(what: str) -> DataError:
        return DataError(f"{module} does not fit its scheme: {what}", file=file, hint=MEND)

    codes = "weight" if group.format == PLAIN else "weight_packed"
    wanted = {codes, "weight_scale"} | ({"weight_shape"} if group.format == PACKED else set())
    wanted |= set() if scheme.symmetric else {"weight_zero_point"}
    if parts.keys() != wanted:
        raise refuse(f"it has {', '.join(sorted(parts))}, not {', '.join(sorted(wanted))}")
    if group.format == PACKED:
        if parts["weight_shape"].shape != (2,) or parts["weight_shape"].dtype not in ("I64", "I32"):
            raise refuse("weight_shape is no pair of numbers")
        raw = b"".join(parts["weight_shape"].chunks())
        rows, columns = (int.from_bytes(raw[i : i + len(raw) // 2], "little") for i in (0, len(raw) // 2))
    else:
        rows, columns = parts[codes].shape if len(parts[codes].shape) == 2 else (0, 0)
    if not 0 < rows * columns < 1 << 48 or scheme.block > columns:
        raise refuse(f"shape [{rows:,}, {columns:,}] in blocks of {scheme.block:,}")
    words, zeros = math.ceil(columns * scheme.bits / 32), math.ceil(rows * scheme.bits / 32)
    blocks, kind = scheme.blocks(columns), "I32" if group.format == PACKED else "I8"
    shapes = {
        codes: (rows, words if group.format == PACKED else columns),
        "weight_scale": (rows, blocks),
        "weight_zero_point": (zeros if group.format == PACKED else rows, blocks),
    }
    kinds = {codes: (kind,), "weight_zero_point": (kind,), "weight_scale": ("F32", "F16", "BF16")}
    for leaf in [leaf for leaf in parts if leaf != "weight_shape"]:
        if parts[leaf].shape != shapes[leaf] or parts[leaf].dtype not in kinds[leaf]:
            got = f"{leaf} is {parts[leaf].dtype} {list(parts[leaf].shape)}"
            raise refuse(f"{got}, not {' or '.join(kinds[leaf])} {list(shapes[leaf])}")
    return rows, columns


def unpack(name: str, packed: Packed, read: Callable[[Stored], Tensor]) -> Quantized:
    """The matrix of one entry of `found`.

    Raises:
        DataError: a scale that is no positive number, or a code that the bits do not reach.
    """
    scheme, parts = (
        packed.scheme,
        {leaf: read(stored) for leaf, stored in packed.parts.items() if leaf != "weight_shape"},
    )
    scales = parts["weight_scale"].float()
    zeros = parts.get("weight_zero_point")
    if "weight" in parts:
        codes = shifted(parts["weight"], scheme.bits)
        zeros = None if zeros is None else shifted(zeros, scheme.bits)
    else:
        shape = packed.shape if parts["weight_packed"].shape[0] == packed.shape[0] else packed.shape[::-1]
        codes = from_words(parts["weight_packed"], scheme.bits, shape[1])
        zeros = None if zeros is None else from_words(zeros.t(), scheme.bits, shape[0]).t().contiguous()
    file = packed.parts["weight_scale"].path
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise DataError(f"{name}: a scale is not a positive number", file=file, hint=MEND)
    if scheme.bits < 8 and max(int(part.max()) for part in (codes, zeros) if part is not None) >> scheme.bits:
        raise DataError(f"{name}: a code lies beyond {scheme.bits} bits", file=file, hint=MEND)
    return Quantized(scheme, codes, scales, zeros)


# ------------------------------------------------------------------------------------------------------------ writing


def stored(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a matrix by their names on disk; `name` ends in ".weight"."""
    module, scheme, zeros = name.removesuffix(".weight"), quantized.scheme, quantized.zeros
    parts = {"weight_scale": quantized.scales}
    if scheme.dynamic:
        parts["weight"] = (quantized.codes ^ 0x80).view(torch.int8)
        assert zeros is None, "products of int8 with int8 have no zero points"
    else:
        parts["weight_packed"] = to_words(quantized.codes, scheme.bits)
        parts["weight_shape"] = torch.tensor(quantized.codes.shape)
        if zeros is not None:
            parts["weight_zero_point"] = to_words(zeros.t(), scheme.bits).t()
    return {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in parts.items()}


def layout(name: str, scheme: Scheme, rows: int, columns: int) -> Layout:
    """dtype and shape of what `stored` gives."""
    module, blocks = name.removesuffix(".weight"), scheme.blocks(columns)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"weight_scale": ("F32", (rows, blocks))}
    if scheme.dynamic:
        parts["weight"] = ("I8", (rows, columns))
    else:
        parts["weight_packed"] = ("I32", (rows, math.ceil(columns * scheme.bits / 32)))
        parts["weight_shape"] = ("I64", (2,))
        if not scheme.symmetric:
            parts["weight_zero_point"] = ("I32", (math.ceil(rows * scheme.bits / 32), blocks))
    return {f"{module}.{leaf}": part for leaf, part in parts.items()}


def stating(schemes: Mapping[str, Scheme], ignored: Sequence[str], tables: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of modules by name.

    `ignored` are those that stay as they are; `tables` those that are looked up and so round nothing that they read.
    """
    kinds = {name: (scheme, scheme.dynamic and name not in tables) for name, scheme in schemes.items()}
    groups: dict[str, Any] = {}
    for index, (scheme, rounds) in enumerate(sorted(set(kinds.values()))):
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
        weights |= {"strategy": "group", "group_size": scheme.block} if scheme.block else {"strategy": "channel"}
        groups[f"group_{index}"] = {
            "targets": [name for name, kind in kinds.items() if kind == (scheme, rounds)],
            "weights": weights,
            "input_activations": dict(TOKENS) if rounds else None,
            "output_activations": None,
            "format": PLAIN if scheme.dynamic else PACKED,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignored),
        "config_groups": groups,
        "dequantize": True,  # transformers 5.23 takes neither zero points nor embeddings otherwise
    }


# --------------------------------------------------------------------------------------------------------------- bits


def to_words(codes: Tensor, bits: int) -> Tensor:
    """(R, N) uint8 codes -> (R, ceil(N bits / 32)) int32, the first in the lowest bits."""
    codes = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.flatten().view(torch.int32).view(len(codes), -1)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """What `to_words` packed: (R, W) int32 -> (R, count) uint8."""
    codes = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return codes[:, :count].contiguous()


def shifted(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as unsigned ones, int8 -> uint8; those beyond the bits stay beyond them."""
    if bits == 8:
        return codes.view(torch.uint8) ^ 0x80
    return (codes.short() + (1 << (bits - 1))).to(torch.uint8)  # -9 becomes 255
