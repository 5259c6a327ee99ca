"""Descent on orthogonal matrices: each step turns one a little further, so it never stops being orthogonal.

For a skew Ω (Ωᵀ = -Ω) of any size the Cayley transform is a rotation, near the identity while Ω is small:

    C(Ω) = (I + Ω/2) (I - Ω/2)⁻¹ = 2 (I - Ω/2)⁻¹ - I = I + Ω + O(Ω²)

Entry i, j of Ω turns the coordinates i and j that a vector x has as x R. From R to R C(Ω) a function with gradient G at
R gains, to first order, ⟨G, R Ω⟩ = ⟨½ (Rᵀ G - Gᵀ R), Ω⟩. So the skew part of Rᵀ G is the direction of steepest ascent,
and a step goes the other way. (Wen and Yin, "A feasible method for optimization with orthogonality constraints",
Mathematical Programming 142, 2013; SpinQuant, arXiv 2405.16406, adds momentum as in arXiv 2002.01113.)

Where we differ:
- Ω stands to the right of R, in coordinates that turn with it. Directions of different steps are then of one space and
  can be averaged; momentum need not be carried from point to point.
- Each direction is brought to one length before it is averaged: the root mean square over all axes of how far an axis
  turns. A rate is an angle in radians then, whatever the function and the size; and where directions disagree, their
  average is short by itself.
- The transform is computed exactly, by one factorization, not by five fixed-point steps: less work, and no limit on how
  far a step may go. In float64, 200 steps on a matrix of size 384 leave the entries of RᵀR - I near 1e-13, so nothing
  has to be put right before the end.

A rotation with R𝟙 = 𝟙 keeps the mean of a vector (`compress.core.hadamard`), and descent among these projects Ω: what
has Ω𝟙 = 0 leaves 𝟙 where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MOMENTUM = 0.9
PRECISION = 1e-12
"""What entries of RᵀR - I are at most, once R is `nearest_orthogonal`."""
FARTHEST = 0.5
"""Of ‖RᵀR - I‖ in Frobenius' norm: beyond it a matrix is no rotation that rounding has disturbed."""


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent has come to, and the average of the directions that led there."""

    rotation: Float[Tensor, "n n"]
    ascent: Float[Tensor, "n n"]
    """Skew; its rows have a root mean square norm of 1 at most."""


def begin(rotation: Float[Tensor, "n n"]) -> Descent:
    """A descent that has not moved yet."""
    return Descent(rotation, torch.zeros_like(rotation))


def descend(
    at: Descent,
    gradient: Float[Tensor, "n n"],
    rate: float,
    *,
    momentum: float = MOMENTUM,
    centred: bool = False,
) -> Descent:
    """One step. `gradient`: ∂f/∂R, any multiple of it. `rate`: radians by which axes turn where all directions agree.

    Without a gradient momentum alone goes on. `centred`: the rotation keeps means, and is to go on doing so.
    """
    ascent = skew_gradient(at.rotation, gradient)
    if centred:
        ascent = _without_mean(ascent)
    length = ascent.norm() / len(ascent) ** 0.5
    ascent = momentum * at.ascent + (1 - momentum) / length.clamp(min=torch.finfo(ascent.dtype).tiny) * ascent
    return Descent(turned(at.rotation, -rate * ascent), ascent)


def skew_gradient(rotation: Float[Tensor, "n n"], gradient: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The Ω along which R C(Ω) ascends most steeply, from ∂f/∂R."""
    product = rotation.T @ gradient
    return (product - product.T) / 2


def turned(rotation: Float[Tensor, "n n"], skew: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """R C(Ω)."""
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return 2 * torch.linalg.solve(eye - skew / 2, rotation, left=False) - rotation


def deviation(matrix: Float[Tensor, "n n"]) -> float:
    """The largest entry of RᵀR - I, 0 for an orthogonal matrix."""
    return float(_excess(matrix).abs().max())


def nearest_orthogonal(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The orthogonal matrix nearest to one that is almost so, its polar factor, in float64 (Newton and Schulz).

    Raises ValueError where the matrix is not almost orthogonal.
    """
    R = matrix.double()
    excess = _excess(R)
    if not excess.norm() <= FARTHEST:
        raise ValueError(f"a matrix {list(R.shape)} is not orthogonal: ‖RᵀR - I‖ = {float(excess.norm()):.3g}")
    while excess.abs().max() > PRECISION:
        R = R - R @ excess / 2
        excess = _excess(R)
    return R


def _excess(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    excess = matrix.T @ matrix
    excess.diagonal().sub_(1)
    return excess


def _without_mean(skew: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """P Ω P, P = I - 𝟙𝟙ᵀ/n."""
    skew = skew - skew.mean(dim=0, keepdim=True)
    return skew - skew.mean(dim=1, keepdim=True)
