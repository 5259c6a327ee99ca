"""NF4: sixteen levels where weights drawn from a normal distribution would spread evenly, and scales quantized in turn.

    w = LEVELS[code] · absmax,      absmax = max|w| over a block of 64 columns      (QLoRA, arXiv 2305.14314)

The levels are quantiles, scaled so that the outermost are -1 and 1, with zero among them: eight above, seven below.

A float32 per 64 weights is half a bit per weight. Double quantization stores a byte instead, on the 256 levels of the
"dynamic" map, per 256 blocks relative to their largest, after the mean of all was subtracted:

    absmax = MAP[code] · largest + mean,      0.127 bits per weight

The map has a decimal exponent 10^-6 … 10^0 and, the larger that is, the more evenly spaced fractions: 2^i midpoints
of [0.1, 1] for 10^(i-6), each with both signs, and 0 and 1 (arXiv 2110.02861).

Weights are rounded as bitsandbytes does it, to the bit. It chooses codes by the exact maximum and multiplies by the
rounded one; `nearest_codes` may be given the scales that will be used. Quantized scales are only read.

The maximum is not the best scale: `block_scale` tries `SHARES` of it, which takes 12 % off the squared error of weights
from a normal distribution, and as much off that of trained ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
"""Columns that share one scale."""
NESTED_BLOCK = 256
"""Scales that share one scale of theirs."""
SHARES = (1.0, *(share / 1000 for share in range(850, 1101, 25) if share != 1000))
"""Scales tried, relative to a block's largest magnitude; the first of equals is taken."""
TINY = 1e-38
"""What a maximum of zero counts as."""


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales [out, groups] on the dynamic map. Blocks of them run on from row to row."""

    codes: UInt8[Tensor, "out groups"]
    largest: Float[Tensor, " blocks"]
    mean: float

    def dequantize(self) -> Float[Tensor, "out groups"]:
        """The scales these stand for, in float32."""
        levels = dynamic_map(self.codes.device)[self.codes.long()].flatten()
        largest = self.largest.repeat_interleave(NESTED_BLOCK)[: levels.numel()]
        return (levels * largest + self.mean).view(self.codes.shape)


def block_maximum(weight: Float[Tensor, "out in"], block: int = BLOCK) -> Float[Tensor, "out groups"]:
    """The largest magnitude of each block, in float32. Raises ValueError where blocks do not divide the row."""
    if weight.shape[1] % block:
        raise ValueError(f"in_features={weight.shape[1]} is not a multiple of group_size={block}")
    return weight.float().view(len(weight), -1, block).abs().amax(dim=-1)


def block_scale(
    weight: Float[Tensor, "out in"],
    dtype: torch.dtype,
    *,
    block: int = BLOCK,
    search: bool = True,
    importance: Float[Tensor, "in"] | None = None,
) -> Float[Tensor, "out groups"]:
    """A scale for each block, of the given type: its largest magnitude or, if `search`, the share of least error.

    `importance`: what the squared error of each column counts.
    """
    largest = block_maximum(weight, block)
    best = largest.to(dtype)
    if not search:
        return best
    least = torch.full_like(largest, torch.inf)
    for share in SHARES:
        scale = (largest * share).to(dtype)
        error = (dequantize(nearest_codes(weight, scale), scale) - weight).square()
        error = (error if importance is None else error * importance).view(*scale.shape, -1).sum(dim=-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def nearest_codes(weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> UInt8[Tensor, "out in"]:
    """The level nearest to each weight, 0 … 15; halfway between two, the lower."""
    groups = weight.float().view(*scale.shape, -1)
    relative = groups * (1 / scale.float().clamp(min=TINY)).unsqueeze(-1)
    return _codes(relative).view(weight.shape)


def nearest_level(relative: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Weights divided by their scale, rounded; `codes_of` says which levels these are."""
    return level_table(relative.device)[_codes(relative).long()]


def codes_of(levels: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """The codes of numbers that are levels."""
    return torch.searchsorted(level_table(levels.device), levels).to(torch.uint8)


def dequantize(codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    """The weights these codes stand for, in float32."""
    levels = level_table(codes.device)[codes.long()]
    return (levels.view(*scale.shape, -1) * scale.float().unsqueeze(-1)).view(codes.shape)


@cache
def level_table(device: torch.device) -> Float[Tensor, 16]:
    """`LEVELS` as a tensor. Not to be written to."""
    return torch.tensor(LEVELS, device=device)


@cache
def dynamic_map(device: torch.device) -> Float[Tensor, 256]:
    """The 256 levels of the scales, from -0.993 to 1. Not to be written to."""
    magnitudes = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        magnitudes.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat(magnitudes)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def _codes(relative: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    levels = level_table(relative.device)
    return torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
