"""Mixed precision: bits go where the model's predictions feel them, within a budget (`compress.calibrate.choices`).

A unit is a layer, or the layers that an engine runs as one. Weights are rounded to nearest, by importance; that the
method to come loses less is assumed to leave the order as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.branches import Change
from compress.calibrate.choices import choose
from compress.calibrate.sites import BlockSite
from compress.core.scheme import WEIGHT_BITS, Scheme
from compress.errors import naming
from compress.models.store import LazyModel
from compress.quantize.rtn import rtn
from compress.stage import LayerReport, Role, Unit


@dataclass(frozen=True)
class Allocate:
    """The stage `allocate`: put it before a quantizer, whose bits it decides."""

    name: ClassVar[str] = "allocate"
    role: ClassVar[Role] = "allocator"
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    bits_per_weight: float
    """The budget, over the layers that are quantized, scales and zero points included."""
    choices: tuple[int, ...] = (2, 3, 4, 8)
    samples: int = 8
    """Calibration windows that divergences are measured on."""

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2 or any(bits not in WEIGHT_BITS for bits in self.choices):
            raise ValueError(f"choices={list(self.choices)} must be two or more different numbers of bits from 2 to 8")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1; 8 is usual")

    def budget(self, units: Sequence[Unit]) -> int:
        """In bytes."""
        return int(self.bits_per_weight * sum(unit.num_weights for unit in units) / 8)

    def decide(
        self,
        model: LazyModel,
        tokens: Int[Tensor, "windows length"],
        scratch: Path,
        units: Sequence[Unit],
    ) -> dict[str, Any]:
        """The bits of every layer, under `bits`, and how they were found. `scratch`: a folder to be made and removed.

        Raises ValueError where the budget is too small for any choice.
        """
        bits = [scheme.weights.bits for scheme in units[0].schemes]
        decision = choose(
            model,
            tokens[: self.samples],
            scratch,
            [unit.bytes for unit in units],
            bits,
            self.budget(units),
            lambda block: _present(block, units),
            lambda block, chosen: _change(block, units, chosen),
        )
        return {
            "bits": {
                layer: bits[choice]
                for unit, choice in zip(units, decision.choices, strict=True)
                for layer in unit.layers
            },
            **decision.facts,
            "uniform": [
                {"bits": each, "bytes": total, "predicted": sum(cost[choice] for cost in decision.costs)}
                for choice, (each, total) in enumerate(zip(bits, decision.totals, strict=True))
            ],
            "sensitivity": [
                {"layers": list(unit.layers), "cost_by_bits": dict(zip(map(str, bits), cost, strict=True))}
                for unit, cost in zip(units, decision.costs, strict=True)
            ],
        }

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []


def _present(block: Block, units: Sequence[Unit]) -> list[int]:
    """The units that lie in a block."""
    layers = {layer for site in block.sites for layer in site.layers}
    return [number for number, unit in enumerate(units) if unit.layers[0] in layers]


def _change(block: Block, units: Sequence[Unit], chosen: Mapping[int, int]) -> Change:
    """The block with these units rounded to what is chosen for them."""
    site_of = {layer: site for site in block.sites for layer in site.layers}
    weights: dict[str, Tensor] = {}
    for number, choice in chosen.items():
        unit = units[number]
        weights |= _rounded(block, unit, site_of[unit.layers[0]], unit.schemes[choice])
    return partial(block.forward, weights=weights)


def _rounded(block: Block, unit: Unit, site: BlockSite, scheme: Scheme) -> dict[str, Tensor]:
    importance = block.moments(site).hessian.diagonal()
    change = {}
    for name in unit.layers:
        with naming(name):
            tensor = rtn(
                block.weight(name),
                scheme.weights,
                scale_dtype=block.scale_dtype(name),
                range="importance",
                importance=importance,
            )
        change[name] = tensor.dequantize(block.model.dtype)
    return change
