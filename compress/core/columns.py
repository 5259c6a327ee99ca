"""The column loop of GPTQ: each column in turn goes onto its grid, and the columns still to come make up for its error.

With (H + λI)⁻¹ = Uᵀ U, U upper and in the order in which columns are rounded (`compress.quantize.gptq` says why),

    e = (w_j - ŵ_j) / U_jj        w_k ← w_k - e U_jk   for all k > j.

Rows do not depend on each other and share U. A block of columns is worked off with the errors of its own columns only,
which are then taken to all later columns in one product.

Weights named as zeros end as zeros, whatever the others have added to them by then: their level is 0 and what they lose
is made up for like any rounding. So a pruned weight keeps its pattern. Every grid here holds 0 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from compress.core import ranges
from compress.core.inputs import nearest_level
from compress.core.normal_float import codes_of
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import Range
from compress.core.scheme import Grid


@dataclass(frozen=True)
class Feedback:
    """How later columns make up for earlier ones."""

    order: Int[Tensor, "in"]
    """The columns in the order they are rounded in."""
    upper: Float[Tensor, "in in"]
    """U, its rows divided by U_jj so that errors need no division, in that order."""
    pull: Float[Tensor, "in in"] | None
    """Of GPTAQ (`compress.quantize.asymmetric`)."""
    block_size: int
    """Columns between two updates of all later ones, which changes the speed only."""


def round_integer(
    weight: Float[Tensor, "out in"],
    zeros: Bool[Tensor, "out in"] | None,
    feedback: Feedback,
    grid: Grid,
    dtype: torch.dtype,
    rule: Range,
    importance: Float[Tensor, "in"],
    static: bool,
) -> QuantizedTensor:
    """The weight on an integer grid, with scales of `dtype`. `zeros`: weights that end as zeros.

    Not `static`: a group's range is chosen anew from its updated weights when its turn comes.
    """
    rows, columns = weight.shape
    size = columns // grid.num_groups(columns)
    order = feedback.order
    scale, zero = ranges.choose(_without(weight, zeros), grid, dtype, rule, importance)
    S = scale.float().T.contiguous()
    Z = torch.zeros_like(S) if zero is None else zero.float().T.contiguous()
    alone = Grid(grid.bits, grid.symmetric)
    group_of = (order // size).tolist()
    gone = None if zeros is None else zeros.T[order]
    limits: list[tuple[Tensor, Tensor]] = []

    def begin(W: Tensor, a: int) -> None:
        if not static and a % size == 0:
            group = slice(a, a + size)
            left = _without(W[group], None if gone is None else gone[group])
            fresh, offset = ranges.choose(left.T, alone, dtype, rule, importance[order[group]])
            S[group_of[a]] = fresh.squeeze(1)
            if offset is not None:
                Z[group_of[a]] = offset.squeeze(1)
        if a == 0 or not static:
            limits[:] = zip((grid.qmin - Z).unbind(), (grid.qmax - Z).unbind(), strict=True)

    def place(w: Tensor, g: int, level: Tensor) -> None:
        torch.div(w, S[g], out=level).round_().clamp_(*limits[g])

    block = feedback.block_size if static else math.gcd(feedback.block_size, size)
    levels = _round(weight.T[order], gone, feedback, group_of, S, block, place, begin)
    codes = levels[order.argsort()].view(-1, size, rows).add_(Z.unsqueeze(1)).view(columns, rows)
    zero_point = None if zero is None else Z.T.to(torch.int8).contiguous()
    return QuantizedTensor(codes.T.to(torch.int8).contiguous(), S.T.to(dtype).contiguous(), zero_point, grid)


def round_float(
    weight: Float[Tensor, "out in"],
    zeros: Bool[Tensor, "out in"] | None,
    feedback: Feedback,
    grid: Grid,
    step: Float[Tensor, "out groups"],
) -> Shaped[Tensor, "out in"]:
    """The codes on a float grid, whose scales stay as they are. `zeros`: weights that end as zeros."""
    S, order = step.T.contiguous(), feedback.order
    group_of = (order // (len(order) // len(S))).tolist()

    def place(w: Tensor, g: int, level: Tensor) -> None:
        level.copy_(nearest_level(w / S[g], grid))

    gone = None if zeros is None else zeros.T[order]
    levels = _round(weight.T[order], gone, feedback, group_of, S, feedback.block_size, place)
    levels = levels[order.argsort()].T.contiguous()
    return codes_of(levels) if grid.kind == "normal" else levels.to(torch.float8_e4m3fn)


def round_steps(
    weight: Float[Tensor, "out in"],
    feedback: Feedback,
    step: Float[Tensor, "out parts"],
    low: Float[Tensor, "out parts"],
    bottom: int,
    top: int,
) -> Float[Tensor, "out in"]:
    """The codes u of w ≈ step · u - low, whose steps and lows stay as they are. No step is 0."""
    S, order = step.T.contiguous(), feedback.order
    offset = (low / step).T.contiguous()
    group_of = (order // (len(order) // len(S))).tolist()

    def place(w: Tensor, g: int, level: Tensor) -> None:
        torch.div(w, S[g], out=level).add_(offset[g]).round_().clamp_(bottom, top).sub_(offset[g])

    levels = _round(weight.T[order], None, feedback, group_of, S, feedback.block_size, place)
    codes = levels[order.argsort()].view(len(S), -1, len(weight)).add_(offset.unsqueeze(1))
    return codes.flatten(0, 1).round_().T.contiguous()


def _round(
    W: Float[Tensor, "in out"],
    gone: Bool[Tensor, "in out"] | None,
    feedback: Feedback,
    group_of: Sequence[int],
    S: Float[Tensor, "groups out"],
    block: int,
    place: Callable[[Tensor, int, Tensor], None],
    begin: Callable[[Tensor, int], None] = lambda W, a: None,
) -> Float[Tensor, "in out"]:
    """The level of every weight, which are codes with their zero point subtracted.

    `W` is the weight transposed, so that a column is contiguous, its columns in the order they are rounded in; it is
    written to, and a column stays as it was when it was rounded. `place(w, g, level)` rounds a column of group g;
    `begin(W, a)` is called before the block of columns from `a` on.
    """
    columns, rows = W.shape
    upper, pull = feedback.upper, feedback.pull
    levels = torch.empty_like(W)
    errors = torch.empty(min(block, columns), rows, device=W.device)
    for a in range(0, columns, block):
        b = min(a + block, columns)
        begin(W, a)
        ours = upper[a:b, a:].T.contiguous()
        drawn = None if pull is None else pull[a:b, a:].T.contiguous()
        for k, (w, level, g) in enumerate(zip(W[a:b], levels[a:b], group_of[a:b], strict=True)):
            if k:
                w.addmv_(errors[:k].T, ours[k, :k], alpha=-1)
                if drawn is not None:
                    w.addmv_(W[a : a + k].T, drawn[k, :k])
            place(w, g, level)
            if gone is not None:
                level.masked_fill_(gone[a + k], 0)
            torch.addcmul(w, level, S[g], value=-1, out=errors[k])
        W[b:].addmm_(ours[b - a :], errors[: b - a], alpha=-1)
        if drawn is not None:
            W[b:].addmm_(drawn[b - a :], W[a:b])
    return levels


def _without(weight: Float[Tensor, "a b"], zeros: Bool[Tensor, "a b"] | None) -> Float[Tensor, "a b"]:
    return weight if zeros is None else weight.masked_fill(zeros, 0)
