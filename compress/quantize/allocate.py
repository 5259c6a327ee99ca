"""Mixed precision: bits go where the model's predictions feel them, within a budget.

Each unit, a layer or the layers that an engine runs as one, is rounded to each of the choices in turn, all else as it
was, and the divergence of the model's predictions is measured: one walk with a branch for each (`compress.calibrate.
branches`). Divergences of small changes add up, about, so the best allocation is a knapsack, which is solved exactly
(`compress.core.allocate`).

"About" is checked: the allocation and the best uniform choice that fits the budget are measured as a whole, and where
the uniform one is better it is taken, which the report says. Weights are rounded to nearest, by importance; that the
method to come loses less is assumed to leave the order as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.branches import Change, divergences
from compress.calibrate.sites import BlockSite
from compress.core.allocate import Menu, allocate, frontier, monotone
from compress.core.scheme import WEIGHT_BITS, Scheme
from compress.models.store import LazyModel
from compress.quantize.rtn import naming, rtn
from compress.stage import LayerReport, Role, Unit

POINTS = 40
"""Of the trade-off that is shown in the report."""


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
        budget = self.budget(units)
        windows = tokens[: self.samples]
        bits = [scheme.weights.bits for scheme in units[0].schemes]

        def measured(propose: Callable[[Block], Iterator[tuple[Hashable, Change]]]) -> dict[Hashable, float]:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            try:
                return divergences(model, windows, scratch, propose)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

        alone = measured(lambda block: _alone(block, units))
        costs = [monotone(bits, [alone[number, choice] for choice in range(len(bits))]) for number in range(len(units))]
        menus = [Menu(unit.bytes, cost) for unit, cost in zip(units, costs, strict=True)]
        best = allocate(menus, budget, tolerance=1e-9)
        totals = [sum(unit.bytes[choice] for unit in units) for choice in range(len(bits))]
        fitting = [choice for choice, total in enumerate(totals) if total <= budget]
        whole = {"allocated": best.choices}
        if fitting:
            whole["uniform"] = (max(fitting, key=lambda choice: bits[choice]),) * len(units)
        together = measured(lambda block: _together(block, units, whole))
        taken = min(whole, key=lambda name: together[name])
        return {
            "bits": {
                layer: bits[choice] for unit, choice in zip(units, whole[taken], strict=True) for layer in unit.layers
            },
            "budget_bytes": budget,
            "bytes": sum(unit.bytes[choice] for unit, choice in zip(units, whole[taken], strict=True)),
            "taken": taken,
            "predicted": best.cost,
            "measured": together,
            "uniform": [
                {"bits": each, "bytes": total, "predicted": sum(cost[choice] for cost in costs)}
                for choice, (each, total) in enumerate(zip(bits, totals, strict=True))
            ],
            "frontier": [[point.bytes, point.cost] for point in frontier(menus, POINTS, tolerance=1e-3)],
            "sensitivity": [
                {"layers": list(unit.layers), "cost_by_bits": dict(zip(map(str, bits), cost, strict=True))}
                for unit, cost in zip(units, costs, strict=True)
            ],
        }

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []


def _alone(block: Block, units: Sequence[Unit]) -> Iterator[tuple[Hashable, Change]]:
    """Every choice of every unit of a block, one at a time."""
    for number, unit, site in _present(block, units):
        for choice, scheme in enumerate(unit.schemes):
            yield (number, choice), _rounded(block, unit, site, scheme)


def _together(
    block: Block, units: Sequence[Unit], whole: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Hashable, Change]]:
    """What whole allocations make of a block."""
    for name, choices in whole.items():
        change: dict[str, Tensor] = {}
        for number, unit, site in _present(block, units):
            change |= _rounded(block, unit, site, unit.schemes[choices[number]])
        yield name, change


def _present(block: Block, units: Sequence[Unit]) -> Iterator[tuple[int, Unit, BlockSite]]:
    """The units that lie in a block."""
    site_of = {layer: site for site in block.sites for layer in site.layers}
    for number, unit in enumerate(units):
        if unit.layers[0] in site_of:
            yield number, unit, site_of[unit.layers[0]]


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
