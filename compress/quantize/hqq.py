"""HQQ: ranges by a norm below one, which lets a few weights go far off so that all others come close; needs no data.

    min over scale s, zero point z      Σ_j |w_j - s (q_j - z)|^p,      q_j = clamp(round(w_j / s) + z),  p < 1

for each group on its own. Half-quadratic splitting (Badri and Shaji, "Half-Quadratic Quantization", 2023) ties e to the
error r = w/s - (q - z) by a penalty β, which grows by 1 % each time, and alternates two closed forms:

    e      ← sign(r) · max(|r| - |r|^(p-1) / β, 0)          0 for |r| below β^(-1/(2-p))
    s, z   ← the regression of w - s e on q                  which does not see the large errors

The paper holds s and lets z be real; with integers, z alone gained nothing on trained weights. So z is rounded onto the
grid, or is 0 on a symmetric one, and s is the best for that z. Errors count in steps of the grid, so that β suits
weights of any size. We start from the range of least squared error and keep the iterate of least Σ|w - ŵ|^p as stored.

No group ends worse than it started, in this norm. The model may: measured against `rtn` with `range: mse`, asymmetric
per channel, KL rises by 2 and 0 % at 4 and 3 bits (stories260k), 7 and 26 % (pocket-llama-13m). Min-max is worse yet
there, but better than this at 2 bits in groups of 64, and on symmetric grids of 3 bits (pocket-llama-13m).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core import affine, ranges
from compress.core.metrics import relative_error
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, GroupSize, Scheme, parse_scheme
from compress.errors import naming
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


def hqq(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    p: float = 0.7,
    beta: float = 10.0,
    iterations: int = 20,
) -> QuantizedTensor:
    """The weight rounded to nearest on `grid`, with ranges of small Σ|w - ŵ|^p.

    Raises ValueError on a float grid, NumericalError on NaN or infinite weights.
    """
    if grid.kind != "int":
        raise ValueError(f"hqq fits integer grids, and {grid.format} is none. Use rtn or gptq")
    size = max(1, ranges.SLICE // weight.shape[1])
    parts = [_alternate(rows, grid, scale_dtype, p, beta, iterations) for rows in weight.split(size)]
    scale, zero = (torch.cat(values) for values in zip(*parts, strict=True))
    return affine.quantize(weight, scale, None if grid.symmetric else zero.to(torch.int8), grid)


def _alternate(
    weight: Float[Tensor, "out in"], grid: Grid, dtype: torch.dtype, p: float, beta: float, iterations: int
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The best scale and zero point on the way."""
    w = affine.by_group(weight.float(), grid)
    scale, start = ranges.choose(weight, grid, dtype, "mse")
    zero = torch.zeros_like(scale, dtype=torch.float32) if start is None else start.float()
    best, least = (scale, zero), torch.full_like(zero, torch.inf)
    for _ in range(iterations + 1):
        step, offset = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
        steps = w / step
        codes = steps.round().add_(offset).clamp_(grid.qmin, grid.qmax)
        error = steps.sub_(codes).add_(offset)
        size = error.abs().clamp_(min=1e-12)
        pull = size.pow(p - 1)
        loss = (size * pull).sum(dim=-1) * scale.float().abs().pow(p)
        wins, least = loss < least, torch.fmin(loss, least)
        best = torch.where(wins, scale, best[0]), torch.where(wins, zero, best[1])
        e = size.sub_(pull.div_(beta)).clamp_(min=0).copysign_(error)
        beta *= 1.01
        fitted, zero = _regress(w - step * e, codes, scale.float(), zero, grid)
        scale = affine.storable(fitted, dtype)
    return best


def _regress(
    target: Float[Tensor, "out groups size"],
    codes: Float[Tensor, "out groups size"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"],
    grid: Grid,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """The least-squares scale and integer zero point; those given where the codes leave them open."""
    if not grid.symmetric:
        centre = codes.mean(dim=-1)
        spread = codes - centre.unsqueeze(-1)
        slope = (spread * target).sum(dim=-1) / spread.square().sum(dim=-1)
        offset = (centre - target.mean(dim=-1) / slope).round().clamp(grid.qmin, grid.qmax)
        zero = torch.where(slope.isfinite() & offset.isfinite(), offset, zero)
    levels = codes - zero.unsqueeze(-1)
    fitted = (levels * target).sum(dim=-1) / levels.square().sum(dim=-1)
    return torch.where(fitted.isfinite() & (fitted * scale > 0), fitted, scale), zero


@dataclass(frozen=True)
class HQQ:
    """The stage `hqq`."""

    name: ClassVar[str] = "hqq"
    role: ClassVar[Role] = "quantizer"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    scheme: str
    group_size: GroupSize = "auto"
    symmetric: bool = True
    p: float = 0.7
    beta: float = 10.0
    iterations: int = 20
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.resolved.weights.kind != "int":
            raise ValueError(f"hqq fits integer grids, scheme {self.scheme} has float weights. Use rtn or gptq")
        if not (0 < self.p <= 1 and self.beta > 0 and self.iterations >= 0):
            given = f"p={self.p}, beta={self.beta}, iterations={self.iterations}"
            raise ValueError(f"{given}: p must be above 0 and at most 1, beta above 0, iterations at least 0")

    @property
    def resolved(self) -> Scheme:
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    @property
    def calibrated(self) -> bool:
        return self.resolved.static

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Quantize the layers in `schemes`; looks at calibration inputs only where they get a fixed scale."""
        fit = partial(hqq, p=self.p, beta=self.beta, iterations=self.iterations)
        reports = []
        for site in block.sites:
            names = [name for name in site.layers if name in schemes]
            hessian = block.moments(site).hessian if self.calibrated and names else None
            for name in names:
                weight, scheme = block.weight(name), schemes[name]
                with naming(name):
                    tensor = fit(weight, scheme.weights, scale_dtype=block.scale_dtype(name))
                block.quantize(name, tensor, scheme.inputs)
                reports.append(LayerReport(name, scheme.name, relative_error(weight, tensor.dequantize(), hessian)))
        return reports
