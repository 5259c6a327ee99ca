"""SmoothQuant: move what is hard to round from a layer's inputs into its weights.

A few channels of the residual stream are a hundred times larger than the rest, and a token's scale has to cover them.
Weights are even. So each input channel is divided by s and its weight column multiplied by it (arXiv 2211.10438),

    W x = (W diag(s)) (diag(s)⁻¹ x)        s_j = max|x_j|^α / max|W_·j|^(1-α)

with the division folded into whatever made x, as in `compress.transform.awq`. α = 1 would leave inputs flat and give
weights all of the trouble, α = 0 the reverse; ½ shares it.

The paper picks one α for a model by hand. `alpha: search` picks one for each place where layers share an input, the
identity among the candidates: that of least output error when inputs and weights are both rounded to nearest, on a
sample of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.inputs import input_scale, round_inputs
from compress.core.ranges import nearest
from compress.core.scheme import Scheme
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block
    from compress.calibrate.sites import BlockSite

ALPHAS = tuple(step / 20 for step in range(8, 19))
"""0.4 … 0.9, what is searched beside the identity."""


def smoothing_scale(
    largest: Float[Tensor, "in"], weights: Sequence[Float[Tensor, "out in"]], alpha: float
) -> Float[Tensor, "in"]:
    """s for inputs of at most `largest`; 1 for a channel that is silent, or that no weight reads."""
    reach = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).float()
    scale = largest.float() ** alpha / reach ** (1 - alpha)
    usable = (largest > 0) & (reach > 0) & scale.isfinite()
    return torch.where(usable, scale, 1.0)


def rounding_error(
    x: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "out in"],
    scheme: Scheme,
    scale: Float[Tensor, "in"],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """The squared output error of a layer smoothed by `scale` and rounded, and the output's own energy."""
    exact = x @ weight.T
    smooth, scaled = x / scale, weight * scale
    if scheme.inputs:
        fixed = input_scale(smooth.abs().amax(), scheme.inputs) if scheme.inputs.overall else None
        smooth = round_inputs(smooth, scheme.inputs, fixed)
    rounded = nearest(scaled, scheme.weights, dtype)
    return float((smooth @ rounded.T - exact).square().sum()), float(exact.square().sum())


@dataclass(frozen=True)
class SmoothQuant:
    """The stage `smoothquant`: put it before a quantizer whose scheme rounds inputs."""

    name: ClassVar[str] = "smoothquant"
    role: ClassVar[Role] = "transform"
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = True

    alpha: float | Literal["search"] = "search"

    def __post_init__(self) -> None:
        if self.alpha != "search" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be from 0 to 1, or search; 0.5 … 0.85 are usual")

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Smooth every place where a layer of `schemes` rounds its inputs and a scale can be folded."""
        return [
            report
            for site in block.sites
            if site.source and any(schemes[name].inputs for name in site.layers if name in schemes)
            for report in self._smooth(block, site, {name: schemes[name] for name in site.layers if name in schemes})
        ]

    def _smooth(self, block: Block, site: BlockSite, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        sample = block.sample(site)
        weights = {name: block.weight(name) for name in site.layers}
        largest = block.moments(site, largest=True).largest
        assert largest is not None, "it was asked for"

        def measured(scale: Tensor) -> dict[str, tuple[float, float]]:
            return {
                name: rounding_error(sample, weights[name], scheme, scale, block.scale_dtype(name))
                for name, scheme in schemes.items()
            }

        alphas = ALPHAS if self.alpha == "search" else (self.alpha,)
        candidates = [block.tie(site, smoothing_scale(largest, list(weights.values()), alpha)) for alpha in alphas]
        if self.alpha == "search":
            candidates.insert(0, torch.ones_like(largest))
        best = min(candidates, key=_total(measured))
        if not (best == 1).all():
            stored = block.fold(site, best)
            for name, weight in weights.items():
                block.rewrite(name, weight * stored)
        return [
            LayerReport(name, schemes[name].name, error / energy if energy else 0.0)
            for name, (error, energy) in measured(best).items()
        ]


def _total(measured: Callable[[Tensor], Mapping[str, tuple[float, float]]]) -> Callable[[Tensor], float]:
    return lambda scale: sum(error for error, _ in measured(scale).values())
