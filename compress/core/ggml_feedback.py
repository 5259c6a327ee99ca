"""GPTQ on ggml's grids: codes that make up for each other's errors, on scales that the range search has found.

Of a K type the scales are integers times their block's scale, and of no use to change once they are stored; but which
code a weight gets is free. So the columns are rounded in turn, and those still to come make up for each error, as the
inputs' second moments say how (`compress.core.columns`). llama.cpp has the moments' diagonal, which weighs errors, and
rounds each weight by itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.columns import Feedback, round_steps
from compress.core.ggml import Blocks, BlockType, levels, nonzero, steps
from compress.core.ggml_search import blocks
from compress.core.linalg import NotPositiveDefinite, dead_columns, inverse_cholesky, pivot_order

BLOCK = 128
"""Columns between two updates of all later ones, which changes the speed only."""


def fitted_blocks(
    weight: Float[Tensor, "rows columns"],
    kind: BlockType,
    hessian: Float[Tensor, "columns columns"],
    *,
    damping: float = 0.01,
) -> Blocks:
    """The matrix in this type, for inputs with second moments `hessian`.

    Where no damping makes these positive definite, each weight is rounded by itself. Raises as `blocks` does.
    """
    found = blocks(weight, kind, hessian.diagonal())
    dead = dead_columns(hessian)
    if dead.any():
        hessian = hessian.masked_fill(dead | dead.unsqueeze(1), 0)
        hessian.diagonal()[dead] = hessian.diagonal().mean()
    try:
        order = pivot_order(hessian, damping)
        upper, _ = inverse_cholesky(hessian, damping, order)
    except NotPositiveDefinite:
        return found
    feedback = Feedback(order, upper.div_(upper.diagonal().unsqueeze(1).clone()).float(), None, BLOCK)
    step, low = steps(found)
    bottom, top = levels(kind)
    codes = round_steps(weight.float(), feedback, nonzero(step), low, bottom, top) - bottom
    return replace(found, codes=codes.to(torch.uint8).view_as(found.codes))
