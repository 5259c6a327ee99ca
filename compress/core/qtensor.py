"""A quantized weight: integer codes, their scales and zero points, and the grid they live on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from compress.core.scheme import Grid


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One weight of shape [out, in] on an integer grid: `w = (codes - zero_point) · scale`.

    `scale` is kept in the dtype it is stored in, so that every reader computes with the same number.
    A symmetric scale may be negative: the sign decides which end of the grid has the extra level.
    """

    codes: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: Int8[Tensor, "out groups"] | None
    grid: Grid

    def __eq__(self, other: object) -> bool:
        """The same grid and, bit for bit, the same codes, scales and zero points."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.zero_point, other.zero_point))
        return self.grid == other.grid and all(
            (mine is None and its is None) or (mine is not None and its is not None and torch.equal(mine, its))
            for mine, its in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.codes.shape
        return out_features, in_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight these codes stand for, computed in float32 and rounded once to `dtype`."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).to(torch.float32)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(torch.float32).unsqueeze(-1)
        return (grouped * self.scale.to(torch.float32).unsqueeze(-1)).view(rows, columns).to(dtype)
