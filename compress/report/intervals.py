"""Differences and how surely they are known: a dot, its standard error, and the wider one it is set against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.chart import Axis, text
from compress.report.page import Html, join, markup

WIDTH, STEP, RIGHT = 920, 24, 24
"""Of the chart, of a row's height and of the room at the right, in SVG units."""


@dataclass(frozen=True)
class Interval:
    """One row."""

    name: str
    value: float
    narrow: float | None
    """The standard error that is claimed."""
    wide: float | None
    """The one that it improves on."""
    title: str


def intervals(rows: Sequence[Interval], axis: str) -> Html:
    """Rows of a difference each, about a line at zero."""
    if not rows:
        return Html()
    ends = [row.value + side * (row.wide or row.narrow or 0.0) for row in rows for side in (-1, 1)]
    across = Axis.over(axis, [0.0, *ends], logarithmic=False)
    left = 24 + 7.0 * max(len(row.name) for row in rows)
    floor = STEP * len(rows) + 8

    def at(value: float) -> float:
        return left + across.share(value) * (WIDTH - RIGHT - left)

    drawn = []
    for value in across.ticks():
        drawn.append(Html(f'<path class="grid" d="M{at(value):.1f} 4V{floor}"/>\n'))
        drawn.append(text("column", at(value), floor + 18, f"{value:+g}" if value else "0"))
    drawn.append(Html(f'<path class="zero" d="M{at(0):.1f} 4V{floor}"/>\n'))
    for place, row in enumerate(rows):
        y = 4 + STEP * (place + 0.5)
        parts = [f"<title>{markup(row.title)}</title>"]
        for kind, error, height in (("wide", row.wide, 12), ("narrow", row.narrow, 5)):
            if error:
                first, last = at(row.value - error), at(row.value + error)
                parts.append(
                    f'<rect class="{kind}" x="{first:.1f}" y="{y - height / 2:.1f}" width="{last - first:.1f}" '
                    f'height="{height}" rx="2"/>'
                )
        parts.append(f'<circle cx="{at(row.value):.1f}" cy="{y:.1f}" r="4"/>')
        drawn.append(Html(f"<g>{''.join(parts)}</g>\n"))
        drawn.append(text("row", left - 16, y + 4, row.name))
    drawn.append(text("name end", WIDTH - RIGHT, floor + 36, axis))
    return Html(
        f'<div class="scroll"><svg class="chart intervals" role="img" aria-label="{markup(axis)}" '
        f'viewBox="0 0 {WIDTH} {floor + 42}" style="max-width:{WIDTH}px">\n{join(drawn)}</svg></div>\n'
    )
