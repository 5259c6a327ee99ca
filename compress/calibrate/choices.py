"""Which of its choices each unit of a model gets: measured one at a time, chosen all together, and then checked.

Each unit is given each of its choices in turn, all else as it was, and the divergence of the model's predictions is
measured: one walk with a branch for each (`compress.calibrate.branches`). Divergences of small changes add up, about,
so the best allocation is a knapsack, which is solved exactly (`compress.core.allocate`).

"About" is checked: the allocation and the best uniform choice that fits the budget are measured as a whole, and where
the uniform one is better it is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.branches import Change, divergences
from compress.core.allocate import Menu, allocate, frontier, monotone
from compress.models.store import LazyModel

POINTS = 40
"""Of the trade-off that is shown in the report."""


@dataclass(frozen=True)
class Decision:
    """Unit by unit the choice it gets, and how that was found."""

    choices: tuple[int, ...]
    costs: tuple[tuple[float, ...], ...]
    """Divergence by unit and choice, alone; a larger choice never costs more."""
    totals: tuple[int, ...]
    """Bytes by choice, of all units together."""
    facts: dict[str, Any]
    """For the report, plain data: budget_bytes, bytes, taken (allocated or uniform), predicted, measured, frontier."""


def choose(
    model: LazyModel,
    tokens: Int[Tensor, "windows length"],
    scratch: Path,
    sizes: Sequence[Sequence[int]],
    order: Sequence[float],
    budget: int,
    present: Callable[[Block], Sequence[int]],
    change: Callable[[Block, Mapping[int, int]], Change],
) -> Decision:
    """The choices of least divergence on these windows whose bytes are at most `budget`.

    `sizes`: bytes by unit and choice. `order`: what grows with the choices, bits for instance. `present`: the units of
    a block. `change`: what a block becomes under unit → choice. `scratch`: a folder to be made and removed. Raises
    ValueError where the budget is too small for any choice.
    """
    every = range(len(order))

    def alone(block: Block) -> Iterator[tuple[Hashable, Change]]:
        for unit in present(block):
            for choice in every:
                yield (unit, choice), change(block, {unit: choice})

    def together(block: Block) -> Iterator[tuple[Hashable, Change]]:
        for name, choices in whole.items():
            if units := present(block):
                yield name, change(block, {unit: choices[unit] for unit in units})

    def measured(propose: Callable[[Block], Iterator[tuple[Hashable, Change]]]) -> dict[Hashable, float]:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            return divergences(model, tokens, scratch, propose)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    by_branch = measured(alone)
    costs = [monotone(order, [by_branch[unit, choice] for choice in every]) for unit in range(len(sizes))]
    menus = [Menu(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    best = allocate(menus, budget, tolerance=1e-9)
    totals = tuple(sum(size[choice] for size in sizes) for choice in every)
    whole = {"allocated": best.choices}
    fitting = [choice for choice in every if totals[choice] <= budget]
    if fitting:
        whole["uniform"] = (max(fitting, key=lambda choice: order[choice]),) * len(sizes)
    by_whole = measured(together)
    taken = min(whole, key=lambda name: by_whole[name])
    facts = {
        "budget_bytes": budget,
        "bytes": sum(size[choice] for size, choice in zip(sizes, whole[taken], strict=True)),
        "taken": taken,
        "predicted": best.cost,
        "measured": by_whole,
        "frontier": [[point.bytes, point.cost] for point in frontier(menus, POINTS, tolerance=1e-3)],
    }
    return Decision(tuple(whole[taken]), tuple(map(tuple, costs)), totals, facts)
