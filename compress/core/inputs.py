"""Rounding a layer's inputs while the model runs: what a runtime with integer or FP8 matrix products computes.

    scale = max|x| / half the width of the grid, over a token, a group of it, or (fixed beforehand) all tokens
    x̂     = nearest level to x / scale, times scale

FP4's scales are E4M3 or powers of two, as for weights (`compress.core.floats`).

Half the width of int8 is 127.5: the largest magnitude meets the end of the grid on the negative side and is half a step
beyond it on the positive. compressed-tensors has this rule; engines that divide by 127 have steps 0.4 % wider, which no
score shows. A scale fixed by calibration clips what comes later and is larger, and it may pay to clip what calibration
saw (`clipping_scale`): a step that covers one number in a million is too wide for all others.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core import normal_float
from compress.core.minifloat import E2M1_MAX, overall_scale, power_of_two, round_e2m1, round_e4m3, stored_e4m3
from compress.core.scheme import Grid

LEAST = torch.finfo(torch.float32).tiny
NARROWEST, SHARES = 0.2, 33
"""The smallest part of a range that is tried, and how many are."""


def round_inputs(
    x: Float[Tensor, "*tokens in"], grid: Grid, scale: Float[Tensor, ""] | None = None
) -> Float[Tensor, "*tokens in"]:
    """`x` as the grid holds it, in its own type; computed in float32. `scale`: of a grid that has one overall.

    Its gradient is that of the identity.
    """
    groups = x.detach().float().unflatten(-1, (grid.num_groups(x.shape[-1]), -1))
    if grid.overall and scale is None:
        raise ValueError(f"{grid} needs a scale that calibration has fixed")
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if grid.scale == "e4m3":
        assert scale is not None, "it is overall"
        step = stored_e4m3(scale.float() * (largest / E2M1_MAX)).float() / scale.float()
    elif grid.scale == "e8m0":
        step = power_of_two(largest)
    else:
        step = input_scale(largest, grid) if scale is None else scale.float()
    rounded = nearest_level(groups / step, grid).mul_(step).flatten(-2).to(x.dtype)
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def input_scale(largest: Float[Tensor, "*any"], grid: Grid) -> Float[Tensor, "*any"]:
    """The scale for inputs of at most this magnitude, never 0; with E4M3 scales, what those are divided by."""
    if grid.scale == "e4m3":
        return overall_scale(largest)
    return (largest.float() / ((grid.qmax - grid.qmin) / 2)).clamp_(min=LEAST)


def clipping_scale(
    x: Float[Tensor, "tokens in"], grid: Grid, largest: Float[Tensor, ""], importance: Float[Tensor, "in"]
) -> Float[Tensor, ""]:
    """The scale for all tokens that loses least of `x`: E Σ_j importance_j (x̂_j - x_j)², over ranges up to `largest`.

    Floats, whose levels are dense near 0 whatever the range, have that of `largest`.
    """
    widest = input_scale(largest, grid)
    if grid.kind == "float":
        return widest
    importance = importance / importance.sum()
    scales = [widest * share for share in torch.linspace(1, NARROWEST, SHARES).tolist()]
    losses = [float((round_inputs(x, grid, scale) - x).square().mean(dim=0) @ importance) for scale in scales]
    return scales[min(range(SHARES), key=losses.__getitem__)]


def nearest_level(levels: Float[Tensor, "*any"], grid: Grid) -> Float[Tensor, "*any"]:
    """Each number rounded to a level of the grid, half to even, clipped at its ends; float32, and may be in place.

    NF4's are its `LEVELS`, and halves go down.
    """
    if grid.kind == "int":
        return levels.round_().clamp_(grid.qmin, grid.qmax)
    if grid.kind == "normal":
        return normal_float.nearest_level(levels)
    return round_e4m3(levels) if grid.bits == 8 else round_e2m1(levels)
