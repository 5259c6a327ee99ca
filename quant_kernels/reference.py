"""A quantized linear layer in plain torch: the definition that every kernel is tested against.

Contract: `y = x · dequantize(weight)ᵀ + bias` for x [tokens, in] of any float type. A weight is `(code -
zero_point) · scale` in float32, rounded once to the type of x; the product is torch's own. Codes of up to
four bits lie two to a byte, FP4 as it came, wider ones one to a byte; scales [out, groups] keep the type they
came in. Where there is a `global_scale` they are divided by it, in float32 too.

It runs everywhere, for any bits, groups and odd shapes. Output rows are dequantized a chunk at a time: the
chunk stays in the processor's cache, which is worth more than any cleverness in unpacking, and a layer
needs no more than a few chunks beyond its packed weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels.layout import LinearSpec, Packed, levels_of, pack_nibbles, unpack_e2m1, unpack_nibbles

ROWS = 64
"""A chunk is a multiple of this many rows; layouts that interleave rows do so within one."""
CHUNK_WEIGHTS = 1 << 18
"""Weights in a chunk: a megabyte in float32."""

DequantizeRows = Callable[[Packed, int, int, torch.dtype], Tensor]
"""(packed, first row, last row + 1, dtype) → those rows of the weight, [rows, in]. The first is a multiple of
`ROWS`, and so is the last + 1 unless it ends the matrix."""


def objection(spec: LinearSpec) -> None:
    """None: it takes every layer."""


def pack(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, global_scale: Tensor | None = None
) -> Packed:
    rows, columns = codes.shape
    if levels_of(codes) == "fp4":
        return Packed("reference", bits, rows, 2 * columns, codes.contiguous(), scale.contiguous(), None, global_scale)
    stored = pack_nibbles(codes) if bits <= 4 else codes.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    return Packed("reference", bits, rows, columns, stored, scale.contiguous(), zero_point)


def dequantize_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight, computed in float32 and rounded once to `dtype`."""
    codes, scale = packed.codes[start:stop], packed.scale[start:stop].to(torch.float32)
    if packed.global_scale is not None:
        scale = scale / packed.global_scale
    if levels_of(codes) == "fp4":
        codes = unpack_e2m1(codes)
    elif packed.bits <= 4:
        codes = unpack_nibbles(codes, packed.in_features)
    grouped = codes.to(torch.float32).view(stop - start, scale.shape[1], -1)
    if packed.zero_point is not None:
        grouped.sub_(packed.zero_point[start:stop].unsqueeze(-1))
    return grouped.mul_(scale.unsqueeze(-1)).view(stop - start, -1).to(dtype)


def linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out]."""
    return linear_by_rows(x, packed, bias, dequantize_rows)


def linear_by_rows(x: Tensor, packed: Packed, bias: Tensor | None, rows_of: DequantizeRows) -> Tensor:
    """x [tokens, in] → [tokens, out], with the weight dequantized a chunk of rows at a time."""
    y = x.new_empty(x.shape[0], packed.out_features)
    for start, stop in chunks(packed):
        weight = rows_of(packed, start, stop, x.dtype)
        y[:, start:stop] = F.linear(x, weight, None if bias is None else bias[start:stop])
    return y


def chunks(packed: Packed, weights: int | None = None) -> list[tuple[int, int]]:
    """First and last row + 1 of each chunk of about so many weights."""
    step = max(1, (weights or CHUNK_WEIGHTS) // (packed.in_features * ROWS)) * ROWS
    return [(start, min(start + step, packed.out_features)) for start in range(0, packed.out_features, step)]
