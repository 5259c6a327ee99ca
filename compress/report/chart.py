"""Charts as inline SVG: axes, the trade-off of costs against bytes, curves of losses against steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.report.labels import CHARACTER, RADIUS, Box, place
from compress.report.page import Html, join, markup

WIDTH, HEIGHT = 920, 320
"""Of a chart, in SVG units."""
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 46
"""The room around its points, for the axes' names and numbers."""
ZERO = 0.1
"""The share of a logarithmic axis that is kept for zero, where there is one."""
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; a logarithmic one has a place of its own for `zero`, below a gap."""

    name: str
    low: float
    high: float
    logarithmic: bool = False
    zero: bool = False
    form: Callable[[float], str] = "{:g}".format

    @classmethod
    def over(
        cls,
        name: str,
        values: Iterable[float],
        *,
        logarithmic: bool,
        form: Callable[[float], str] = "{:g}".format,
    ) -> Axis:
        """An axis that holds all values; for a logarithmic one none is below zero."""
        values = list(values)
        above = [value for value in values if value > 0]
        if logarithmic:
            return cls(name, min(above, default=1.0), max(above, default=1.0), True, min(values, default=1) <= 0, form)
        return cls(name, min(values, default=0.0), max(values, default=1.0), form=form)

    def share(self, value: float) -> float:
        """Where a value lies, 0…1; of a logarithmic axis, what is below its lowest lies at zero."""
        if not self.logarithmic:
            return (value - self.low) / ((self.high - self.low) or 1)
        if value < self.low:
            return 0.0
        gap = ZERO if self.zero else 0.0
        return gap + (1 - gap) * math.log(value / self.low) / (math.log(self.high / self.low) or 1)

    def ticks(self) -> list[float]:
        """Round numbers along it: of a logarithmic one powers of ten, with others between where those are too few."""
        span = self.high - self.low
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for leading in ((1,), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
                found = [float(f"{digit}e{decade}") for decade in decades for digit in leading]
                found = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
                if len(found) > 2:
                    break
            if len(found) > 1:
                return [0.0] * self.zero + found
        if not span:
            return [self.low]
        power = 10 ** math.floor(math.log10(span / 3))
        step = max(step for step in (power, 2 * power, 5 * power) if step <= span / 3)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [0.0] * self.zero + [float(f"{place * step:.9g}") for place in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """Two axes, and the rectangle between them."""

    x: Axis
    y: Axis
    height: int = HEIGHT
    inset: tuple[float, float] = (12, 12)
    """The distance of the outermost points from the axes and from the far edges."""

    def at(self, x: float, y: float) -> tuple[float, float]:
        (near, far), floor = self.inset, self.height - BOTTOM
        across = LEFT + near + self.x.share(x) * (WIDTH - LEFT - RIGHT - near - far)
        return across, floor - 12 - self.y.share(y) * (floor - TOP - 24)

    @property
    def inside(self) -> Box:
        return Box(LEFT + 2, TOP - 12, WIDTH, self.height - BOTTOM - 1)

    def draw(self, inside: Iterable[Html]) -> Html:
        label = markup(f"{self.y.name} against {self.x.name}")
        return Html(
            f'<div class="scroll"><svg class="chart" role="img" aria-label="{label}" '
            f'viewBox="0 0 {WIDTH} {self.height}" style="max-width:{WIDTH}px">\n'
            f"{join([*self._axes(), *inside])}</svg></div>\n"
        )

    def _axes(self) -> Iterator[Html]:
        floor = self.height - BOTTOM
        for value in self.y.ticks():
            _, y = self.at(self.x.low, value)
            yield Html(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>\n')
            yield text("row", LEFT - 8, y + 4, self.y.form(value))
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            yield Html(f'<path class="tick" d="M{x:.1f} {floor}v4"/>\n')
            yield text("column", x, floor + 18, self.x.form(value))
        bottom: float = floor
        if self.y.logarithmic and self.y.zero:  # the axis is broken between its lowest value and zero
            bottom = (self.at(self.x.low, self.y.low)[1] + self.at(self.x.low, 0.0)[1]) / 2 - 4
            yield Html(f'<path class="axis" d="M{LEFT} {bottom + 8:.1f}V{floor}"/>\n')
        yield Html(f'<path class="axis" d="M{LEFT} {TOP - 8}V{bottom:.1f}M{LEFT} {floor}H{WIDTH - RIGHT}"/>\n')
        yield text("name", 0, 13, self.y.name)
        yield text("name end", WIDTH - RIGHT, self.height - 8, self.x.name)


def text(kind: str, x: float, y: float, words: object) -> Html:
    return Html(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{markup(words)}</text>\n')


@dataclass(frozen=True)
class Point:
    """A named point; `accented`: the one it is all about."""

    x: float
    y: float
    name: str
    accented: bool = False


def trade_off(curve: Curve, points: Sequence[Point], x_axis: str, y_axis: str) -> Html:
    """A falling curve and points on and beside it, costs logarithmic; nothing where nothing is above zero."""
    frame = _over([*curve, *((point.x, point.y) for point in points)], x_axis, y_axis)
    return frame.draw([line(frame, sorted(curve)), *_marks(frame, points)]) if frame else Html()


def curves(by_name: Mapping[str, Curve], x_axis: str, y_axis: str) -> Html:
    """Curves, losses logarithmic, each named at its end, the last accented; nothing where nothing is above zero."""
    frame = _over([point for curve in by_name.values() for point in curve], x_axis, y_axis, names=by_name)
    if not frame:
        return Html()
    shown = {name: [(x, y) for x, y in curve if y > 0] for name, curve in by_name.items()}
    last = [*shown][-1]
    ends = [Point(*curve[-1], name, name == last) for name, curve in shown.items() if curve]
    return frame.draw([*(line(frame, curve, name == last) for name, curve in shown.items()), *_marks(frame, ends)])


def _over(points: Curve, x_axis: str, y_axis: str, *, names: Iterable[str] = ()) -> Frame | None:
    """The frame of all points above zero, with room for names behind the last; None where there are no such points."""
    points = [(x, y) for x, y in points if y > 0]
    if not points:
        return None
    across = Axis.over(x_axis, [x for x, _ in points], logarithmic=False)
    upwards = Axis.over(y_axis, [y for _, y in points], logarithmic=True)
    return Frame(across, upwards, inset=(12, 12 + CHARACTER * max(map(len, names), default=0)))


def line(frame: Frame, curve: Curve, accented: bool = False) -> Html:
    points = " ".join("{:.1f},{:.1f}".format(*frame.at(x, y)) for x, y in curve if y > 0)
    return Html(f'<polyline class="{"curve accented" if accented else "curve"}" points="{points}"/>\n')


def _marks(frame: Frame, points: Sequence[Point]) -> Iterator[Html]:
    points = [point for point in points if point.y > 0]
    yield from named(frame, points)
    for point in points:
        x, y = frame.at(point.x, point.y)
        title = f"<title>{markup(point.name)}: {point.y:.3g}</title>"
        yield Html(f'<g{kind(point.accented)}>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>\n')


def named(frame: Frame, points: Sequence[Point], obstacles: Sequence[Box] = ()) -> Iterator[Html]:
    """The names of points, where they cover least, a thin line to those that had to go farther."""
    places = [frame.at(point.x, point.y) for point in points]
    boxes = place(places, [point.name for point in points], frame.inside, obstacles)
    for point, (x, y), box in zip(points, places, boxes, strict=True):
        near, level = box.nearest(x, y)
        if math.dist((x, y), (near, level)) > 2 * RADIUS:
            yield Html(f'<path class="leader" d="M{x:.1f} {y:.1f}L{near:.1f} {level:.1f}"/>\n')
        yield Html(
            f"<g{kind(point.accented)}>{text('label', (box.left + box.right) / 2, box.bottom - 4, point.name)}</g>\n"
        )


def kind(accented: bool) -> str:
    return ' class="accented"' if accented else ""
