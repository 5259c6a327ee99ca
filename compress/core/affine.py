"""The affine map between real weights and integer codes, `w ≈ (code - zero_point) · scale`.

Asymmetric: the grid spans [lo, hi], widened to hold zero, so that zero is a level:

    scale = (hi - lo) / (qmax - qmin)        zero_point = round(qmin - lo / scale), on the grid

Symmetric: the zero point is 0 and the scale carries a sign, `scale = extreme / qmin`, where `extreme` is
whichever of lo, hi is farther from zero. The grid has one level more on the negative side; the sign gives it to
the side that needs it, so the extreme weight is met exactly and no level is wasted ("full-range symmetric",
as llama.cpp and AutoRound have it). Against the restricted form max|w| / qmax this is 1/7 finer at 4 bits and
twice as fine at 2.

A scale is rounded to the dtype it is stored in *before* codes are computed: what is stored is what was used.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.errors import NumericalError


def by_group(weight: Float[Tensor, "out in"], grid: Grid) -> Float[Tensor, "out groups size"]:
    """The columns that share a scale, side by side (a view where the layout allows)."""
    return weight.reshape(weight.shape[0], grid.num_groups(weight.shape[1]), -1)


def storable(scale: Float[Tensor, "out groups"], dtype: torch.dtype) -> Float[Tensor, "out groups"]:
    """`scale` rounded to `dtype`, kept off zero: below the smallest magnitude it becomes that magnitude, signed."""
    info = torch.finfo(dtype)
    floor = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    stored = torch.where(scale.abs() < floor, torch.copysign(torch.full_like(scale, floor), scale), scale)
    return stored.to(dtype)


def params_from_range(
    lo: Float[Tensor, "out groups"], hi: Float[Tensor, "out groups"], grid: Grid, dtype: torch.dtype
) -> tuple[Float[Tensor, "out groups"], Int8[Tensor, "out groups"] | None]:
    """Scale and zero point of a grid that covers [lo, hi]; a range without width gets scale 1 and zero point 0.

    Raises NumericalError where the range is not finite or its scale does not fit `dtype`.
    """
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    empty = lo == hi
    if grid.symmetric:
        scale = torch.where(-lo >= hi, lo, hi) / grid.qmin
    else:
        scale = (hi - lo) / (grid.qmax - grid.qmin)
    scale = storable(torch.where(empty, 1.0, scale), dtype)
    if not scale.isfinite().all():
        raise NumericalError(
            f"weights in [{lo.min().item():g}, {hi.max().item():g}] have no finite {dtype} scale at "
            f"{grid.bits} bits; look for NaN, infinite or absurdly large weights"
        )
    if grid.symmetric:
        return scale, None
    zero_point = (grid.qmin - lo / scale.float()).round_().clamp_(grid.qmin, grid.qmax)
    return scale, zero_point.masked_fill_(empty, 0).to(torch.int8)


def quantize(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Int8[Tensor, "out groups"] | None,
    grid: Grid,
) -> QuantizedTensor:
    """Rounds every weight to the nearest level of its group. Raises NumericalError on NaN or infinite weights."""
    if not weight.isfinite().all():
        raise NumericalError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite")
    codes = by_group(weight.float(), grid) / scale.float().unsqueeze(-1)
    codes.round_()
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    codes.clamp_(grid.qmin, grid.qmax)
    return QuantizedTensor(codes.to(torch.int8).view(weight.shape), scale, zero_point, grid)
