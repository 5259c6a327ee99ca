"""Names of points: where they go, and that they leave each other alone."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from compress.report.labels import RADIUS, Box, place

FRAME = Box(64, 18, 920, 374)


def test_a_name_stands_beside_its_point() -> None:
    (box,) = place([(400, 200)], ["w4a16"], FRAME)
    near, level = box.nearest(400, 200)
    assert RADIUS < near - 400 < 2 * RADIUS
    assert abs(level - 200) < RADIUS


def test_a_name_at_the_far_edge_stands_on_the_inner_side() -> None:
    (box,) = place([(910, 200)], ["w4a16-gptq"], FRAME)
    assert box.right < 910


@pytest.mark.parametrize("seed", range(20))
def test_names_cover_neither_each_other_nor_points_and_stay_inside(seed: int) -> None:
    """Twelve points in a third of the frame, as sizes and qualities of checkpoints lie."""
    draw = random.Random(seed)
    points = [(draw.uniform(100, 400), draw.uniform(60, 340)) for _ in range(12)]
    names = ["w" * draw.randint(3, 14) for _ in points]
    boxes = place(points, names, FRAME)
    assert [pair for pair in combinations(boxes, 2) if pair[0].overlap(pair[1])] == []
    assert [box for box in boxes if box.overlap(FRAME) < box.area - 1e-6] == []
    assert [(box, point) for box in boxes for point in points if box.nearest(*point) == point] == []


def test_names_of_points_that_coincide_are_told_apart() -> None:
    boxes = place([(300, 200)] * 4, ["rtn", "gptq", "awq", "hqq"], FRAME)
    assert not any(one.overlap(other) for one, other in combinations(boxes, 2))


def test_a_name_gives_way_to_a_line() -> None:
    line = Box(400, 199, 700, 201)
    (box,) = place([(400, 200)], ["w4a16"], FRAME, [line])
    assert box.overlap(line) == 0
