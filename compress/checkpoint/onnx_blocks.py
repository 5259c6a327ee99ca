"""The operands of MatMulNBits, onnxruntime's product with weights of a few bits, from a quantized weight and back.

    w = (code - zero_point) · scale       codes and zero points unsigned, in 2, 4 or 8 bits
    codes  [out, blocks, bytes]           of each block of columns in a row, the lowest bits first
    scales [out, blocks]                  in the type of the inputs, float32
    zero_points [out, bytes]              packed like codes; left out where all are 2^(bits-1)

Blocks have 16, 32, … 256 columns. A group of ours is one block or several with the same scale; the last block of a row
may reach beyond it. Codes in between, of 3 bits, say, are numbers of the next wider grid. Nothing is rounded: scales
widen to float32, and signed codes move by 2^(bits-1).

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from compress.checkpoint.packing import pack, unpack
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Operands:
    """What MatMulNBits is given besides inputs."""

    columns: int
    bits: int
    block: int
    codes: UInt8[Tensor, "out blocks bytes"]
    scales: Float32[Tensor, "out blocks"]
    zero_points: UInt8[Tensor, "out bytes"] | None


def problem(name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Why a layer cannot be these operands."""
    grid = scheme.weights
    if scheme.inputs or grid.kind != "int" or grid.rows != 1:
        return f"{name}: MatMulNBits holds integer weights whose inputs are not rounded, not {scheme.name}"
    if _blocks(shape[1], grid):
        return None
    return (
        f"{name}: group_size={grid.group_size} is not made of blocks of {BLOCKS[0]}, {BLOCKS[1]} … {BLOCKS[-1]} "
        "columns, which MatMulNBits has. Use a multiple of 16"
    )


def to_operands(tensor: QuantizedTensor) -> Operands:
    """A weight for which there is no `problem`."""
    (rows, columns), grid = tensor.shape, tensor.grid
    bits = next(bits for bits in BITS if bits >= grid.bits)
    block = min(_blocks(columns, grid), key=lambda block: (-(-columns // block) * (block * bits + 32), -block))
    blocks = -(-columns // block)
    padded = torch.zeros(rows, blocks * block, dtype=torch.uint8)
    padded[:, :columns] = _unsigned(tensor.codes, bits)
    groups = torch.arange(blocks) * block // (grid.group_size or columns)
    zero_points = None
    if tensor.zero_point is not None:
        packed = pack(_unsigned(tensor.zero_point, bits)[:, groups], bits).view(torch.uint8)
        zero_points = packed[:, : -(-blocks * bits // 8)]
    codes = pack(padded, bits).view(torch.uint8).view(rows, blocks, -1)
    return Operands(columns, bits, block, codes, tensor.step[:, groups], zero_points)


def from_operands(held: Operands) -> QuantizedTensor:
    """The weight that they stand for, on the grid of their bits and blocks; a row is one group where all blocks of it
    have the same scale and zero point.

    Raises ValueError for what is no such operands.
    """
    rows, blocks = len(held.codes), -(-held.columns // held.block) if held.block in BLOCKS else 0
    expected = {
        "codes": (held.codes, (rows, blocks, held.block * held.bits // 8), torch.uint8),
        "scales": (held.scales, (rows, blocks), torch.float32),
        "zero points": (held.zero_points, (rows, -(-blocks * held.bits // 8)), torch.uint8),
    }
    if held.bits not in BITS or blocks < 1:
        raise ValueError(f"{held.columns} columns in blocks of {held.block}, {held.bits} bits each")
    for what, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise ValueError(f"{what} are {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}")
    codes = _signed(unpack(_words(held.codes.view(rows, -1)), held.bits, blocks * held.block), held.bits)
    scales, zeros = held.scales, None
    if held.zero_points is not None:
        zeros = _signed(unpack(_words(held.zero_points), held.bits, blocks), held.bits)
    whole = bool((scales == scales[:, :1]).all()) and (zeros is None or bool((zeros == zeros[:, :1]).all()))
    if not whole and held.columns % held.block:
        raise ValueError(f"{held.columns} columns are no whole blocks of {held.block}, and scales differ")
    if whole:
        scales, zeros = scales[:, :1].contiguous(), None if zeros is None else zeros[:, :1].contiguous()
    grid = Grid(held.bits, zeros is None, None if whole else held.block)
    return QuantizedTensor(codes[:, : held.columns].contiguous(), scales, zeros, grid)


def _blocks(columns: int, grid: Grid) -> list[int]:
    """Blocks that do not straddle two groups; a row that is one group may end inside a block."""
    whole = grid.num_groups(columns) == 1
    return [block for block in BLOCKS if whole or not (grid.group_size or columns) % block]


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.view(torch.uint8) + (1 << bits - 1)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - (1 << bits - 1)).view(torch.int8)


def _words(rows: UInt8[Tensor, "rows bytes"]) -> Tensor:
    """Bytes filled up to whole words of 32 bits."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).view(torch.int32)
