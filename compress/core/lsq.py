"""Learned step sizes: rounding in a network that is trained, with gradients for weights, scales and zero points.

    ŵ = s (c - z),        c = clamp(round(w / s) + z, qmin, qmax)

Rounding has no useful derivative; it is taken to be the identity's ("straight through", arXiv 1308.3432). Then, for a
weight that is not clamped and for one that is (LSQ, arXiv 1902.08153; zero points: LSQ+, arXiv 2004.09576),

              inside                  clamped at an end
    ∂ŵ/∂w     1                       0
    ∂ŵ/∂s     round(w / s) - w / s    qmin - z, or qmax - z
    ∂ŵ/∂z     0                       -s

A scale collects this from all weights of its group and would move far too much for its size. Its gradient, and that of
the zero point, is therefore multiplied by 1 / √(N · qmax), N the number of weights in the group, which brings update
to parameter to one ratio for scales and weights.

What is trained is what is stored. The forward pass is `rounded(...).dequantize()`: scales are rounded to the dtype they
are stored in and zero points to integers of the grid, straight through, before any code is computed; and what
`rounded` returns in the end is exported as it is. Float scales below the smallest number of their dtype become
that number (`compress.core.affine.storable`). A symmetric scale keeps its sign, or changes it.

Where we differ: a weight counts as clamped where rounding would go beyond the end, not where w / s itself does, half a
level earlier; that is what autograd makes of the formula on top. A full-range symmetric scale puts the largest weight
of its group on the end, give or take the rounding of the scale, and by the paper's rule such a weight may get no
gradient. On synthetic layers trained from min-max scales that costs 3 to 5 % of the error at 2 and 3 bits; from
scales of least error neither rule is always the better one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.core.affine import by_group, quantize, storable
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.errors import NumericalError


def fake_quantize(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Shaped[Tensor, "out groups"] | None,
    grid: Grid,
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    """`rounded(...)` dequantized to the dtype of `weight`, bit for bit, with the gradients described above.

    All three may be trained, zero points if they are floats. Keep their float32 selves: steps smaller than `dtype` or a
    level can show add up there. Raises what `rounded` raises.
    """
    return _FakeQuantize.apply(weight, scale, zero_point, grid, dtype)


def rounded(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero_point: Shaped[Tensor, "out groups"] | None,
    grid: Grid,
    dtype: torch.dtype,
) -> QuantizedTensor:
    """The weight on its grid: scales in `dtype`, zero points integers of the grid, then the codes that go with them.

    Raises ValueError where the grid is not of integers, NumericalError where a weight or a scale is not finite.
    """
    if grid.kind != "int" or grid.rows != 1:
        raise ValueError(f"steps are learned for integer grids with scales for each row, not for {grid}")
    if grid.symmetric != (zero_point is None):
        raise ValueError(f"a symmetric grid has no zero point and an asymmetric one has: {grid}")
    stored = storable(scale.detach().float(), dtype)
    if not stored.isfinite().all():
        raise NumericalError(f"{int((~stored.isfinite()).sum())} of {stored.numel()} scales are no finite {dtype}")
    if zero_point is not None:
        zero_point = zero_point.detach().float().round().clamp_(grid.qmin, grid.qmax).to(torch.int8)
    return quantize(weight.detach(), stored, zero_point, grid)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        tensor = rounded(weight, scale, zero_point, grid, dtype)
        ctx.save_for_backward(weight, tensor.scale, tensor.zero_point)
        ctx.grid, ctx.dtypes = grid, (scale.dtype, None if zero_point is None else zero_point.dtype)
        return tensor.dequantize(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        grid, (scale_dtype, zero_dtype) = ctx.grid, ctx.dtypes
        step = scale.float().unsqueeze(-1)
        zero = 0.0 if zero_point is None else zero_point.float().unsqueeze(-1)
        g = by_group(wanted.float(), grid)
        levels = by_group(weight.float(), grid) / step
        codes = levels.round() + zero
        inside = (codes >= grid.qmin) & (codes <= grid.qmax)
        factor = 1 / math.sqrt(levels.shape[-1] * grid.qmax)
        for_weight = for_scale = for_zero = None
        if ctx.needs_input_grad[0]:
            for_weight = (g * inside).view_as(weight).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_zero = ((g * ~inside).sum(-1) * -scale.float() * factor).to(zero_dtype)
        if ctx.needs_input_grad[1]:
            slope = codes.clamp_(grid.qmin, grid.qmax).sub_(zero).sub_(levels.mul_(inside))
            for_scale = ((g * slope).sum(-1) * factor).to(scale_dtype)
        return for_weight, for_scale, for_zero, None, None
