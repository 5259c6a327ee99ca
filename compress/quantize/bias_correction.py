"""Bias correction: what rounding adds to a layer's mean output is taken off its bias (arXiv 1906.04721).

Rounding a weight W to Ŵ shifts the layer's output by (Ŵ - W) x, on average by (Ŵ - W) E[x]. Where the layer has a bias
anyway the mean costs nothing to put right:

    b ← b + (W - Ŵ) E[x]

With x as the compressed model has it, layer by layer in the order the data passes them, so that later layers see
corrected inputs. What is left of the error is its variance: E‖(W - Ŵ) x‖² - ‖(W - Ŵ) E[x]‖².

Layers without a bias stay as they are: to give them one would change the architecture, and few readers would take it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from compress.core.metrics import quadratic_error, quadratic_form
from compress.core.scheme import Scheme
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


def mean_shift(
    weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"], mean: Float[Tensor, "in"]
) -> Float[Tensor, " out"]:
    """(W - Ŵ) E[x]: what a bias must gain for outputs to keep their mean."""
    return (weight - rounded) @ mean.to(weight)


@dataclass(frozen=True)
class BiasCorrection:
    """The stage `bias_correction`: put it after the quantizers."""

    name: ClassVar[str] = "bias_correction"
    role: ClassVar[Role] = "corrector"
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Correct the layers of `schemes` that have a bias."""
        reports = []
        for site in block.sites:
            for name in (name for name in site.layers if name in schemes and block.has_bias(name)):
                moments = block.moments(site)
                weight, rounded = block.weight(name), block.approximation(name)
                shift = mean_shift(weight, rounded, moments.mean)
                block.shift_bias(name, shift)
                energy = quadratic_form(weight, moments.hessian)
                left = quadratic_error(weight, rounded, moments.hessian) - float(shift.double().square().sum())
                reports.append(LayerReport(name, schemes[name].name, max(0.0, left) / energy if energy else 0.0))
        return reports
