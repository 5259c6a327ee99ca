"""Structured pruning of width: which of the units that feed a linear layer go, and how the others make up for them.

A unit is a run of consecutive input channels of a layer y = W z that can only go together: one channel of an MLP's
hidden layer, before its down projection, or all channels of a group of heads that share keys and values, before the
output projection. The rows of the layers before it that make these channels go as well, so the model gets narrower.

With H = E[z zᵀ] the loss of output is known exactly for every choice. Kept channels S go on with weights W_S + D, and

    E‖W z - (W_S + D) z_S‖² + λ‖D‖²  is least at  D = E[(W z - W_S z_S) z_Sᵀ] (H_SS + λI)⁻¹.

D = 0 is plain slicing, so at any λ refitting never loses more than that, and where nothing goes nothing changes. (With
λ‖W_S + D‖² instead, the usual ridge, neither is true.) The inputs z may be the original model's while z_S is what the
pruned one has; then the cross moment takes H's place in D.

Scores of a unit h, in rising order of what they know:

    magnitude   ‖W_h‖²
    wanda       Σ_j ‖W_j‖² H_jj                 loss of slicing, were channels uncorrelated (arXiv 2306.11695)
    flap        Σ_j ‖W_j‖² (H_jj - μ_j²)        the same where a bias makes up for the mean (FLAP, arXiv 2312.11983)
    taylor      Σ_t (Σ_j z_tj ∂L/∂z_tj)²        what the training loss L feels of it at each token t
    obs         tr(W_h ([H⁻¹]_hh)⁻¹ W_hᵀ)       loss of output after all others are refitted: optimal brain surgeon

The first-order change of L when a unit goes is the sum of these products over the text. But that is the slope of L in a
factor before the unit, which training could have moved and has made small: what is left of it says little. Squares do
not cancel; they add up to the empirical Fisher information of such factors, in the place of the second-order change
(Theis et al., arXiv 1801.05787, by image; Molchanov et al., 1906.10771, by minibatch). Summed over the text, squared by
window or squared by token, with a quarter of the MLPs' channels gone the KL divergence on other texts is 1.36, 1.28 or
1.10 on stories260k, refitted 0.87, 0.81 or 0.74; of a Llama of 13M parameters 0.108, 0.090 or 0.091, refitted 0.081,
0.060 or 0.060.

The last score is exact for a single unit. Of two channels that do the same each can go for nothing, but not both; so
`greedy_obs` takes out a few percent at a time, refits, and looks again (ZipLM, arXiv 2302.04089). On stories260k, with
a quarter of the MLPs' channels gone and the rest refitted, the KL divergence on other texts is 0.74 by magnitude, 0.56
by wanda, 0.55 by flap, 0.54 by obs and 0.52 by greedy_obs; by wanda without refitting, 0.84.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from compress.core.linalg import NotPositiveDefinite, dead_columns, inverse_cholesky
from compress.errors import NumericalError

DAMPING = 0.01
"""λ over the mean of diag H."""
BATCH = 0.02
"""Of the units that are left, what `greedy_obs` takes out at once."""


def magnitude(weight: Float[Tensor, "out in"], size: int = 1) -> Float[Tensor, " units"]:
    """‖W_h‖², of units of `size` channels."""
    return _by_unit(_energies(weight), size)


def wanda(weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], size: int = 1) -> Float[Tensor, " units"]:
    """Σ_j ‖W_j‖² H_jj over the channels of a unit."""
    return _by_unit(_energies(weight) * hessian.diagonal().double(), size)


def flap(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], mean: Float[Tensor, "in"], size: int = 1
) -> Float[Tensor, " units"]:
    """Σ_j ‖W_j‖² var(z_j) over the channels of a unit; `mean`: E[z]."""
    variance = (hessian.diagonal().double() - mean.double().square()).clamp(min=0)
    return _by_unit(_energies(weight) * variance, size)


def taylor(
    inputs: Float[Tensor, "tokens in"], gradient: Float[Tensor, "tokens in"], size: int = 1
) -> Float[Tensor, " units"]:
    """Σ_t (Σ_j z_tj ∂L/∂z_tj)² over the channels of a unit; `gradient`: ∂L/∂z. Scores of batches add up."""
    return _units(inputs * gradient, size).sum(dim=2).square().sum(dim=0, dtype=torch.float64)


def obs(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], size: int = 1, *, damping: float = DAMPING
) -> Float[Tensor, " units"]:
    """By how much E‖W z - W′ z‖² + λ‖W - W′‖² rises at least when W′ does without a unit.

    λ = damping · mean(diag H), raised where `inverse_cholesky` raises it. Channels without energy cost nothing. Raises
    NumericalError where a number is not finite, ValueError where units do not divide the channels.
    """
    _check(damping, weight=weight, hessian=hessian)
    upper, dead = _inverse_factor(hessian, damping)
    parts = _units(upper, size)
    return _cost(weight.to(upper.dtype).masked_fill(dead, 0), torch.einsum("nua,nub->uab", parts, parts))


def greedy_obs(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    num_keep: int,
    size: int = 1,
    *,
    damping: float = DAMPING,
    batch: float = BATCH,
) -> Int[Tensor, " keep"]:
    """The units, ascending, that are left when those of the lowest `obs` score have gone, a `batch` of them at a time.

    `batch`: a share of the units left, at least one unit. After each the weights of the others are refitted and H⁻¹ is
    downdated, which costs what one elimination of all that goes would cost. Two copies of H. Raises as `obs` does, and
    NotPositiveDefinite where the downdates have used up the digits of H.
    """
    _check(damping, weight=weight, hessian=hessian)
    upper, dead = _inverse_factor(hessian, damping)
    inverse = upper.T @ upper
    W = weight.to(upper.dtype).masked_fill(dead, 0)
    left = torch.arange(_units(W, size).shape[1], device=W.device)
    _check_count(num_keep, len(left))
    while len(left) > num_keep:
        blocks = inverse.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
        stay = choose(_cost(W, blocks.movedim(-1, 0)), max(num_keep, len(left) - max(1, int(batch * len(left)))))
        keep = channels_of(stay, size)
        gone = others(keep, W.shape[1])
        root = _root(inverse[gone.unsqueeze(1), gone])
        shared = torch.linalg.solve_triangular(root, inverse[gone.unsqueeze(1), keep], upper=False)
        W = W[:, keep] - torch.linalg.solve_triangular(root, W[:, gone].T, upper=False).T @ shared
        inverse = inverse[keep.unsqueeze(1), keep].addmm_(shared.T, shared, alpha=-1)
        left = left[stay]
    return left


def reconstruct(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    keep: Int[Tensor, " keep"],
    cross: Float[Tensor, "in in"] | None = None,
    *,
    damping: float = DAMPING,
) -> tuple[Float[Tensor, "out keep"], float]:
    """The weights of the kept channels that give back most of W z, and the damping that was used.

    `hessian`: E[ẑ ẑᵀ] of the inputs as they are when the weights are used; `cross`: E[z ẑᵀ], z being what the original
    model has in their place, None: the same. λ = damping · mean(diag H), raised where `inverse_cholesky` raises it.
    Solved in the dtype of `hessian`; the answer has that of `weight`. Never a larger objective than W[:, keep].

    With an intercept: of centred moments, H - μ̂ μ̂ᵀ and E[z ẑᵀ] - μ μ̂ᵀ, this is the slope, and the bias grows by
    W μ - W′ μ̂_S. Raises NumericalError where a number is not finite, NotPositiveDefinite where H is hopeless.
    """
    _check(damping, weight=weight, hessian=hessian, **({} if cross is None else {"cross moment": cross}))
    if dead_columns(hessian).all():
        return weight[:, keep], damping
    W = weight.to(hessian.dtype)
    if cross is None:
        gone = others(keep, len(hessian))
        missing = W[:, gone] @ hessian[gone.unsqueeze(1), keep]
    else:
        missing = W @ cross[:, keep].to(W) - W[:, keep] @ hessian[keep.unsqueeze(1), keep]
    upper, used = inverse_cholesky(hessian, damping, keep)
    return (W[:, keep] + missing @ upper.T @ upper).to(weight.dtype), used


def choose(scores: Float[Tensor, " units"], count: int) -> Int[Tensor, " count"]:
    """The `count` units of the highest scores, ascending; of equal ones those that come first.

    Raises NumericalError where a score is NaN, ValueError where there are fewer units, or none would stay.
    """
    _check_count(count, len(scores))
    if scores.isnan().any():
        raise NumericalError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def channels_of(units: Int[Tensor, " units"], size: int) -> Int[Tensor, " channels"]:
    """The channels of units of `size`, in the order of the units."""
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def others(keep: Int[Tensor, " keep"], total: int) -> Int[Tensor, " gone"]:
    """What of 0 … total - 1 is not among `keep`, ascending."""
    gone = torch.ones(total, dtype=torch.bool, device=keep.device)
    gone[keep] = False
    return gone.nonzero().squeeze(1)


def _inverse_factor(
    hessian: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, "in"]]:
    """U with (H + λI)⁻¹ = Uᵀ U, and the channels without energy; where all are, any U will do."""
    dead = dead_columns(hessian)
    if dead.all():
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), dead
    return inverse_cholesky(hessian, damping)[0], dead


def _cost(weight: Float[Tensor, "out in"], inverse: Float[Tensor, "units size size"]) -> Float[Tensor, " units"]:
    """tr(W_h B_h⁻¹ W_hᵀ), B the diagonal blocks of an inverse, in float64."""
    size = inverse.shape[-1]
    root = _root(inverse.double())
    if size == 1:
        return _energies(weight) / root.flatten().square()
    parts = _units(weight, size).permute(1, 2, 0).double()
    return torch.linalg.solve_triangular(root, parts, upper=False).square().sum(dim=(1, 2))


def _root(inverse: Float[Tensor, "*units n n"]) -> Float[Tensor, "*units n n"]:
    root, failed = torch.linalg.cholesky_ex(inverse)
    if failed.any():
        raise NotPositiveDefinite("H⁻¹ has lost its digits. Raise the damping, or sum H in float64")
    return root


def _energies(weight: Float[Tensor, "out in"]) -> Float[Tensor, "in"]:
    return weight.square().sum(dim=0, dtype=torch.float64)


def _by_unit(scores: Float[Tensor, "in"], size: int) -> Float[Tensor, " units"]:
    return _units(scores.unsqueeze(0), size).sum(dim=(0, 2))


def _units(matrix: Float[Tensor, "rows in"], size: int) -> Float[Tensor, "rows units size"]:
    if size < 1 or matrix.shape[1] % size:
        raise ValueError(f"units of {size} channels do not divide {matrix.shape[1]} channels")
    return matrix.unflatten(1, (-1, size))


def _check_count(count: int, total: int) -> None:
    if not 1 <= count <= total:
        raise ValueError(f"{count} of {total} units cannot be kept; keep 1 to {total}")


def _check(damping: float, **tensors: Tensor) -> None:
    if not damping > 0:
        raise ValueError(f"damping={damping} must be above 0")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise NumericalError(f"{count} of {tensor.numel()} numbers of the {name} are not finite")
