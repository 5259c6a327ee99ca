"""Where the names of points go, so that they cover neither the points nor one another.

Each name is tried around its point, first beside it, then farther out, and takes the place that costs least: covering
other names or sticking out costs most, then points, then distance and lines. A few rounds let early names give way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHARACTER, HEIGHT = 6.7, 15.0
"""The size of a name's letters, in SVG units; generous, as fonts differ."""
RADIUS = 7.0
"""Of what a point takes for itself."""
DISTANCES = (8.0, 16.0, 26.0, 40.0, 56.0, 74.0, 94.0, 120.0)
SIDES = ((1, -1), (1, 0), (1, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (0, 1))
ROUNDS = 6


@dataclass(frozen=True)
class Box:
    """A rectangle, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Its point that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def place(
    points: Sequence[tuple[float, float]], names: Sequence[str], within: Box, obstacles: Sequence[Box] = ()
) -> list[Box]:
    """A box for each point's name. `obstacles`: lines and the like, which a name had better not cover."""
    marks = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    taken: list[Box | None] = [None] * len(points)
    for _ in range(ROUNDS):
        before = list(taken)
        for index, (x, y) in enumerate(points):
            others = [box for place, box in enumerate(taken) if box and place != index]

            def cost(candidate: tuple[float, Box], others: Sequence[Box] = others) -> float:
                distance, box = candidate
                covered = sum(box.overlap(other) for other in others)
                hidden = sum(box.overlap(other) for other in marks)
                crossed = sum(box.overlap(other) for other in obstacles)
                outside = box.area - box.overlap(within)
                return 100 * (covered + outside) + 20 * hidden + 0.4 * crossed + distance

            taken[index] = min(_around(x, y, CHARACTER * len(names[index])), key=cost)[1]
        if taken == before:
            break
    return [box for box in taken if box]


def _around(x: float, y: float, width: float) -> Iterator[tuple[float, Box]]:
    """Distances and boxes of that width, the nearest first."""
    for distance in DISTANCES:
        for across, down in SIDES:
            middle = x + across * (distance + width / 2)
            centre = y + down * (HEIGHT / 2 + (distance if not across or distance > DISTANCES[0] else 0))
            yield distance, Box(middle - width / 2, centre - HEIGHT / 2, middle + width / 2, centre + HEIGHT / 2)
