"""SparseGPT: prune column by column, and let the columns still to come make up for each loss.

The recursion of GPTQ (`compress.quantize.gptq`) with zero as the only level. For one linear layer with inputs x and
H = E[x xᵀ], minimise tr((W - Ŵ) H (W - Ŵ)ᵀ). With (H + λI)⁻¹ = Uᵀ U (U upper), for each column j in turn

    ŵ_j = w_j where kept, else 0        w_k ← w_k - (w_j - ŵ_j) U_jk / U_jj   for all k > j.

Losing w_j costs w_j² / U_jj² once the later columns have made up for it, and so the mask keeps the largest of these:
over a block of columns and all rows, or over each group of N:M, when their turn comes, from the weights as updated by
then. (SparseGPT, arXiv 2301.00774.) Every block is as sparse as the whole, its count exact, where the paper's
implementation also prunes what is tied with its threshold.

Inputs that calibration did not see cost nothing but damping, so they go first, and those that stay are not changed. To
make up for the errors of earlier layers as well, take the target of asymmetric calibration in place of W.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.linalg import NotPositiveDefinite, inverse_cholesky
from compress.core.sparsity import Pattern, Pruned, keep_largest, largest, require_finite, wanda


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """Prune `weight` for inputs with second moments `hessian`.

    `block_size`: columns whose mask is chosen at a time, unstructured; the speed only for N:M, where it is rounded to
    whole groups. λ = damping · mean(diag H), raised where `inverse_cholesky` raises it; where nothing helps, Wanda
    prunes and no weight moves, which the result notes. The loop runs in float32, the factorisation in the dtype of
    `hessian` (float64 wanted). Raises ValueError where the pattern does not divide the inputs, NumericalError where a
    number is not finite.
    """
    rows, columns = weight.shape
    pattern.check(columns)
    require_finite(weight=weight, hessian=hessian)
    try:
        upper, used = inverse_cholesky(hessian, damping)
    except NotPositiveDefinite as error:
        mask = keep_largest(wanda(weight, hessian.diagonal()), pattern)
        return Pruned(weight * mask, mask, damping, f"pruned by Wanda, because {error}")
    cost = upper.diagonal().pow(-2).float().unsqueeze(1)
    upper = upper.div_(upper.diagonal().unsqueeze(1).clone()).float()
    block = max(block_size // pattern.m, 1) * pattern.m if pattern.m else block_size
    # Transposed, so that a column of the weight is contiguous.
    W = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    mask = torch.empty_like(W, dtype=torch.bool)
    errors = torch.empty(min(block, columns), rows, device=W.device)
    for a in range(0, columns, block):
        b = min(a + block, columns)
        feedback = upper[a:b, a:].T.contiguous()
        unit = pattern.m or b - a
        for first in range(0, b - a, unit):
            group = W[a + first : a + first + unit]
            group.addmm_(feedback[first : first + unit, :first], errors[:first], alpha=-1)
            scores = (group.square() * cost[a + first : a + first + unit]).T
            if pattern.m:
                kept = largest(scores, pattern.num_kept(unit)).T
            else:
                count = pattern.num_kept(b * rows) - pattern.num_kept(a * rows)
                kept = largest(scores.reshape(1, -1), count).view(rows, unit).T
            mask[a + first : a + first + unit] = kept
            for k, (w, stays) in enumerate(zip(group, kept, strict=True), first):
                if k > first:
                    w.addmv_(errors[first:k].T, feedback[k, first:k], alpha=-1)
                torch.mul(w, ~stays, out=errors[k])
                w.mul_(stays)
        W[b:].addmm_(feedback[b - a :], errors[: b - a], alpha=-1)
    return Pruned(W.T.to(weight.dtype).contiguous(), mask.T.contiguous(), used)
