"""4-bit weights for 8-bit activations: two codes to a byte, with scales per output or, progressively, per group.

Layout: `weight` is uint8 [outputs, ceil(inputs / 128) · 64]. Byte i of a block of 64 holds input i of the block's 128
in its low nibble and input i + 64 in its high one; past the end are zeros. So one mask takes four neighbouring codes
out of a 32-bit register, as four int8 numbers, without moving any.

Progressive quantization (QServe, arXiv 2405.04532) keeps products of integers where groups of inputs have their own
scale: the weight is quantized to int8 with one float scale per output, and that to 4 bits with an integer scale and
offset for every 64 inputs, v = group_scale · u + group_offset. QServe's offset is a zero point of 4 bits times the
scale; here it is any int8 number, which costs no more and fits the group better. `groups` is int32 [ceil(inputs / 128),
outputs], from the lowest byte up: scale and offset + 128 of the low nibbles' group, then of the high nibbles'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUP = 128, 64
"""Inputs that share 64 bytes of a row; inputs that share a group's scale and offset."""
INT8_RANGE = 119
"""Largest first-level code. With a group scale of at most 16, what 4 bits make of it still fits int8."""


def pack_bytes(codes: Tensor) -> Tensor:
    """Codes 0 … 15 [outputs, inputs] → the bytes of `weight`."""
    rows, columns = codes.shape
    blocks = F.pad(codes.to(torch.uint8), (0, -columns % BLOCK)).view(rows, -1, 2, GROUP)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).view(rows, -1)


def unpack_bytes(weight: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bytes`, uint8 [outputs, inputs]."""
    blocks = weight.view(weight.shape[0], -1, GROUP)
    return torch.stack((blocks & 15, blocks >> 4), dim=2).view(weight.shape[0], -1)[:, :columns]


def pack_channels(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`weight`, `scale` and `zero_scaled` of signed codes -8 … 7 with one scale and zero point per output."""
    scale = scale.to(torch.float32)
    zero = torch.full_like(scale, 8) if zero_point is None else zero_point.to(torch.float32) + 8
    return pack_bytes(codes + 8), scale, scale * zero


def pack_groups(scale: Tensor, offset: Tensor) -> Tensor:
    """Integer scales 1 … 17 and offsets -128 … 127, both [outputs, ceil(inputs / 64)] → `groups`."""
    both = torch.stack((scale, offset + 128), dim=-1).to(torch.uint8)
    both = F.pad(both, (0, 0, 0, scale.shape[1] % 2)).view(scale.shape[0], -1, 4)
    return both.view(torch.int32).squeeze(-1).T.contiguous()


def unpack_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_groups`: scales and offsets, int32 [outputs, 2 · ceil(inputs / 128)]."""
    both = groups.T.contiguous().view(torch.uint8).view(groups.shape[1], -1, 2).to(torch.int32)
    return both[..., 0], both[..., 1] - 128


def quantize_progressive(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float weight [outputs, inputs] as `weight`, `scale` and `groups`.

    Of the two integer scales next to the one that would just span a group, each gets the one with the smaller error.
    """
    rows, columns = weight.shape
    scale = weight.abs().amax(dim=1).to(torch.float32).clamp_min(1e-30) / INT8_RANGE
    exact = F.pad(weight / scale[:, None], (0, -columns % GROUP)).view(rows, -1, GROUP)
    low, high = exact.amin(dim=2, keepdim=True).round(), exact.amax(dim=2, keepdim=True).round()
    wide = ((high - low) / 15).ceil().clamp_min(1)
    narrow = (wide - 1).clamp_min(1)
    cut = ((high - low - 15 * narrow) / 2).floor().clamp_min(0)
    spanning, error = _nibbles(exact, wide, low)
    cutting, error_cut = _nibbles(exact, narrow, low + cut)
    better = error_cut < error
    codes = torch.where(better, cutting, spanning).view(rows, -1)[:, :columns]
    step, offset = torch.where(better, narrow, wide), torch.where(better, low + cut, low)
    return pack_bytes(codes), scale, pack_groups(step.squeeze(2), offset.squeeze(2))


def _nibbles(exact: Tensor, step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the squared error of each group."""
    codes = ((exact - offset) / step).round().clamp(0, 15)
    return codes, (codes * step + offset - exact).square().sum(dim=2, keepdim=True)


def dequantize_progressive(weight: Tensor, groups: Tensor, columns: int) -> Tensor:
    """The first-level codes v, int32 [outputs, inputs]."""
    scale, offset = (each.repeat_interleave(GROUP, dim=1)[:, :columns] for each in unpack_groups(groups))
    return unpack_bytes(weight, columns) * scale + offset
