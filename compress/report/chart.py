"""Charts as inline SVG, the vertical axis logarithmic: costs against bytes, losses against steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.report.page import Html, markup

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 280, 64, 40
"""The frame of the chart in SVG units, and the room for the axes' numbers."""
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """A named point; `accented`: the one it is all about."""

    x: float
    y: float
    name: str
    accented: bool = False


def trade_off(curve: Curve, points: Sequence[Point], x_axis: str, y_axis: str) -> Html:
    """A falling curve and points on and beside it; nothing where nothing is above zero."""
    frame = _Frame([*curve, *((point.x, point.y) for point in points)], x_axis, y_axis)
    marks = [_mark(frame, point) for point in points if point.y > 0]
    return frame.draw([_line(frame, sorted(curve)), *marks])


def curves(by_name: Mapping[str, Curve], x_axis: str, y_axis: str) -> Html:
    """Curves, each named at its end, the last one accented; nothing where nothing is above zero."""
    frame = _Frame([point for curve in by_name.values() for point in curve], x_axis, y_axis)
    shown = {name: [(x, y) for x, y in curve if y > 0] for name, curve in by_name.items()}
    drawn: list[str] = []
    for name, curve in shown.items():
        accented = name == [*shown][-1]
        drawn.append(_line(frame, curve, accented))
        drawn += [_mark(frame, Point(*end, name, accented)) for end in curve[-1:]]
    return frame.draw(drawn)


class _Frame:
    """Axes that hold all points above zero."""

    def __init__(self, points: Curve, x_axis: str, y_axis: str) -> None:
        self.points = [(x, y) for x, y in points if y > 0]
        self.x_axis, self.y_axis = x_axis, y_axis
        self.low = math.log10(min((y for _, y in self.points), default=1))
        self.high = math.log10(max((y for _, y in self.points), default=1))
        self.first = min((x for x, _ in self.points), default=0)
        self.last = max((x for x, _ in self.points), default=0)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.first) / ((self.last - self.first) or 1)
        down = (self.high - math.log10(y)) / ((self.high - self.low) or 1)
        return LEFT + 12 + across * (WIDTH - LEFT - 100), 16 + down * (HEIGHT - BOTTOM - 28)

    def draw(self, inside: Sequence[str]) -> Html:
        if not self.points:
            return Html()
        label = f"{markup(self.y_axis)} against {markup(self.x_axis)}"
        drawn = "".join([*self._axes(), *inside])
        return Html(
            f'<div class="scroll"><svg class="chart" role="img" aria-label="{label}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px">\n{drawn}</svg></div>\n'
        )

    def _axes(self) -> Iterator[str]:
        yield f'<path class="axis" d="M{LEFT} 8V{HEIGHT - BOTTOM}H{WIDTH}"/>\n'
        for value in _ticks(self.low, self.high):
            _, y = self.at(self.first, value)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH}"/>\n'
            yield f'<text class="row" x="{LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>\n'
        yield f'<text class="column" x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 8}">{markup(self.x_axis)}</text>\n'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between powers of ten: whole ones, and where there are fewer than two, 2s and 5s too."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for leading in ((1,), (1, 2, 5)):
        found = [float(f"{digit}e{decade}") for decade in decades for digit in leading]
        found = [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]
        if len(found) > 1:
            break
    return found


def _line(frame: _Frame, curve: Curve, accented: bool = False) -> str:
    points = " ".join("{:.1f},{:.1f}".format(*frame.at(x, y)) for x, y in curve if y > 0)
    return f'<polyline class="{"curve accented" if accented else "curve"}" points="{points}"/>\n'


def _mark(frame: _Frame, point: Point) -> str:
    x, y = frame.at(point.x, point.y)
    kind = ' class="accented"' if point.accented else ""
    title = f"<title>{markup(point.name)}: {point.y:.3g}</title>"
    return (
        f'<g{kind}>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{x + 9:.1f}" y="{y - 6:.1f}">{markup(point.name)}</text></g>\n'
    )
