"""Round to nearest: each weight to the closest point of its group's grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calibrate.block import Block
from compress.core import ranges
from compress.core.affine import quantize
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, parse_scheme
from compress.stage import LayerReport


def rtn(weight, grid, *, scale_dtype, range="mse", importance=None):
    s, z = ranges.choose(weight, grid, scale_dtype, range, importance)
    return quantize(weight, s, z, grid)


@dataclass(frozen=True)
class RTN:
    scheme: str
    group_size: int | None = 128
    symmetric: bool = True
    range: ranges.Range = "mse"
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    name: ClassVar[str] = "rtn"
    quantizes: ClassVar[bool] = True

    @property
    def grid(self):
        return Grid(parse_scheme(self.scheme), self.symmetric, self.group_size)

    @property
    def calibrated(self):
        return self.range == "importance"

    def apply(self, block, grids):
        out = []
        for n, g in grids.items():
            W = block.weight(n)
            q = rtn(W, g, scale_dtype=block.scale_dtype(n), range=self.range)
            block.quantize(n, q)
            out.append(LayerReport(n, g.scheme, float((q.dequantize() - W).square().sum() / W.square().sum())))
        return out
