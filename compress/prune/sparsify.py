"""Sparse weights: half of a layer becomes zeros, and what stays makes up for it.

Which weights go is said by their magnitude, by Wanda (`compress.core.sparsity`), by SparseGPT or by ALPS, which choose
while they move the others (`compress.core.sparsegpt`, `compress.core.alps`). Whatever chose, `refit` solves for what
stays exactly, by least squares on the mask (`compress.core.refit`). Sites are pruned in the order in which data passes
them, each on inputs that the sites before have already changed.

Unstructured, `owl` gives each block its own share of zeros, by how many outliers Wanda's scores of all its layers have
in the original model (`compress.core.sparsity`). By layer, which OWL does not propose, it did harm.

The zeros are stored like any other weight. What they are worth depends on who reads them: 2:4 can be skipped by sparse
tensor cores, unstructured zeros make a file that compresses well. A quantizer behind this stage has to leave zeros as
they are, which `rtn` and `gptq` do.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.calibrate.walk import enter, inputs_of, walk
from compress.core.alps import alps
from compress.core.metrics import relative_error
from compress.core.refit import refit as refitted
from compress.core.scheme import Scheme
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import (
    Pattern,
    Pruned,
    keep_largest,
    magnitude,
    outlier_share,
    owl,
    parse_pattern,
    wanda,
)
from compress.errors import naming
from compress.models.store import LazyModel
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Method = Literal["magnitude", "wanda", "sparsegpt", "alps"]
OWL_LIMIT = 0.08
"""How far the share of zeros of a block may be from that of all; the paper takes 0.08 too."""


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
    owl: bool = False
    """Whether blocks with many outliers keep more, unstructured; the share of all is `sparsity`."""
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
        if self.owl and self.pattern:
            raise ValueError(f"owl chooses shares of zeros, and {self.pattern} is the same everywhere. Give a sparsity")
        if self.owl and not OWL_LIMIT < self.resolved.sparsity < 1 - OWL_LIMIT:
            raise ValueError(f"sparsity={self.sparsity} must be {OWL_LIMIT} or more away from 0 and 1 for owl")
        _ = self.resolved

    @property
    def resolved(self) -> Pattern:
        """Raises ValueError where there is no such pattern."""
        return parse_pattern(self.pattern if self.sparsity is None else self.sparsity)  # type: ignore[arg-type]

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude" or self.refit or self.owl

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Whatever is quantized later does not matter here: see `prune`."""
        return []

    def decide(
        self, model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path, names: Collection[str]
    ) -> dict[str, float]:
        """Layer → its share of zeros by OWL, from the model as it is; all layers of a block alike. `scratch`: a folder
        to be made and removed."""
        outliers: list[float] = []
        layers: list[dict[str, int]] = []

        def look(block: Block) -> None:
            scores = {
                name: wanda(block.weight(name), block.moments(site).hessian.diagonal())
                for site in block.sites
                for name in site.layers
                if name in names
            }
            if scores:
                outliers.append(outlier_share(torch.cat([each.flatten() for each in scores.values()]).unsqueeze(0)))
                layers.append({name: each.numel() for name, each in scores.items()})

        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        entrance = enter(model, tokens, inputs_of(0, scratch))
        for _ in walk(model, entrance, entrance.inputs, scratch, look):
            pass
        shutil.rmtree(scratch)
        shares = owl(outliers, [sum(sizes.values()) for sizes in layers], self.resolved.sparsity, limit=OWL_LIMIT)
        return {name: share for sizes, share in zip(layers, shares, strict=True) for name in sizes}

    def prune(self, block: Block, patterns: Mapping[str, Pattern]) -> list[LayerReport]:
        """Give these layers of a block their zeros."""
        reports = []
        for site in block.sites:
            chosen = [name for name in site.layers if name in patterns]
            hessian = block.moments(site).hessian if chosen and self.calibrated else None
            for name in chosen:
                weight = block.weight(name)
                with naming(name):
                    pruned = sparsify(
                        weight,
                        hessian,
                        patterns[name],
                        method=self.method,
                        refit=self.refit,
                        damping=self.damping,
                    )
                stored = pruned.weight.to(block.model.weights.dtype(f"{name}.weight")).float()
                error = relative_error(weight, stored, hessian)
                block.rewrite(name, stored)
                reports.append(LayerReport(name, patterns[name].name, error, pruned.note))
        return reports
