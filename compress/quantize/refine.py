"""Refinement: coordinate descent over the scales and codes of an already quantized weight.

GPTQ decides each column once and never looks back, with scales chosen before any error was known. Both can be
revisited, because the objective of a row, (w - ŵ) H (w - ŵ)ᵀ, is a quadratic whose gradient G = H (w - ŵ) is cheap to
keep up to date. Group by group, for all rows at once:

    scale    s ← s + (q · G_g) / (q H_gg qᵀ)            least squares along ŵ_g = s q, rounded to the storage dtype
    code j   ŵ_j ← nearest level to ŵ_j + G_j / H_jj    the minimum in one weight with all others held

A step is taken only where it lowers the error, and every step sees the exact effect of those before it, including the
rounding of the scales, so a sweep never makes a row worse. A sweep costs about as much as GPTQ itself; on trained
weights two lower the output error on held-out inputs by 4 % at 4 bits, 8 % at 3 and 22 % at 2, a little more on the
calibration set. The descent over codes is QuantEase (arXiv 2309.01885); the one over scales is added here.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.core.affine import storable
from compress.core.qtensor import QuantizedTensor

BLOCK = 32
"""Columns between two updates of the rest of their group."""


def refine(
    weight: Float[Tensor, "out in"],
    tensor: QuantizedTensor,
    hessian: Float[Tensor, "in in"],
    *,
    zeros: Bool[Tensor, "out in"] | None = None,
    damping: float = 0.01,
    sweeps: int = 1,
) -> QuantizedTensor:
    """`tensor` with better scales and codes for tr((W - Ŵ)(H + λI)(W - Ŵ)ᵀ), λ = damping · mean(diag H).

    Zero points stay, and so do weights at `zeros`. A column that `hessian` knows nothing of must have a positive
    diagonal, or damping be positive.
    """
    rows, columns = tensor.shape
    groups = tensor.scale.shape[1]
    dtype, grid = tensor.scale.dtype, tensor.grid
    H = hessian.float()
    ridge = damping * float(H.diagonal().mean())  # λ, never added to H itself: that would take a copy of it
    pull = (H.diagonal() + ridge).reciprocal().unsqueeze(1)
    S = tensor.scale.float().T.contiguous()
    Z = torch.zeros_like(S) if tensor.zero_point is None else tensor.zero_point.float().T.contiguous()
    # Transposed, so that a column of the weight is contiguous; levels are codes with their zero point subtracted.
    Q = tensor.codes.float().T.reshape(groups, -1, rows) - Z.unsqueeze(1)
    fixed = None if zeros is None else zeros.T.reshape(Q.shape)
    error = weight.float().T - (Q * S.unsqueeze(1)).view(columns, rows)
    G = (H @ error).add_(error, alpha=ridge)

    for sweep in range(sweeps):
        for g, q in enumerate(Q):
            group = slice(g * len(q), (g + 1) * len(q))
            metric = H[group, group].clone()
            metric.diagonal().add_(ridge)
            step = _scale_step(S[g], q, metric, G[group], dtype)
            S[g] += step
            change = q * step
            # In levels, each column's own optimum lies `distance` from where it is.
            distance = (G[group] - metric @ change).mul_(pull[group]).div_(S[g])
            metric = metric * pull[group]
            limits = grid.qmin - Z[g], grid.qmax - Z[g]
            for a in range(0, len(q), BLOCK):
                block = slice(a, min(a + BLOCK, len(q)))
                still = None if fixed is None else fixed[g, block]
                moved = _descend(q[block], distance[block], metric[block, block], limits, still)
                q[block] += moved
                change[block] += moved * S[g]
                distance -= metric[:, block] @ moved
            unseen = slice(group.stop if sweep == sweeps - 1 else 0, None)  # no later step reads the rest of G
            G[unseen].addmm_(H[unseen, group], change, alpha=-1)
            G[group] -= ridge * change
    codes = (Q + Z.unsqueeze(1)).view(columns, rows).T.to(torch.int8).contiguous()
    return QuantizedTensor(codes, S.T.to(dtype).contiguous(), tensor.zero_point, grid)


def _scale_step(
    scale: Float[Tensor, " out"],
    q: Float[Tensor, "size out"],
    metric: Float[Tensor, "size size"],
    gradient: Float[Tensor, "size out"],
    dtype: torch.dtype,
) -> Float[Tensor, " out"]:
    """The change of one group's scales: to the nearest storable least-squares value, 0 where that would not help.

    A scale keeps its sign: a format that can only store positive ones may rely on it.
    """
    slope = (q * gradient).sum(dim=0)
    curvature = (q * (metric @ q)).sum(dim=0)
    best = scale + torch.where(curvature > 0, slope / curvature, 0.0)
    step = storable(best, dtype).float() - scale
    helps = step * (2 * slope - step * curvature) > 0
    return torch.where(helps & (best * scale > 0), step, 0.0)


def _descend(
    q: Float[Tensor, "size out"],
    distance: Float[Tensor, "size out"],
    metric: Float[Tensor, "size size"],
    limits: tuple[Float[Tensor, " out"], Float[Tensor, " out"]],
    fixed: Bool[Tensor, "size out"] | None,
) -> Float[Tensor, "size out"]:
    """By how many levels each weight of a block moves, one column after the other; those that are `fixed` by none.

    `metric`: H_jk / H_jj.
    """
    moved = torch.empty_like(q)
    for j, (level, optimum) in enumerate(zip(q, q + distance, strict=True)):
        if j:
            optimum.addmv_(moved[:j].T, metric[j, :j], alpha=-1)
        torch.sub(optimum.round_().clamp_(*limits), level, out=moved[j])
        if fixed is not None:
            moved[j].masked_fill_(fixed[j], 0)
    return moved
