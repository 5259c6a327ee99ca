"""One chart: costs against bytes, a curve with points on and beside it, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.page import Html, markup

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 280, 64, 40
"""The frame of the chart in SVG units, and the room for the axes' numbers."""


@dataclass(frozen=True)
class Point:
    """A named point; `accented`: the one it is all about."""

    x: float
    y: float
    name: str
    accented: bool = False


def trade_off(curve: Sequence[tuple[float, float]], points: Sequence[Point], x_axis: str, y_axis: str) -> Html:
    """A falling curve and points, the vertical axis logarithmic; nothing where nothing is above zero."""
    shown = [(x, y) for x, y in [*curve, *((point.x, point.y) for point in points)] if y > 0]
    if not shown:
        return Html()
    low, high = math.log10(min(y for _, y in shown)), math.log10(max(y for _, y in shown))
    first, last = min(x for x, _ in shown), max(x for x, _ in shown)
    decades = range(math.ceil(low), math.floor(high) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        down = (high - math.log10(y)) / ((high - low) or 1)
        return LEFT + 12 + across * (WIDTH - LEFT - 100), 16 + down * (HEIGHT - BOTTOM - 28)

    drawn = [f'<path class="axis" d="M{LEFT} 8V{HEIGHT - BOTTOM}H{WIDTH}"/>\n']
    for decade in decades:
        _, y = at(first, 10.0**decade)
        drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH}"/>\n')
        drawn.append(f'<text class="row" x="{LEFT - 8}" y="{y + 4:.1f}">{10.0**decade:g}</text>\n')
    drawn.append(f'<text class="column" x="{(WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 8}">{markup(x_axis)}</text>\n')
    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in sorted(curve) if y > 0)
    drawn.append(f'<polyline class="curve" points="{line}"/>\n')
    for point in (point for point in points if point.y > 0):
        x, y = at(point.x, point.y)
        kind = ' class="accented"' if point.accented else ""
        title = f"<title>{markup(point.name)}: {point.y:.3g}</title>"
        drawn.append(f'<g{kind}>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        drawn.append(f'<text x="{x + 9:.1f}" y="{y - 6:.1f}">{markup(point.name)}</text></g>\n')
    return Html(
        f'<div class="scroll"><svg class="chart" role="img" aria-label="{markup(y_axis)} against {markup(x_axis)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px">\n{"".join(drawn)}</svg></div>\n'
    )
