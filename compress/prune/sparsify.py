"""Sparse weights: half of a layer becomes zeros, and what stays makes up for it.

Which weights go is said by their magnitude, by Wanda (`compress.core.sparsity`), by SparseGPT or by ALPS, which choose
while they move the others (`compress.core.sparsegpt`, `compress.core.alps`). Whatever chose, `refit` solves for what
stays exactly, by least squares on the mask (`compress.core.refit`). Sites are pruned in the order in which data passes
them, each on inputs that the sites before have already changed.

The zeros are stored like any other weight. What they are worth depends on who reads them: 2:4 can be skipped by sparse
tensor cores, unstructured zeros make a file that compresses well. A quantizer behind this stage has to leave zeros as
they are, which `rtn` and `gptq` do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from compress.core.alps import alps
from compress.core.metrics import relative_error
from compress.core.refit import refit as refitted
from compress.core.scheme import Scheme
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern, Pruned, keep_largest, magnitude, parse_pattern, wanda
from compress.errors import naming
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Method = Literal["magnitude", "wanda", "sparsegpt", "alps"]


def sparsify(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None,
    pattern: Pattern,
    *,
    method: Method = "sparsegpt",
    refit: bool = True,
    damping: float = 0.01,
) -> Pruned:
    """A layer with zeros, for inputs with second moments `hessian`; None: magnitudes alone, and no refit."""
    if hessian is None:
        mask = keep_largest(magnitude(weight), pattern, "matrix")
        return Pruned(weight * mask, mask, damping)
    if method == "alps":
        return alps(weight, hessian, pattern, damping=damping)
    if method == "sparsegpt":
        pruned = sparsegpt(weight, hessian, pattern, damping=damping)
    elif method == "wanda":
        mask = keep_largest(wanda(weight, hessian.diagonal()), pattern)
        pruned = Pruned(weight * mask, mask, damping)
    else:
        pruned = sparsify(weight, None, pattern)
    return refitted(weight, hessian, pruned.mask, start=pruned.weight, damping=damping) if refit else pruned


@dataclass(frozen=True)
class Sparsify:
    """The stage `sparsify`."""

    name: ClassVar[str] = "sparsify"
    role: ClassVar[Role] = "pruner"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    sparsity: float | None = None
    """The share of zeros, unstructured."""
    pattern: str | None = None
    """In place of it N:M, n kept of each m consecutive inputs: "2:4"."""
    method: Method = "sparsegpt"
    refit: bool = True
    damping: float = 0.01
    """As a fraction of the Hessian's mean diagonal."""
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError('give a sparsity, as 0.5, or a pattern, as "2:4"')
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} must be one of {', '.join(get_args(Method))}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping={self.damping} must be above 0 and at most 1; 0.01 is usual")
        _ = self.resolved

    @property
    def resolved(self) -> Pattern:
        """Raises ValueError where there is no such pattern."""
        return parse_pattern(self.pattern if self.sparsity is None else self.sparsity)  # type: ignore[arg-type]

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude" or self.refit

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Whatever is quantized later does not matter here: see `prune`."""
        return []

    def prune(self, block: Block, names: Collection[str]) -> list[LayerReport]:
        """Give these layers of a block their zeros."""
        reports = []
        for site in block.sites:
            chosen = [name for name in site.layers if name in names]
            hessian = block.moments(site).hessian if chosen and self.calibrated else None
            for name in chosen:
                weight = block.weight(name)
                with naming(name):
                    pruned = sparsify(
                        weight,
                        hessian,
                        self.resolved,
                        method=self.method,
                        refit=self.refit,
                        damping=self.damping,
                    )
                stored = pruned.weight.to(block.model.weights.dtype(f"{name}.weight")).float()
                error = relative_error(weight, stored, hessian)
                block.rewrite(name, stored)
                reports.append(LayerReport(name, self.resolved.name, error, pruned.note))
        return reports
