"""Quantised matrices as nodes: how a product, and the lookup of a token, read the codes of model/quant.py.

`ort`: MatMulNBits reads codes of 4 or 8 bits with a scale a block, and rounds what they are multiplied with to int8,
block by block (accuracy level 4: products of integers, 1.6 times as fast as in fp32 [ran: ORT 1.31, AVX512-VNNI]). The
embedding is looked up in the very bytes that the head multiplies (GatherBlockQuantized).

`portable`: DequantizeLinear in blocks and MatMul, which ONNX Runtime fuses to the same, and TensorRT reads where there
are no zero points. A lookup takes the codes as int8 and scales the rows it took.

Dynamic products, in either: a token's values are rounded with one scale, so that no row of a batch changes another's
(DynamicQuantizeLinear takes one scale for all of them), then multiplied as integers.

B batch, T tokens, N outputs, K inputs
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from llmctl.model.quant import BLOCKS, Quantized

if TYPE_CHECKING:
    from llmctl.export.builder import Graph

CONTRIB = "com.microsoft"
INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level
MIDDLE = 128  # what stands for 0 in uint8 codes


def product(g: Graph, x: str, matrix: Quantized, name: str, *, out: str) -> str:
    """x (B, T, K) through the transpose of a matrix (N, K): (B, T, N). `name` is what its tensors are called by."""
    if matrix.scheme.dynamic:
        return dynamic(g, x, matrix, name, out=out)
    if g.form.profile == "portable":
        return g.op("MatMul", x, dequantized(g, matrix, name), out=out)
    (N, K), scheme = matrix.codes.shape, matrix.scheme
    shape = (N, scheme.blocks(K), scheme.width(K) * scheme.bits // 8)
    parts = [bits(g, matrix, name, shape), scales(g, matrix, name, (-1,)), *zeros(g, matrix, name, (-1,))]
    sizes = {"K": K, "N": N, "bits": scheme.bits, "block_size": scheme.block, "accuracy_level": INT8_PRODUCTS}
    return g.op("MatMulNBits", x, *parts, out=out, domain=CONTRIB, **sizes)


def lookup(g: Graph, ids: str, matrix: Quantized, name: str, *, out: str) -> str:
    """Rows of a matrix (N, K) by number, (B, T) -> (B, T, K)."""
    matrix = blocked(matrix)
    (N, K), scheme = matrix.codes.shape, matrix.scheme
    width, blocks = scheme.width(K), scheme.blocks(K)
    if g.form.profile == "ort" and K % width == 0 and not scheme.dynamic:  # the node knows no shorter last block
        parts = [bits(g, matrix, name, (N, K * scheme.bits // 8)), ids, scales(g, matrix, name, (N, blocks))]
        sizes = {"bits": scheme.bits, "block_size": scheme.block, "gather_axis": 0, "quantize_axis": 1}
        parts += zeros(g, matrix, name, (N, -1))
        return g.op("GatherBlockQuantized", *parts, out=out, domain=CONTRIB, **sizes)
    middle = torch.tensor(1 << (scheme.bits - 1)) if matrix.zeros is None else matrix.zeros.int()[:, :, None]
    whole = F.pad(matrix.codes.int(), (0, -K % width)).view(N, blocks, width)
    values = whole - middle  # of eight bits with zero points: -255 .. 255
    kind = "int16" if scheme.bits == 8 and matrix.zeros is not None else "int8"
    stored = g.table(f"{name}.values", values.numpy(), kind)
    codes = g.op("Cast", g.op("Gather", stored, ids, out=f"{out}.codes"), out=f"{out}.integers", to=g.form.type)
    steps = g.table(f"{name}.steps", matrix.scales[:, :, None].numpy())
    scaled = g.op(
        "Mul", codes, g.op("Gather", steps, ids, out=f"{out}.steps"), out=f"{out}.blocks"
    )  # (B, T, blocks, width)
    flat = g.op("Reshape", scaled, g.constant("flat_blocks", [0, 0, -1]), out=out if K % width == 0 else f"{out}.whole")
    if K % width == 0:
        return flat
    ends = [g.constant(f"{out}.{part}", [at]) for part, at in (("first", 0), ("stop", K), ("axis", 2))]
    return g.op("Slice", flat, *ends, out=out)


def blocked(matrix: Quantized) -> Quantized:
    """What is looked up has its inputs rounded by nobody: a dynamic matrix as one of blocks, the scales repeated.

    A head that is the embedding too is multiplied so as well, from the same bytes.
    """
    block = next((block for block in BLOCKS if matrix.codes.shape[1] % block == 0), 0)
    if not matrix.scheme.dynamic or not block:
        return matrix
    scheme = matrix.scheme._replace(block=block, dynamic=False)
    return Quantized(scheme, matrix.codes, matrix.scales.repeat(1, matrix.codes.shape[1] // block), None)


def rounded(g: Graph, x: str, K: int) -> tuple[str, str]:
    """x (B, T, K) as uint8 around MIDDLE and the step of each token, (B, T, 1): once, however many products read it."""
    codes, step = f"{x}.rounded", f"{x}.step"
    if any(node.output[0] == codes for node in reversed(g.nodes)):
        return codes, step
    last, least = g.constant("last_axis", [-1]), g.scalar("least_scale", 1e-20)
    most = g.op("ReduceMax", g.op("Abs", x, out=f"{x}.magnitudes"), last, out=f"{x}.most")  # (B, T, 1)
    g.op("Max", g.op("Mul", most, g.scalar("per_step", 1 / 127), out=f"{x}.most_scaled"), least, out=step)
    shape = g.op("Shape", step, out=f"{x}.tokens")
    middles = g.op("Expand", g.constant("middle", MIDDLE, np.uint8), shape, out=f"{x}.middles")
    return g.op("QuantizeLinear", x, step, middles, out=codes, axis=2, block_size=K), step


def dynamic(g: Graph, x: str, matrix: Quantized, name: str, *, out: str) -> str:
    """A product of integers: x a scale a token, the matrix a scale a row."""
    N, K = matrix.codes.shape
    given, step = rounded(g, x, K)
    middle = g.constant("middle", MIDDLE, np.uint8)
    codes = (matrix.codes ^ MIDDLE).view(torch.int8).t().contiguous()  # (K, N)
    stored = g.store(name, (K, N), [codes.numpy().tobytes()], "int8")
    factors = g.table(f"{name}.scales", matrix.scales.flatten().numpy())
    if g.form.profile == "ort":
        one = g.scalar("one_scale", 1.0)
        y = g.op("MatMulIntegerToFloat", given, stored, one, factors, middle, out=f"{out}.product", domain=CONTRIB)
    else:
        whole = g.op("MatMulInteger", given, stored, middle, out=f"{out}.integers")
        y = g.op("Mul", g.op("Cast", whole, out=f"{out}.sums", to=g.form.type), factors, out=f"{out}.product")
    return g.op("Mul", y, step, out=out)


def dequantized(g: Graph, matrix: Quantized, name: str) -> str:
    """The transpose of a matrix (N, K) in the graph's dtype: (K, N)."""
    (N, K), scheme, kind = matrix.codes.shape, matrix.scheme, "" if matrix.zeros is None else "u"
    middle = (1 << (scheme.bits - 1)) if matrix.zeros is None else 0
    codes = (matrix.codes.t().contiguous().to(torch.int16) - middle).numpy().astype(np.int8 if middle else np.uint8)
    stored = g.store(name, (K, N), [packed(codes, scheme.bits)], f"{kind}int{scheme.bits}")
    parts = [g.table(f"{name}.scales", matrix.scales.t().contiguous().numpy())]
    if matrix.zeros is not None:
        table = packed(matrix.zeros.t().contiguous().numpy(), scheme.bits)
        parts.append(g.store(f"{name}.zeros", (scheme.blocks(K), N), [table], f"{kind}int{scheme.bits}"))
    return g.op("DequantizeLinear", stored, *parts, out=f"{name}.dequantized", axis=0, block_size=scheme.width(K))


def bits(g: Graph, matrix: Quantized, name: str, shape: tuple[int, ...]) -> str:
    """The codes of a matrix (N, K) in rows of whole blocks, the first of two in the low bits, seen as `shape`."""
    short = -matrix.codes.shape[1] % matrix.scheme.width(matrix.codes.shape[1])
    padded = np.pad(matrix.codes.numpy(), ((0, 0), (0, short)))
    return g.seen(f"{name}.codes", padded_bits(padded, matrix.scheme.bits), shape, "uint8")


def scales(g: Graph, matrix: Quantized, name: str, shape: tuple[int, ...]) -> str:
    return g.seen(f"{name}.scales", matrix.scales.numpy(), shape, g.form.dtype)


def zeros(g: Graph, matrix: Quantized, name: str, shape: tuple[int, ...]) -> list[str]:
    """The zero points, packed row by row; none where the scheme is symmetric."""
    if matrix.zeros is None:
        return []
    return [g.seen(f"{name}.zeros", padded_bits(matrix.zeros.numpy(), matrix.scheme.bits), shape, "uint8")]


def padded_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """(N, M) uint8 codes -> (N, ceil(M bits / 8)): each row ends on a whole byte."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return np.ascontiguousarray(even[:, 0::2] | (even[:, 1::2] << 4))


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Codes as ONNX stores int4 and int8: two of four bits a byte, rows running on."""
    if bits == 8:
        return codes.tobytes()
    flat = codes.view(np.uint8).reshape(-1) & 15
    flat = np.pad(flat, (0, len(flat) % 2))
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()
