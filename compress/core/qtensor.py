"""A quantized weight: codes, their scales and zero points, and the grid they live on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import starmap

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from compress.core.normal_float import level_table
from compress.core.scheme import Grid


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One weight of shape [out, in] on a grid: `w = (codes - zero_point) · scale`.

    Codes are int8 on an integer grid, and float8 (E4M3) on a float grid, whose levels it holds one and all; those of
    NormalFloat are uint8, and their levels looked up: `w = LEVELS[codes] · scale`. `scale` is kept in the dtype it is
    stored in, so that every reader computes with the same number. An integer's symmetric scale may be negative: the
    sign decides which end of the grid has the extra level. Where the grid has scales of E4M3, what counts is `scale /
    global_scale`.
    """

    codes: Shaped[Tensor, "out in"]
    scale: Shaped[Tensor, "rows groups"]
    """`grid.scale_shape`: one row for each row of codes, unless the grid shares them."""
    zero_point: Int8[Tensor, "rows groups"] | None
    grid: Grid
    global_scale: Float[Tensor, 1] | None = None

    def __eq__(self, other: object) -> bool:
        """The same grid and, bit for bit, the same codes, scales and zero points."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        return self.grid == other.grid and all(starmap(_same, zip(self._tensors, other._tensors, strict=True)))

    __hash__ = None  # type: ignore[assignment]

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scale, self.zero_point, self.global_scale

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.codes.shape
        return out_features, in_features

    @property
    def step(self) -> Float[Tensor, "out groups"]:
        """What one unit of a code is worth, in float32, for every row."""
        step = self.scale.to(torch.float32)
        if self.global_scale is not None:
            step = step / self.global_scale
        if self.grid.rows == 1:
            return step
        return step.repeat_interleave(self.grid.rows or len(self.codes), dim=0)[: len(self.codes)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight these codes stand for, computed in float32 and rounded once to `dtype`."""
        rows, columns = self.codes.shape
        normal = self.grid.kind == "normal"
        levels = level_table(self.codes.device)[self.codes.long()] if normal else self.codes.to(torch.float32)
        grouped = levels.view(rows, self.scale.shape[1], -1)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(torch.float32).unsqueeze(-1)
        return (grouped * self.step.unsqueeze(-1)).view(rows, columns).to(dtype)


def _same(mine: Tensor | None, its: Tensor | None) -> bool:
    """Bit for bit: floats of 8 bits cannot be compared in any other way."""
    if mine is None or its is None:
        return mine is its
    return mine.dtype == its.dtype and torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
