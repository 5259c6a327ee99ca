"""ALPS: mask and weights together, by splitting the problem into a quadratic and a projection that take turns.

For one linear layer with inputs x and H = E[x xᵀ], minimise tr((W - Ŵ) A (W - Ŵ)ᵀ), A = H + λI, over weights of the
pattern. Of two copies of Ŵ, B follows the objective and D is of the pattern; V prices their difference (ADMM):

    B ← (W A - V + ρ D)(A + ρI)⁻¹       D ← the largest of B + V/ρ       V ← V + ρ (B - D).

Small ρ lets B go where the error is least, large ρ makes the copies agree. It starts small and grows the faster the
more of the mask still changes, until none does; then the mask is settled and gets its best weights
(`compress.core.refit`). With the eigenvectors of A, whatever ρ, a turn is two products. (ALPS, arXiv 2406.07831, whose
schedule of ρ we follow.)

Inputs are scaled to unit energy first, as in the paper: the largest are then those of Wanda's score, compared over the
whole matrix.

SparseGPT decides each weight once, looking only ahead; this revisits all of them, and gains most at high sparsity. But
the problem is not convex and neither is sure to win, so both are refitted and the better is returned.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.core.metrics import relative_error
from compress.core.refit import refit
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern, Pruned, keep_largest, require_finite

TURNS = 300
"""At most."""
EVERY = 3
"""Turns between two looks at how much of the mask has changed."""
PENALTY = 0.1
"""ρ to begin with, of inputs of unit energy."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By how much ρ grows where more than a share of the kept weights has changed."""


def alps(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], pattern: Pattern, *, damping: float = 0.01
) -> Pruned:
    """Prune `weight` for inputs with second moments `hessian`; no output error is above that of SparseGPT refitted.

    Where that was the better one, or no damping made H positive definite, the result notes it. λ = damping ·
    mean(diag H). The turns run in float32, the decomposition and the refit in the dtype of `hessian`. Raises ValueError
    where the pattern does not divide the inputs, NumericalError where a number is not finite.
    """
    pattern.check(weight.shape[1])
    require_finite(weight=weight, hessian=hessian)
    one_pass = sparsegpt(weight, hessian, pattern, damping=damping)
    if one_pass.note:
        return one_pass
    damping = one_pass.damping
    one_pass = refit(weight, hessian, one_pass.mask, start=one_pass.weight, damping=damping)
    mask, start = _split(weight, hessian, pattern, damping)
    ours = refit(weight, hessian, mask, start=start, damping=damping)
    errors = [relative_error(weight.double(), each.weight.double(), hessian) for each in (ours, one_pass)]
    if errors[0] <= errors[1]:
        return ours
    note = f"SparseGPT refitted, whose relative error of {errors[1]:.3g} is below the {errors[0]:.3g} of ALPS"
    return replace(one_pass, note="; ".join(filter(None, [note, one_pass.note])))


def _split(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], pattern: Pattern, damping: float
) -> tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"]]:
    """The mask that the turns settle on, and weights on it that are nearly the best."""
    A = hessian.clone()
    A.diagonal().add_(damping * hessian.diagonal().mean())
    scale = A.diagonal().sqrt()
    A.div_(scale).div_(scale.unsqueeze(1))
    values, vectors = (part.float() for part in torch.linalg.eigh(A))
    W = weight.float() * scale.float()
    pull = W @ A.float()
    del A
    mask = keep_largest(W.abs(), pattern, "matrix")
    D, V, penalty = W * mask, torch.zeros_like(W), PENALTY
    settled = mask
    for turn in range(1, TURNS + 1):
        B = torch.add(pull, D, alpha=penalty).sub_(V)
        B = ((B @ vectors) / (values + penalty)) @ vectors.T
        D = torch.add(B, V, alpha=1 / penalty)
        mask = keep_largest(D.abs(), pattern, "matrix")
        D.mul_(mask)
        V.add_(B, alpha=penalty).sub_(D, alpha=penalty)
        if turn % EVERY == 0:
            changed = int((mask ^ settled).sum())
            if not changed:
                break
            penalty *= next(factor for share, factor in GROWTH if changed > share * int(mask.sum()))
            settled = mask
    return mask, D / scale.float()
