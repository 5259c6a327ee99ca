"""Round to nearest: every weight goes to the closest level of its group's grid, on its own.

The accuracy is decided by the range alone (`compress.core.ranges`): min-max is the textbook method, the range of least
squared error is better everywhere and needs no data, and weighting that error by the energy E[x²] of each input
("importance") recovers a good part of what GPTQ gains, with one pass over a calibration set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core import affine, ranges
from compress.core.metrics import relative_error
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import Range
from compress.core.scheme import Grid, parse_scheme
from compress.errors import NumericalError
from compress.stage import LayerReport

if TYPE_CHECKING:
    from compress.calibrate.block import Block


def rtn(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    range: Range = "mse",
    importance: Float[Tensor, "in"] | None = None,
) -> QuantizedTensor:
    """The weight rounded to nearest on `grid`, with scales by the rule `range`.

    `importance`: E[x²] per input, for `range="importance"`. Raises NumericalError on NaN or infinite weights.
    """
    scale, zero_point = ranges.choose(weight, grid, scale_dtype, range, importance)
    return affine.quantize(weight, scale, zero_point, grid)


@dataclass(frozen=True)
class RTN:
    """The stage `rtn`."""

    name: ClassVar[str] = "rtn"
    quantizes: ClassVar[bool] = True

    scheme: str
    group_size: int | None = 128
    symmetric: bool = True
    range: Range = "mse"
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_grid(self.scheme, self.group_size)
        check_range(self.range)

    @property
    def grid(self) -> Grid:
        return Grid(parse_scheme(self.scheme), self.symmetric, self.group_size)

    @property
    def calibrated(self) -> bool:
        return self.range == "importance"

    def apply(self, block: Block, grids: Mapping[str, Grid]) -> list[LayerReport]:
        """Quantize the layers in `grids`; looks at calibration inputs only for `range="importance"`."""
        reports = []
        for site in block.sites:
            names = [name for name in site.layers if name in grids]
            hessian = block.moments(site).hessian if self.calibrated and names else None
            for name in names:
                weight, grid = block.weight(name), grids[name]
                with naming(name):
                    tensor = rtn(
                        weight,
                        grid,
                        scale_dtype=block.scale_dtype(name),
                        range=self.range,
                        importance=None if hessian is None else hessian.diagonal(),
                    )
                block.quantize(name, tensor)
                reports.append(LayerReport(name, grid.scheme, relative_error(weight, tensor.dequantize(), hessian)))
        return reports


@contextmanager
def naming(*layers: str) -> Iterator[None]:
    """Lets a NumericalError of a pure function say which layers it is about."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{', '.join(layers)}: {error}") from error


def check_grid(scheme: str, group_size: int | None) -> None:
    """Raises ValueError where no weight grid can be made of these settings."""
    parse_scheme(scheme)
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1, or null for one scale per output channel")


def check_range(range: str) -> None:
    """Raises ValueError where no rule of that name chooses ranges."""
    if range not in get_args(Range):
        raise ValueError(f"unknown range {range!r}; there are {' '.join(get_args(Range))}")
