"""Round to nearest: every weight goes to the closest level of its group's grid, on its own.

The accuracy is decided by the range alone (`compress.core.ranges`): min-max is the textbook method, the range of least
squared error is better everywhere and needs no data, and weighting that error by the energy E[x²] of each input
("importance") recovers a good part of what GPTQ gains, with one pass over a calibration set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core import affine, ranges
from compress.core.floats import quantize_float
from compress.core.metrics import relative_error
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import Range
from compress.core.scheme import Grid, GroupSize, Scheme, parse_scheme
from compress.errors import naming
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


def rtn(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    range: Range = "mse",
    importance: Float[Tensor, "in"] | None = None,
    largest: float | None = None,
) -> QuantizedTensor:
    """The weight rounded to nearest on `grid`, with scales by the rule `range`.

    `importance`: E[x²] per input, for `range="importance"`. `largest`: max|w| over the layers that an engine runs as
    one, whose NVFP4 scales must agree. Raises NumericalError on NaN or infinite weights.
    """
    if grid.kind != "int":
        mass = importance if range == "importance" else None
        searched = range != "minmax"
        return quantize_float(weight, grid, scale_dtype, search=searched, importance=mass, largest=largest)
    scale, zero_point = ranges.choose(weight, grid, scale_dtype, range, importance)
    return affine.quantize(weight, scale, zero_point, grid)


@dataclass(frozen=True)
class RTN:
    """The stage `rtn`."""

    name: ClassVar[str] = "rtn"
    role: ClassVar[Role] = "quantizer"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    scheme: str
    group_size: GroupSize = "auto"
    symmetric: bool = True
    range: Range = "mse"
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_scheme(self.scheme, self.group_size, self.symmetric)
        check_range(self.range)

    @property
    def resolved(self) -> Scheme:
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    @property
    def calibrated(self) -> bool:
        return self.range == "importance" or self.resolved.static

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Quantize the layers in `schemes`; looks at calibration inputs only where ranges or scales depend on them."""
        reports = []
        for site in block.sites:
            names = [name for name in site.layers if name in schemes]
            hessian = block.moments(site).hessian if self.calibrated and names else None
            shared = [name for name in names if schemes[name].weights.scale == "e4m3"]
            largest = max((float(block.weight(name).abs().max()) for name in shared), default=None)
            for name in names:
                weight, scheme = block.weight(name), schemes[name]
                with naming(name):
                    tensor = rtn(
                        weight,
                        scheme.weights,
                        scale_dtype=block.scale_dtype(name),
                        range=self.range,
                        importance=None if hessian is None else hessian.diagonal(),
                        largest=largest,
                    )
                block.quantize(name, tensor, scheme.inputs)
                reports.append(LayerReport(name, scheme.name, relative_error(weight, tensor.dequantize(), hessian)))
        return reports


def check_range(range: str) -> None:
    """Raises ValueError where no rule of that name chooses ranges."""
    if range not in get_args(Range):
        raise ValueError(f"unknown range {range!r}; there are {' '.join(get_args(Range))}")
