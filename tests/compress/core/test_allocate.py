from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from compress.core import allocate as module
from compress.core.allocate import Allocation, Menu, allocate, frontier, monotone, tied
from compress.errors import NumericalError


def random_menus(seed: int, sizes: int, costs: int) -> list[Menu]:
    """A few units with menus of their own lengths. Costs are multiples of 1/64: their sums are exact in any order."""
    draw = random.Random(seed)
    menus = []
    for _ in range(draw.randint(1, 6)):
        count = draw.randint(1, 4)
        menus.append(
            Menu([draw.randrange(sizes) for _ in range(count)], [draw.randrange(costs) / 64 for _ in range(count)])
        )
    return menus


def large(seed: int, choices: int = 4) -> list[Menu]:
    """Eighty blocks of a 70-billion-parameter Llama: seven layers each, at 2 bits and more, some far more delicate."""
    draw = random.Random(seed)
    weights = [8192 * width for width in (8192, 1024, 1024, 8192, 28672, 28672, 28672)] * 80
    menus = []
    for count in weights:
        delicacy = draw.lognormvariate(0, 1.5)
        bits = [2 + 6 * choice / (choices - 1) for choice in range(choices)]
        sizes = [int(count * b) // 8 + count // 64 for b in bits]
        menus.append(Menu(sizes, [delicacy * draw.uniform(0.7, 1.3) * 4**-b for b in bits]))
    return menus


def taken(menus: Sequence[Menu], choices: Sequence[int]) -> Allocation:
    pairs = list(zip(menus, choices, strict=True))
    return Allocation(tuple(choices), sum(m.bytes[c] for m, c in pairs), math.fsum(m.cost[c] for m, c in pairs))


def every(menus: Sequence[Menu]) -> list[Allocation]:
    """All allocations, in the order of their choices."""
    return [taken(menus, choices) for choices in itertools.product(*(range(len(menu.bytes)) for menu in menus))]


def smallest(menus: Sequence[Menu]) -> int:
    return sum(min(menu.bytes) for menu in menus)


def largest(menus: Sequence[Menu]) -> int:
    return sum(max(menu.bytes) for menu in menus)


def subset_sum(units: int) -> list[Menu]:
    """Cost falls with bytes along one line, so that nothing is better than filling the budget to the last byte."""
    draw = random.Random(0)
    sizes = [[draw.randrange(10**9) for _ in range(3)] for _ in range(units)]
    return [Menu(each, [(10**9 - size) / 64 for size in each]) for each in sizes]


@pytest.mark.parametrize(("sizes", "costs"), [(1000, 6400), (20, 20), (4, 4)], ids=["free", "tight", "all ties"])
def test_no_allocation_costs_less_and_of_equal_ones_the_smallest_and_first_is_taken(sizes: int, costs: int) -> None:
    for seed in range(200):
        menus = random_menus(seed, sizes, costs)
        budget = random.Random(seed).randint(smallest(menus), largest(menus))
        fitting = [each for each in every(menus) if each.bytes <= budget]
        assert allocate(menus, budget) == min(fitting, key=lambda each: (each.cost, each.bytes, each.choices))


def test_costs_of_any_magnitude_and_sign_are_minimised() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        menus = [
            Menu(
                [draw.randrange(1000) for _ in range(3)], [draw.gauss(0, 1) * 10 ** draw.uniform(-9, 9) for _ in "123"]
            )
            for _ in range(5)
        ]
        budget = (smallest(menus) + largest(menus)) // 2
        least = min(each.cost for each in every(menus) if each.bytes <= budget)
        assert allocate(menus, budget).cost == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("choices", [4, 13])
def test_a_large_model_is_within_budget_and_never_worse_than_the_best_uniform_choice(choices: int) -> None:
    menus = large(0, choices)
    for each in (taken(menus, (choice,) * 560) for choice in range(3)):
        found = allocate(menus, each.bytes)
        assert found.bytes <= each.bytes
        assert found.cost <= each.cost
    assert found.cost < 0.9 * each.cost


def test_the_result_is_that_of_its_own_choices() -> None:
    menus = large(1)
    found = allocate(menus, 30 * 10**9)
    assert found == taken(menus, found.choices)


def test_a_budget_that_holds_everything_buys_the_least_cost_of_every_unit() -> None:
    menus = random_menus(3, 1000, 6400)
    assert allocate(menus, 10**12).cost == sum(min(menu.cost) for menu in menus)


def test_a_budget_below_the_smallest_choices_is_refused_with_what_is_missing() -> None:
    menus = [Menu([1000, 2000], [1.0, 0.0]), Menu([500, 700], [1.0, 0.0])]
    assert allocate(menus, 1500).choices == (0, 0)
    with pytest.raises(
        ValueError, match=r"smallest choices of 2 units take 1,500 bytes, 3 more than the budget of 1,4"
    ):
        allocate(menus, 1497)


def test_with_a_tolerance_the_cost_is_within_it() -> None:
    for seed in range(200):
        menus = random_menus(seed, 1000, 6400)
        budget = random.Random(seed).randint(smallest(menus), largest(menus))
        loose, exact = allocate(menus, budget, tolerance=0.2), allocate(menus, budget)
        assert loose.bytes <= budget
        assert loose.cost * (1 - 0.2) <= exact.cost


def test_what_cannot_be_decided_is_decided_with_the_tolerance_that_the_error_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STATES", 1000)
    menus = subset_sum(100)
    budget = (smallest(menus) + largest(menus)) // 2
    with pytest.raises(ValueError, match="more than 1,000 partial allocations of 100 units") as raised:
        allocate(menus, budget)
    tolerance = float(str(raised.value).partition("within ")[2].split()[0])
    assert tolerance < 0.01
    assert allocate(menus, budget, tolerance=tolerance).bytes <= budget


def test_tied_units_choose_as_if_each_had_to_choose_alike() -> None:
    draw = random.Random(0)
    menus = [
        Menu([draw.randrange(99) for _ in range(3)], [draw.randrange(640) / 64 for _ in range(3)]) for _ in range(5)
    ]
    budget = (smallest(menus) + largest(menus)) // 2
    alike = [each for each in every(menus) if each.bytes <= budget and len({*each.choices[:3]}) == 1]
    best = min(alike, key=lambda each: each.cost)
    found = allocate([tied(menus[:3]), *menus[3:]], budget)
    assert (found.cost, found.choices) == (best.cost, best.choices[2:])


def test_units_with_different_choices_cannot_be_tied() -> None:
    with pytest.raises(ValueError, match=r"the same choices; their numbers are \[1, 2\]"):
        tied([Menu([1, 2], [1, 0]), Menu([1], [1])])


def test_the_frontier_is_every_allocation_that_none_beats() -> None:
    for seed in range(50):
        menus = random_menus(seed, 200, 640)
        pareto: list[tuple[int, float]] = []
        for each in sorted(every(menus), key=lambda each: (each.bytes, each.cost)):
            if not pareto or each.cost < pareto[-1][1]:
                pareto.append((each.bytes, each.cost))
        assert [(each.bytes, each.cost) for each in frontier(menus)] == pareto


def test_a_frontier_of_some_points_has_both_ends_and_points_of_the_whole_one_between() -> None:
    menus = large(0)[:14]
    some, whole = frontier(menus, 20), frontier(menus)
    assert (some[0], some[-1]) == (whole[0], whole[-1])
    assert 15 <= len(some) <= 21 < len(whole)
    assert {*some} <= {*whole}


def test_a_frontier_of_one_point_is_refused() -> None:
    with pytest.raises(ValueError, match="points=1 must be at least 2"):
        frontier(large(0), 1)


def test_costs_that_fall_with_bits_stay_as_they_are() -> None:
    assert monotone([4, 2, 8, 4], [2.0, 5.0, 1.0, 3.0]) == [2.0, 5.0, 1.0, 3.0]


def test_costs_in_the_wrong_order_are_pooled_to_their_mean() -> None:
    assert monotone([2, 3, 4, 8], [9.0, 2.0, 4.0, 1.0]) == [9.0, 3.0, 3.0, 1.0]
    assert monotone([2, 3, 4], [1.0, 2.0, 6.0]) == [3.0, 3.0, 3.0]


def test_no_other_costs_that_never_rise_are_nearer() -> None:
    draw = random.Random(0)
    for _ in range(100):
        cost = [draw.random() for _ in range(6)]
        fitted = monotone(range(6), cost)
        assert fitted == sorted(fitted, reverse=True)
        distance = sum((f - c) ** 2 for f, c in zip(fitted, cost, strict=True))
        for _ in range(50):
            other = sorted((f + draw.gauss(0, 0.05) for f in fitted), reverse=True)
            assert distance <= sum((o - c) ** 2 for o, c in zip(other, cost, strict=True))


@pytest.mark.parametrize(
    ("sizes", "cost", "message"),
    [([1, 2], [1.0], "not 2 and 1"), ([], [], "not 0 and 0"), ([0.5], [1.0], "whole"), ([-1], [1.0], "0 or more")],
)
def test_a_menu_that_makes_no_sense_is_refused(sizes: list[int], cost: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Menu(sizes, cost)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cost_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(NumericalError, match="must be finite"):
        Menu([1, 2], [bad, 0.0])
