"""Factors of the Hessian H = E[x xᵀ], the metric of every layer-wise objective.

GPTQ and its relatives need the upper U with H⁻¹ = Uᵀ U. Inverting H and factoring the inverse doubles the work and
loses digits on the way; instead, with J the reversal of rows and columns,

    J H J = L Lᵀ (one Cholesky)   ⇒   R = J L J is upper, H = R Rᵀ   ⇒   U = R⁻¹ (one triangular inverse).

H is only positive semi-definite when there are fewer tokens than inputs, so `damping · mean(diag H)` is added to
its diagonal. Where Cholesky still fails, damping is raised tenfold and again, up to 1; the caller learns which
value was used.

H is the largest thing in memory, so everything here works on a single copy of it, in place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from compress.errors import NumericalError

PIVOTS = 32
"""Columns that `pivot_order` picks at a time, at least; and never more than 64 times, for it copies H each time."""
LEAF = 128
"""Triangles of this size are inverted directly."""
ROWS = 512
"""Rows of H that are moved at a time."""


class NotPositiveDefinite(NumericalError):  # noqa: N818 - the mathematics' own word
    """No damping up to the mean of the diagonal makes the matrix positive definite."""


def dead_columns(hessian: Float[Tensor, "in in"]) -> Bool[Tensor, "in"]:
    """Inputs that are zero on all calibration tokens, to within 1e-12 of the mean energy. Test before damping."""
    diagonal = hessian.diagonal()
    return diagonal <= 1e-12 * diagonal.mean()


def inverse_cholesky(
    hessian: Float[Tensor, "in in"], damping: float, order: Int[Tensor, "in"] | None = None
) -> tuple[Float[Tensor, "in in"], float]:
    """The upper U with `(H + λI)⁻¹ = Uᵀ U`, λ = damping · mean(diag H), and the damping that was used.

    `order`: take rows and columns of H in this order. Works in the dtype of `hessian`, on one copy of it. Damping
    is tried as given, then tenfold each time, the last try being 1. Raises NotPositiveDefinite after that.
    """
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while True:
        matrix = hessian[backwards.unsqueeze(1), backwards]
        matrix.diagonal().add_(damping * hessian.diagonal().mean())
        lower = matrix.mT  # symmetric, and stored by columns as LAPACK wants it: factored where it is
        if not torch.linalg.cholesky_ex(lower, out=(lower, failed))[1]:
            return invert_upper_(reverse_(matrix).mT), damping
        del matrix, lower
        if damping >= 1:
            raise NotPositiveDefinite(
                f"the Hessian of {len(hessian)} inputs is not positive definite even with damping {damping:g}: "
                f"its diagonal spans [{hessian.diagonal().min():g}, {hessian.diagonal().max():g}]"
            )
        damping = min(10 * damping, 1.0)


def pivot_order(hessian: Float[Tensor, "in in"], damping: float) -> Int[Tensor, "in"]:
    """The order in which to round columns so that Σ_j U_jj⁻² is small, U the inverse Cholesky factor of H so ordered.

    U_jj⁻² is the energy of input j that the inputs after it do not explain. Only the product of these terms is fixed,
    so small ones should be taken where they are small already: the last column is the one of least energy, the one
    before it that of the least energy unexplained by the last, and so on. They are picked PIVOTS at a time, each time
    by what remains once the ones already picked are projected out; exact picking gains another percent and is slower.
    Sorting by H_jj, GPTQ's act-order, is the first pick applied to all.
    """
    rest = hessian.to(torch.float32, copy=True)
    rest.diagonal().add_(damping * hessian.diagonal().mean())
    left = torch.arange(len(rest), device=rest.device)
    picked = []
    count = max(PIVOTS, len(rest) // 64)
    while len(left):
        ranked = rest.diagonal().argsort(stable=True)
        pick, keep = ranked[:count], ranked[count:].sort().values
        factor, failed = torch.linalg.cholesky_ex(rest[pick.unsqueeze(1), pick])
        if failed:  # what remains is rounding noise; any order will do
            picked.append(left[ranked])
            break
        picked.append(left[pick])
        explained = torch.linalg.solve_triangular(factor, rest[pick][:, keep], upper=False)
        rest = _compact_(rest, keep).addmm_(explained.T, explained, alpha=-1)
        left = left[keep]
    return torch.cat(picked).flip(0)


def _compact_(matrix: Float[Tensor, "n n"], keep: Int[Tensor, " m"]) -> Float[Tensor, "m m"]:
    """The rows and columns `keep`, ascending, moved to the front of the matrix."""
    for start in range(0, len(keep), ROWS):
        rows = keep[start : start + ROWS]
        matrix[start : start + len(rows), : len(keep)] = matrix[rows.unsqueeze(1), keep]
    return matrix[: len(keep), : len(keep)]


def reverse_(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Rows and columns in reverse order, in place. The matrix is contiguous."""
    flat = matrix.view(-1)
    step = ROWS * len(matrix)
    for start in range(0, len(flat) // 2, step):
        front = flat[start : min(start + step, len(flat) // 2)]
        back = flat[len(flat) - start - len(front) : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


def invert_upper_(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Inverts an upper triangular matrix in place, halves first: [[A, B], [0, C]]⁻¹ = [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]]."""
    n = len(upper)
    if n <= LEAF:
        eye = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
    half = n // 2
    A, B, C = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    B.copy_(torch.linalg.solve_triangular(A, B, upper=True))
    B.copy_(torch.linalg.solve_triangular(C, B, upper=True, left=False)).neg_()
    invert_upper_(A)
    invert_upper_(C)
    return upper
