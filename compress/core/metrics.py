"""How far a compressed weight is from the original: in output error where the inputs are known, else in weight error.

With H = E[x xᵀ], the mean squared error of the layer's output over the inputs behind H is exactly
`tr((W - Ŵ) H (W - Ŵ)ᵀ)`; no input has to be kept to score a candidate.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 512
"""Rows per product, which bounds the memory."""


def quadratic_form(difference: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """`tr(D H Dᵀ)`, accumulated in float64; the product itself runs in the dtype of `difference`."""
    metric = hessian.to(difference.dtype)
    parts = [((d @ metric) * d).sum(dtype=torch.float64) for d in difference.split(ROWS)]
    return max(0.0, float(torch.stack(parts).sum()))


def quadratic_error(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """The mean squared output error of `approximation`, summed over output channels: tr((W - Ŵ) H (W - Ŵ)ᵀ)."""
    slices = zip(weight.split(ROWS), approximation.split(ROWS), strict=True)
    return sum(quadratic_form(w - a, hessian) for w, a in slices)


def relative_error(
    weight: Float[Tensor, "out in"],
    approximation: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None = None,
) -> float:
    """The output error over the output's own energy; without `hessian`, ‖W - Ŵ‖² / ‖W‖². 0 / 0 is 0."""
    if hessian is not None:
        error, energy = quadratic_error(weight, approximation, hessian), quadratic_form(weight, hessian)
    else:
        error = float((weight - approximation).square().sum(dtype=torch.float64))
        energy = float(weight.square().sum(dtype=torch.float64))
    return error / energy if energy > 0 else math.inf if error > 0 else 0.0


def sqnr(weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"]) -> float:
    """Signal to quantization noise in decibels: about 6 more per bit, infinite where nothing was lost."""
    relative = relative_error(weight, approximation)
    return math.inf if relative == 0 else -10 * math.log10(relative)
