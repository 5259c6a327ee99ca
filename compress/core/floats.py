"""Weights on float grids: FP8 with one scale for a channel, a block or all; NVFP4; MXFP4; NF4.

    FP8     w = code · s                   s = max|w| / 448
    NVFP4   w = code · e / g               per 16 columns e = E4M3(g · max|w| / 6), per tensor g = 448 · 6 / max|w|
    MXFP4   w = code · 2^e                 per 32 columns e = floor(log2 max|w|) - 2, one more from 1.75 · 2^k on
    NF4     w = LEVELS[code] · s           per 64 columns s = max|w|         (`compress.core.normal_float`)

These are the rules of compressed-tensors and, for NF4, bitsandbytes, to the bit (`range: minmax`). FP4 has eight
magnitudes, NF4 sixteen levels, and where the largest of a group falls among them decides a good part of the error, so
`mse` and `importance` also try

    NVFP4   scales that put the largest at 4 instead of 6, between whose neighbours the gap is 2 ("four over six", arXiv
            2512.02010), and a few around both, with g = 256 · 6 / max|w|, which leaves room for larger ones
    MXFP4   exponents one below and one above
    NF4     scales from 15 % below to 10 % above

and take for each group what has the least squared error, weighted by E[x²] if asked to. FP8 levels are evenly spaced on
a logarithmic scale: no choice of s is better than another, so there is none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.inputs import nearest_level
from compress.core.minifloat import E2M1_MAX, E4M3_MAX, overall_scale, power_of_two, stored_e4m3
from compress.core.normal_float import block_scale, nearest_codes
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.errors import NumericalError

ROOM = 256.0
"""The largest E4M3 scale that the first candidate takes up, of 448."""
SHARES = (1.0, 1.5, 0.875, 1.125, 1.3125)
"""NVFP4 scales tried, relative to the one that puts a group's largest weight at 6."""
EXPONENTS = (0, -1, 1)


def quantize_float(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    dtype: torch.dtype,
    *,
    search: bool = True,
    importance: Float[Tensor, "in"] | None = None,
    largest: float | None = None,
) -> QuantizedTensor:
    """`weight` rounded to nearest on a float grid. `dtype`: of FP8's and NF4's scales. `search`: for 4 bits, more than
    one scale.

    `largest`: max|w| over all layers that an engine runs as one, for they must share g. Raises NumericalError on NaN or
    infinite weights, ValueError where groups do not divide the row.
    """
    if not weight.isfinite().all():
        raise NumericalError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite")
    weight = weight.float()
    if grid.kind == "normal":
        scale = block_scale(weight, dtype, search=search, importance=importance)
        return QuantizedTensor(nearest_codes(weight, scale), scale, None, grid)
    groups = weight.view(len(weight), grid.num_groups(weight.shape[1]), -1)
    if grid.scale == "float":
        scale, overall = _fp8_scale(groups, grid, dtype), None
        candidates = [scale]
    elif grid.scale == "e4m3":
        top = weight.abs().max() if largest is None else weight.new_tensor(largest)
        room = ROOM if search else E4M3_MAX
        overall = overall_scale(top, room)
        wanted = overall * (groups.abs().amax(dim=-1) / E2M1_MAX)
        candidates = [stored_e4m3(wanted * share) for share in (SHARES if search else SHARES[:1])]
    else:
        overall, scale = None, power_of_two(groups.abs().amax(dim=-1))
        exponents = EXPONENTS if search else EXPONENTS[:1]
        candidates = [(scale * 2.0**more).clamp(2.0**-127, 2.0**127).to(torch.float8_e8m0fnu) for more in exponents]
    mass = None if importance is None else importance.float().view(1, groups.shape[1], -1)
    return _best(groups, candidates, overall, grid, mass)


def _best(
    groups: Float[Tensor, "out groups size"],
    candidates: list[Tensor],
    overall: Tensor | None,
    grid: Grid,
    mass: Float[Tensor, "1 groups size"] | None,
) -> QuantizedTensor:
    """Group by group the candidate of least error; the first of equals."""
    shape = (groups.shape[0], groups.shape[1] * groups.shape[2])
    best: QuantizedTensor | None = None
    least = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for scale in candidates:
        tensor = _rounded(groups, scale, overall, grid, shape)
        if len(candidates) == 1:
            return tensor
        error = (tensor.dequantize().view_as(groups) - groups).square()
        error = (error if mass is None else error * mass).sum(dim=-1)
        wins = error < least
        if best is None:
            best = tensor
        else:
            codes = torch.where(wins.unsqueeze(-1), _bytes(tensor.codes, groups), _bytes(best.codes, groups))
            merged = torch.where(wins, tensor.scale.view(torch.uint8), best.scale.view(torch.uint8))
            codes = codes.view(shape).view(torch.float8_e4m3fn)
            best = QuantizedTensor(codes, merged.view(scale.dtype), None, grid, overall)
        least = torch.minimum(error, least)
    assert best is not None, "there is a candidate"
    return best


def _rounded(
    groups: Float[Tensor, "out groups size"], scale: Tensor, overall: Tensor | None, grid: Grid, shape: tuple[int, int]
) -> QuantizedTensor:
    empty = QuantizedTensor(torch.empty(shape, dtype=torch.float8_e4m3fn), scale, None, grid, overall)
    codes = nearest_level(groups / empty.step.unsqueeze(-1), grid).to(torch.float8_e4m3fn).view(shape)
    return QuantizedTensor(codes, scale, None, grid, overall)


def _fp8_scale(
    groups: Float[Tensor, "out groups size"], grid: Grid, dtype: torch.dtype
) -> Float[Tensor, "rows groups"]:
    largest = groups.abs().amax(dim=-1)
    shared = grid.rows or len(largest)
    tall = torch.stack([part.amax(dim=0) for part in largest.split(shared)])
    scale = (tall / E4M3_MAX).to(dtype)
    return torch.where(scale > 0, scale, torch.finfo(dtype).eps)


def _bytes(codes: Tensor, groups: Tensor) -> Tensor:
    return codes.view(torch.uint8).view(groups.shape)
