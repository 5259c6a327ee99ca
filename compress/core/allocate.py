"""Allocation: which choice each unit of a model gets, when all of them share one budget of bytes.

A unit offers a menu of choices c (bits, a sparsity, a rank), each of so many bytes and of a cost in quality. Wanted is

    min Σ_l cost_l(c_l)      subject to      Σ_l bytes_l(c_l) ≤ budget,

the multiple-choice knapsack. It is solved exactly, by dynamic programming over the units: of all ways to choose for
the units seen so far only those are kept that no other beats in both bytes and cost (the Pareto front). Bytes are never
rounded to a coarser unit, which could miss the budget or the optimum.

That front alone may grow beyond bounds, so it is cut by prices as well. At a price λ per byte every unit chooses for
itself, and for each λ ≥ 0 the sum of what they choose bounds the optimum from below:

    Σ_l min_c (cost_l(c) + λ bytes_l(c)) - λ budget  ≤  optimum.

The best λ is found on the way of a greedy that buys upgrades in the order of their worth per byte, λ being the worth
of the first that does not fit; what it buys bounds the optimum from above. A state is dropped where the lower bound,
given the choices it has made, exceeds the upper. The two differ by about one upgrade of one layer, so hundreds of units
leave hundreds of states. The bound is that of D. Pisinger, "A minimal algorithm for the multiple-choice knapsack
problem", European Journal of Operational Research 83 (1995); he grows a core of units whose choice is in doubt, where
we run through all of them, since the bound makes those that are not in doubt cost next to nothing.

Sums of floating-point numbers preserve order, so no rounding of theirs can make a worse allocation win by more than the
rounding itself. Of equal costs the fewest bytes win, then the choice that comes first in the menu of the first unit
that differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from compress.errors import NumericalError

STATES = 1 << 22
"""Partial allocations remembered at most, over all units together."""


@dataclass(frozen=True)
class Menu:
    """What one unit may become: for each choice, the bytes it takes and what it costs in quality."""

    bytes: Sequence[int]
    cost: Sequence[float]

    def __post_init__(self) -> None:
        if not self.bytes or len(self.bytes) != len(self.cost):
            raise ValueError(f"a menu has bytes and cost for each choice, not {len(self.bytes)} and {len(self.cost)}")
        if any(count != int(count) or count < 0 for count in self.bytes):
            raise ValueError(f"bytes={list(self.bytes)} must be whole numbers, 0 or more")
        if not all(map(math.isfinite, self.cost)):
            raise NumericalError(f"cost={list(self.cost)} must be finite. Leave out the choices that may not be taken")


@dataclass(frozen=True)
class Allocation:
    """One choice for each unit, by its place in the menu, and what they come to."""

    choices: tuple[int, ...]
    bytes: int
    cost: float


def allocate(menus: Sequence[Menu], budget: int, *, tolerance: float = 0.0) -> Allocation:
    """The choices of least total cost within `budget` bytes.

    `tolerance`: what the optimum may be missed by, as a share of the cost; 0 is exact. Raises ValueError where even the
    smallest choices exceed the budget, or where more partial allocations than STATES remain in doubt: sizes that hardly
    ever add up alike, at costs that all lie on one line.
    """
    smallest = sum(min(menu.bytes) for menu in menus)
    if smallest > budget:
        raise ValueError(
            f"the smallest choices of {len(menus)} units take {smallest:,} bytes, {smallest - budget:,} more than the "
            f"budget of {budget:,}. Raise the budget, or offer smaller choices"
        )
    spare = budget - smallest
    price, greedy = _buy(menus, spare)
    # From here on, bytes are those beyond a unit's smallest choice.
    sizes = [np.array(menu.bytes, np.int64) - min(menu.bytes) for menu in menus]
    costs = [np.array(menu.cost, np.float64) for menu in menus]
    floors = [float((cost + price * size).min()) for size, cost in zip(sizes, costs, strict=True)]
    rounding = len(menus) * 2.0**-50 * (sum(float(np.abs(cost).max()) for cost in costs) + price * spare)
    missed = greedy.cost - (sum(floors) - price * spare)
    doubt = missed - tolerance * abs(greedy.cost) + rounding

    size, cost, floor = np.zeros(1, np.int64), np.zeros(1), 0.0
    trail: list[tuple[np.ndarray, int]] = []
    remembered = 0
    for menu_size, menu_cost, menu_floor in reversed(list(zip(sizes, costs, floors, strict=True))):
        floor += menu_floor
        width = len(size)
        size = np.add.outer(menu_size, size).ravel()
        cost = np.add.outer(menu_cost, cost).ravel()
        useful = np.flatnonzero((size <= spare) & (cost + price * size <= floor + doubt))
        front = useful[_undominated(size[useful], cost[useful])]
        size, cost = size[front], cost[front]
        trail.append((front, width))
        remembered += len(front)
        if remembered > STATES:
            share = 1.05 * missed / abs(greedy.cost) if greedy.cost else math.inf
            raise ValueError(
                f"more than {STATES:,} partial allocations of {len(menus)} units are in doubt with "
                f"tolerance={tolerance:g}. An allocation within {share:.1e} of the least cost is known: allow that much"
            )
    if not len(cost):
        return greedy
    place = len(cost) - 1  # the front runs from few bytes at a high cost to many at the least
    choices = []
    for front, width in reversed(trail):
        choice, place = divmod(int(front[place]), width)
        choices.append(choice)
    return _total(menus, choices)


def frontier(menus: Sequence[Menu], points: int | None = None, *, tolerance: float = 0.0) -> list[Allocation]:
    """Bytes against cost: allocations that none beats in both, from the smallest to the one of least cost.

    `points`: about how many, evenly spread over bytes; None: all there are. Each is as exact as `allocate` makes it.
    """
    if points is not None and points < 2:
        raise ValueError(f"points={points} must be at least 2, the two ends")
    smallest = sum(min(menu.bytes) for menu in menus)
    curve = [allocate(menus, sum(max(menu.bytes) for menu in menus), tolerance=tolerance)]
    step = max(1, (curve[0].bytes - smallest) // (points - 1)) if points else 1
    while curve[-1].bytes > smallest:
        curve.append(allocate(menus, max(smallest, curve[-1].bytes - step), tolerance=tolerance))
    return curve[::-1]


def tied(menus: Sequence[Menu]) -> Menu:
    """The menu of units that must choose alike, such as layers that a runtime fuses: bytes and costs added up."""
    counts = sorted({len(menu.bytes) for menu in menus})
    if len(counts) != 1:
        raise ValueError(f"units that choose alike need the same choices; their numbers are {counts}")
    return Menu(
        [sum(each) for each in zip(*(menu.bytes for menu in menus), strict=True)],
        [math.fsum(each) for each in zip(*(menu.cost for menu in menus), strict=True)],
    )


def monotone(bits: Sequence[float], cost: Sequence[float]) -> list[float]:
    """The costs nearest to `cost` in squares that never rise with bits: isotonic regression.

    Measured costs are noisy, and an allocation would follow the noise. Neighbours in the wrong order are pooled to
    their mean until none is left. Choices of equal bits put no demands on each other.
    """
    order = sorted(range(len(bits)), key=lambda choice: (bits[choice], -cost[choice]))
    pools: list[list[int]] = []
    means: list[float] = []
    for choice in order:
        pools.append([choice])
        means.append(cost[choice])
        while len(pools) > 1 and means[-2] < means[-1]:
            pools[-2:] = [pools[-2] + pools[-1]]
            means[-2:] = [math.fsum(cost[each] for each in pools[-1]) / len(pools[-1])]
    mean_of = {choice: mean for pool, mean in zip(pools, means, strict=True) for choice in pool}
    return [mean_of[choice] for choice in range(len(bits))]


def _undominated(size: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The places of the pairs that no other beats, by size; of equal pairs the first."""
    order = np.lexsort((cost, size))
    cost = cost[order]
    beaten = np.minimum.accumulate(cost)[:-1] <= cost[1:]
    return np.delete(order, np.flatnonzero(beaten) + 1)


def _buy(menus: Sequence[Menu], spare: int) -> tuple[float, Allocation]:
    """Upgrades from the smallest choices in the order of their worth per byte, as long as they fit into `spare`.

    Returns the worth of the first one that does not fit, 0 where all do, and what was bought.
    """
    hulls = [_hull(menu) for menu in menus]
    upgrades = []
    for unit, (menu, hull) in enumerate(zip(menus, hulls, strict=True)):
        for low, high in pairwise(hull):
            upgrades.append((_worth(menu, low, high), unit, high, menu.bytes[high] - menu.bytes[low]))
    choices = [hull[0] for hull in hulls]
    price = 0.0
    blocked = set()
    for worth, unit, high, size in sorted(upgrades, key=lambda upgrade: -upgrade[0]):
        if unit not in blocked and size <= spare:
            choices[unit] = high
            spare -= size
        else:
            price = price or worth
            blocked.add(unit)
    return price, _total(menus, choices)


def _hull(menu: Menu) -> list[int]:
    """The choices on the lower convex hull of (bytes, cost), as long as it falls, the smallest first."""
    hull: list[int] = []
    for choice in sorted(range(len(menu.bytes)), key=lambda choice: (menu.bytes[choice], menu.cost[choice])):
        if hull and menu.cost[choice] >= menu.cost[hull[-1]]:
            continue
        while len(hull) > 1 and _worth(menu, hull[-2], hull[-1]) <= _worth(menu, hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _worth(menu: Menu, low: int, high: int) -> float:
    """How much cost each further byte of the choice `high` saves over the choice `low`."""
    return (menu.cost[low] - menu.cost[high]) / (menu.bytes[high] - menu.bytes[low])


def _total(menus: Sequence[Menu], choices: Sequence[int]) -> Allocation:
    taken = list(zip(menus, choices, strict=True))
    return Allocation(
        tuple(choices),
        sum(menu.bytes[choice] for menu, choice in taken),
        math.fsum(menu.cost[choice] for menu, choice in taken),
    )
