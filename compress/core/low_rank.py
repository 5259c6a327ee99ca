"""Low-rank compensation: two thin matrices beside a quantized weight, Ŵ + A B, which give back the worst of its error.

Of E = W - Ŵ the part C = A B of rank k is wanted that leaves least of it, seen through a metric M of the inputs:

    min over rank C ≤ k      tr((E - C) M (E - C)ᵀ).

For any root S Sᵀ = M the best C is the k leading singular triplets of E S, times S⁻¹ (Eckart and Young). The methods
differ in M only:

    svd           M = I                     the error of the weight (ZeroQuant-V2, arXiv 2303.08302)
    lqer          M = diag(E|x|)²           a scale per input (LQER, arXiv 2402.02446; its normalisation cancels)
    qera-approx   M = diag(E[x²])           the output error, were the inputs uncorrelated (QERA, arXiv 2410.06040)
    qera          M = H = E[x xᵀ]           the output error itself: no C of rank k does better on these inputs

We form neither S nor S⁻¹. If U holds the k leading left singular vectors of E S, then U Uᵀ E S is its best
approximation, hence C = U Uᵀ E: the root cancels, and U are the leading eigenvectors of

    E M Eᵀ,

[out, out]; for out > in, with E = Q R, those of R M Rᵀ, [in, in], times Q. Nothing is inverted, so H may be
singular and no eigenvalue has to be clamped. Where M sees fewer than k directions, the rest of the rank goes to the
plain error, by adding DAMPING · mean(diag M) to the diagonal of M, and so to inputs that calibration did not meet.

A gets the columns of U, B the rows of Uᵀ E, and each pair shares its norm evenly, so that bfloat16 suits both. Pairs
come in the order of what they are worth: dropping the last ones leaves the best compensation of lower rank.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.linalg import dead_columns
from compress.errors import NumericalError

Method = Literal["qera", "qera-approx", "lqer", "svd"]

DAMPING = 1e-8
"""Of the metric, relative to its mean diagonal."""


def compensate(
    error: Float[Tensor, "out in"],
    rank: int,
    hessian: Float[Tensor, "in in"] | None = None,
    method: Method = "qera",
    *,
    magnitude: Float[Tensor, "in"] | None = None,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """A and B such that A B is the best approximation of `error` that the method knows, in the dtype of `error`.

    `rank`: what exceeds min(out, in) would be zeros, and is left out. `hessian`: E[x xᵀ], for both kinds of qera.
    `magnitude`: E|x| of each input, for lqer. Inputs without energy get columns of zeros, except from svd, which knows
    no inputs. The product with `hessian` runs in its dtype, all else in float64. Raises ValueError where the method
    is unknown or lacks its statistics, NumericalError where a number is not finite.
    """
    if rank < 0:
        raise ValueError(f"rank={rank} must be 0 or more")
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; there are {' '.join(get_args(Method))}")
    for name, given in {"error": error, "hessian": hessian, "magnitude": magnitude}.items():
        if given is not None and not given.isfinite().all():
            count = int((~given.isfinite()).sum())
            raise NumericalError(f"{method}: {count} of {given.numel()} numbers of the {name} are not finite")
    energy = _energy(error, hessian, method, magnitude)
    dead = dead_columns(energy.expand(len(energy), -1))  # a matrix of this diagonal
    E = error.double().masked_fill(dead, 0)
    tall = len(E) > E.shape[1]
    Q, R = torch.linalg.qr(E) if tall else (None, E)
    if method == "qera" and hessian is not None:
        seen = (R.to(hessian.dtype) @ hessian).double()
    else:
        seen = R * energy
    seen.add_(R, alpha=DAMPING * float(energy.mean()))
    U = torch.linalg.eigh(seen @ R.T).eigenvectors.flip(1)[:, :rank]
    U = U if Q is None else Q @ U
    B = U.T @ E
    share = B.norm(dim=1).sqrt()
    B = B / torch.where(share > 0, share, 1.0).unsqueeze(1)
    return (U * share).to(error.dtype), B.to(error.dtype)


def _energy(
    error: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None,
    method: Method,
    magnitude: Float[Tensor, "in"] | None,
) -> Float[Tensor, "in"]:
    """The diagonal of M in float64."""
    if method == "svd":
        return torch.ones(error.shape[1], dtype=torch.float64, device=error.device)
    if method == "lqer":
        if magnitude is None:
            raise ValueError("method='lqer' needs the magnitude E|x| of every input")
        return magnitude.double().square()
    if hessian is None:
        raise ValueError(f"method={method!r} needs the hessian E[x xᵀ]; method='svd' does without")
    return hessian.diagonal().double()
