"""Asymmetric calibration: a weight that makes up for what the layers before it have lost.

Where the original model gives a layer the input x, the compressed one gives it x̂, and what the layer should return is
still W x. With H = E[x̂ x̂ᵀ] and the cross moment G = E[x x̂ᵀ], over the same tokens, completing the square shows that

    E‖W x - Q x̂‖² = tr((W′ - Q) H (W′ - Q)ᵀ) + const,      W′ = W G H⁻¹,

the usual objective of another weight: no rounding method has to change, it is only handed W′ in place of W. A penalty
λ‖W - Q‖², which is GPTQ's damping, joins both sides and gives

    W′ = W (G + λI)(H + λI)⁻¹ = W + W (G - H)(H + λI)⁻¹.

Inputs that calibration did not see keep their weights, and without a drift, G = H, so do all, to the bit.

W′ is a regression on noisy inputs and so shrinks what it predicts. That is best for the layer; but over depth noise
averages out and shrinkage adds up, so we go only a share of the way, a half unless told otherwise. And no output
channel moves by more than LIMIT of its norm, which a half of the way hardly ever meets.

GPTAQ (arXiv 2504.02692) pursues the same inside GPTQ's loop: when a column's turn comes, the columns after it make up
for its drift as well as for its rounding. That is the part of (G - H)(H + λI)⁻¹ above the diagonal, met by weights as
updated by then.

Qronos (arXiv 2505.11695) is W′ but for the first column, which it rounds with all others held where they were, to

    u_0 = w_0 + W (G - H)_0 / H_00,

before those go to the best place for what it has become. By the loop's own feedback that is one change of W′: its
first column is set to u_0, and the others make up for that.

On stories260k at 3 bits per channel the KL divergence falls from 0.503 to 0.424 by GPTAQ, 0.403 by Qronos and 0.382
by the closed form (`scripts/compare_methods.py`, recipes/RESULTS.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.core.linalg import inverse_cholesky
from compress.errors import NumericalError

Target = Literal["closed", "gptaq", "qronos"]
LIMIT = 0.3
"""How far the weights of an output channel may move, relative to their norm."""
TINY = torch.finfo(torch.float32).tiny
ROWS = 512
"""Rows of G - H that are worked on at a time."""


def closed_form(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    *,
    damping: float = 0.01,
    share: float = 0.5,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """W + share · (W′ - W), and by how much of its norm each output channel was to move, of which LIMIT is granted.

    λ = damping · mean(diag H), raised where `inverse_cholesky` raises it. Solved in the dtype of `hessian`; the answer
    has that of `weight`. Raises NumericalError where `cross` is not finite, NotPositiveDefinite where H is hopeless.
    """
    _check(cross)
    upper, _ = inverse_cholesky(hessian, damping)
    panels = zip(cross.split(ROWS), hessian.split(ROWS), strict=True)
    response = torch.cat([((G - H) @ upper.T @ upper).to(weight.dtype) for G, H in panels])
    change = (weight @ response).mul_(share)
    moved = (change.norm(dim=1) / weight.norm(dim=1)).nan_to_num(nan=0)
    return change.mul_((LIMIT / moved).clamp(max=1).unsqueeze(1)).add_(weight), moved


def gptaq(
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    upper: Float[Tensor, "in in"],
    order: Int[Tensor, "in"],
    *,
    share: float = 0.5,
) -> Float[Tensor, "in in"]:
    """P, strictly upper: rounding column j, as w_j has become by then, adds w_j P_jk to every later column k.

    `upper`: the factor of H in this `order`, which is that of the rows and columns of P too. With the triangle it keeps
    only what can still be done: P_j = share · (G - H)_j,>j (H_>j,>j + λI)⁻¹. Raises NumericalError as `closed_form`.
    """
    _check(cross)
    drift = (cross - hessian)[order.unsqueeze(1), order]
    return (drift @ upper.T).triu_(1).mul_(share) @ upper


def qronos(
    weight: Float[Tensor, "out in"],
    goal: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    cross: Float[Tensor, "in in"],
    upper: Float[Tensor, "in in"],
    order: Int[Tensor, "in"],
    *,
    share: float = 0.5,
) -> Float[Tensor, "out in"]:
    """Where the loop starts from instead of `goal`, which is W′ of the closed form, with the same `share`.

    `upper`: the factor of H in this `order`, which decides what the first column is.
    """
    first = order[0]
    drift = (cross[:, first] - hessian[:, first]) / hessian[first, first].clamp(min=TINY)
    wanted = weight[:, first] + share * (weight @ drift.to(weight.dtype))
    response = (upper[0] / upper[0, 0])[order.argsort()].to(goal.dtype)
    return goal + (wanted - goal[:, first]).outer(response)


def _check(cross: Float[Tensor, "in in"]) -> None:
    if not cross.isfinite().all():
        bad = int((~cross.isfinite()).sum())
        raise NumericalError(f"the cross moment has {bad} NaN or infinite entries of {cross.numel()}")
