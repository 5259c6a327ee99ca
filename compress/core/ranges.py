"""Ranges: which scale and zero point a group of weights gets.

`minmax` covers every weight. `search` minimises the weighted squared error of each group on its own,

    min over scale s, zero point z      Σ_j m_j (w_j - s (q_j - z))²,      q_j = clamp(round(w_j / s) + z)

with m = 1, or m_j = E[x_j²] of the input it meets ("importance", llama.cpp's imatrix). Clipping a few large
weights buys a finer grid for all others.

The search uses that for *fixed codes* the best scale and zero point are a linear regression of w on q:

  1. every candidate range p·[lo, hi] (both signs of a symmetric scale) proposes codes, first a coarse list of p, then
     the neighbours of each group's best;
  2. the regression turns the codes into their best (s, z), whose error follows from the same three sums;
  3. the winner is polished: round to nearest, regress, repeat, as long as the true error drops.

Step 2 makes a coarse list of candidates enough. Errors that decide are those of the *stored* parameters, and
min-max is one of the candidates, so the result is never worse than min-max. Rows are independent and are
worked off in slices that stay in cache.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from compress.core.affine import by_group, params_from_range, quantize, storable
from compress.core.floats import quantize_float
from compress.core.scheme import Grid

Range = Literal["minmax", "mse", "importance"]
Params = tuple[Float[Tensor, "out groups"], Int8[Tensor, "out groups"] | None]

COARSE = tuple(k / 16 for k in range(17, 5, -2))
"""The candidate ranges, relative to the one that covers every weight."""
FINE = (1 / 16, -1 / 16)
"""From the best of these, the ranges to look at next."""
POLISHES = 3
SLICE = 1 << 17
"""Weights per slice of rows."""


def choose(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    dtype: torch.dtype,
    range: Range,
    importance: Float[Tensor, "in"] | None = None,
) -> Params:
    """Scale and zero point per group, by the named rule. `importance` is used by the rule of that name only."""
    if range == "minmax":
        return minmax(weight, grid, dtype)
    if range == "importance" and importance is None:
        raise ValueError("range='importance' needs the importance of every input column")
    return search(weight, grid, dtype, importance if range == "importance" else None)


def minmax(weight: Float[Tensor, "out in"], grid: Grid, dtype: torch.dtype) -> Params:
    """The range that covers every weight of the group."""
    lo, hi = by_group(weight, grid).aminmax(dim=-1)
    return params_from_range(lo, hi, grid, dtype)


def nearest(weight: Float[Tensor, "out in"], grid: Grid, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """`weight` rounded to nearest on the grid that covers all of it, integer or float."""
    if grid.kind != "int":
        return quantize_float(weight, grid, dtype, search=False).dequantize()
    return quantize(weight, *minmax(weight, grid, dtype), grid).dequantize()


def search(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    dtype: torch.dtype,
    importance: Float[Tensor, "in"] | None = None,
) -> Params:
    """The range of least (importance-weighted) squared error; never worse than `minmax` in that error."""
    columns = weight.shape[1]
    root = None
    if importance is not None:
        root = by_group(importance.float().clamp(min=0).sqrt().unsqueeze(0), grid)
        root = torch.where(root.amax(dim=-1, keepdim=True) > 0, root, 1.0)
    step = max(1, SLICE // columns)
    slices = [_search(by_group(part.float(), grid), root, grid, dtype) for part in weight.split(step)]
    scale = torch.cat([scale for scale, _ in slices])
    if grid.symmetric:
        return scale, None
    return scale, torch.cat([zero.to(torch.int8) for _, zero in slices])


def _search(
    w: Float[Tensor, "out groups size"],
    root: Float[Tensor, "1 groups size"] | None,
    grid: Grid,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    sums = _Regression(w, root, grid)
    lo, hi = w.aminmax(dim=-1)
    scale, zero = params_from_range(lo, hi, grid, dtype)
    zero = torch.zeros_like(lo) if zero is None else zero.float()
    best: tuple[Tensor, ...] = (sums.error(scale.float(), zero), scale, zero)

    # A narrower range has a smaller scale and the same zero point.
    whole = scale.float()
    found: tuple[Tensor, ...] = (torch.full_like(lo, torch.inf), whole, zero, torch.ones_like(lo))
    for share in (sign * share for share in COARSE for sign in ((1, -1) if grid.symmetric else (1,))):
        found = _better((*sums.fit(share * whole, zero), torch.full_like(lo, share)), found)
    centre = found[3]
    for step in FINE:
        near = centre + centre.sign() * step
        found = _better((*sums.fit(near * whole, zero), near), found)

    _, proposed, offset, _ = found
    for _ in range(POLISHES + 1):
        scale = storable(proposed, dtype)
        best = _better((sums.error(scale.float(), offset), scale, offset), best)
        _, proposed, offset = sums.fit(best[1].float(), best[2])
    return best[1], best[2]


def _better(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Element by element, what belongs to the smaller error, which comes first."""
    wins = new[0] < old[0]
    return tuple(torch.where(wins, a, b) for a, b in zip(new, old, strict=True))


class _Regression:
    """Rounding and regression over one slice of groups, with its scratch memory."""

    def __init__(self, w: Float[Tensor, "out groups size"], root: Float[Tensor, "1 groups size"] | None, grid: Grid):
        self.w, self.root, self.grid = w, root, grid
        self.q, self.product = torch.empty_like(w), torch.empty_like(w)
        self.weighted = w if root is None else w * root
        self.energy = self._dot(self.weighted, self.weighted)
        self.mass = torch.full_like(self.energy, w.shape[-1]) if root is None else (root * root).sum(-1)
        self.total = (w if root is None else self.weighted * root).sum(-1)

    def _dot(self, a: Tensor, b: Tensor) -> Float[Tensor, "out groups"]:
        return torch.mul(a, b, out=self.product).sum(-1)

    def _round(self, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]) -> None:
        torch.mul(self.w, (1 / scale).unsqueeze(-1), out=self.q).round_()
        if not self.grid.symmetric:
            self.q += zero.unsqueeze(-1)
        self.q.clamp_(self.grid.qmin, self.grid.qmax)

    def error(
        self, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out groups"]:
        """The weighted squared error of rounding with these parameters."""
        self._round(scale, zero)
        if not self.grid.symmetric:
            self.q -= zero.unsqueeze(-1)
        self.q.mul_(scale.unsqueeze(-1)).sub_(self.w)
        if self.root is not None:
            self.q.mul_(self.root)
        return self._dot(self.q, self.q)

    def fit(
        self, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """(error, scale, zero point) of the regression on the codes that `scale` and `zero` give."""
        self._round(scale, zero)
        if self.root is not None:
            self.q.mul_(self.root)
        wq, qq = self._dot(self.weighted, self.q), self._dot(self.q, self.q)
        if not self.grid.symmetric:
            q = (self.q if self.root is None else self.q.mul_(self.root)).sum(-1)
            spread = qq - q * q / self.mass
            slope = (wq - self.total * q / self.mass) / spread
            intercept = (self.total - slope * q) / self.mass
            offset = (-intercept / slope).round().clamp(self.grid.qmin, self.grid.qmax)
            zero = torch.where(offset.isfinite(), offset, zero)
            qq = qq - 2 * zero * q + zero * zero * self.mass
            wq = wq - zero * self.total
        fitted = wq / qq
        usable = fitted.isfinite() & (fitted * scale > 0)
        return (
            torch.where(usable, self.energy - wq * fitted, self.energy),
            torch.where(usable, fitted, scale),
            zero,
        )
