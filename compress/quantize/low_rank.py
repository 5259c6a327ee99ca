"""Low-rank compensation as a stage: what rounding took from a layer is given back by two thin matrices beside it.

A quantized layer keeps its codes and computes

    y = Ŵ x + A (B x)

with A B the best approximation of W - Ŵ of its rank (`compress.core.low_rank`: LQER, arXiv 2402.02446; QERA, arXiv
2410.06040). H = E[x xᵀ] is that of the inputs the compressed model has, layer by layer in the order the data passes
them, so that later layers see what earlier ones were given back. A and B are bfloat16; their error is part of what is
reported. Where rounding them would leave more error than there was, the layer stays as it is.

Of the methods, lqer's own scale is left out: E|x| is observed nowhere, and qera-approx, from E[x²], is as cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.low_rank import compensate
from compress.core.metrics import quadratic_form
from compress.core.scheme import Scheme
from compress.errors import naming
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Method = Literal["qera", "qera-approx", "svd"]


@dataclass(frozen=True)
class LowRank:
    """The stage `low_rank`: put it after the quantizers."""

    name: ClassVar[str] = "low_rank"
    role: ClassVar[Role] = "corrector"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    rank: int = 32
    """Columns of A, rows of B."""
    method: Method = "qera"
    """svd looks at the weights only, and needs no calibration."""
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1; 16 to 64 is usual")
        if self.method not in get_args(Method):
            raise ValueError(f"unknown method {self.method!r}; there are {' '.join(get_args(Method))}")

    @property
    def calibrated(self) -> bool:
        return self.method != "svd"

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Compensate the layers of `schemes`, which are quantized by now."""
        reports = []
        for site in block.sites:
            for name in (name for name in site.layers if name in schemes):
                hessian = block.moments(site).hessian if self.calibrated else None
                error = block.weight(name) - block.approximation(name)
                with naming(name):
                    A, B = (M.bfloat16() for M in compensate(error, self.rank, hessian, self.method))
                before, after = _energy(error, hessian), _energy(error - A.float() @ B.float(), hessian)
                kept = None
                if after < before:
                    block.compensate(name, A, B)
                else:
                    kept = f"not compensated: a product of rank {self.rank} leaves no less error"
                energy = _energy(block.weight(name), hessian)
                left = min(before, after) / energy if energy else 0.0
                reports.append(LayerReport(name, schemes[name].name, left, kept))
        return reports


def _energy(matrix: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> float:
    """The mean energy of what a matrix makes of the inputs; of itself where they are not known."""
    return float(matrix.square().sum(dtype=torch.float64)) if hessian is None else quadratic_form(matrix, hessian)
