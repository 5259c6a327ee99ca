"""Size and quality of several checkpoints: points with standard errors, and the front that nothing beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.report.chart import Axis, Frame, Point, named
from compress.report.labels import Box
from compress.report.page import Html, markup

HEIGHT = 420


@dataclass(frozen=True)
class Dot:
    """A checkpoint in the chart."""

    x: float
    y: float
    name: str
    title: str
    """What is shown where a pointer rests on it."""
    error: float = 0.0
    """Standard error of `y`."""
    best: bool = False
    """On the front."""
    original: bool = False


def scatter(dots: Sequence[Dot], x_axis: str, y_axis: str, form: Callable[[float], str]) -> Html:
    """The dots, those on the front joined by stairs, with nothing beyond; `form` writes a size.

    Sizes are logarithmic where they span an octave, qualities where they span a decade and none is below zero.
    """
    if not dots:
        return Html()
    sizes, above = [dot.x for dot in dots], [dot.y for dot in dots if dot.y > 0]
    across = Axis.over(x_axis, sizes, logarithmic=max(sizes) >= 2 * min(sizes), form=form)
    logarithmic = bool(above) and min(dot.y for dot in dots) >= 0 and max(above) >= 10 * min(above)
    low = [dot.y if logarithmic else dot.y - dot.error for dot in dots]
    upwards = Axis.over(y_axis, [*low, *(dot.y + dot.error for dot in dots)], logarithmic=logarithmic)
    frame = Frame(across, upwards, HEIGHT, inset=(28, 28))
    bars = [_bar(frame, dot) for dot in dots if dot.error]
    stairs = [frame.at(dot.x, dot.y) for dot in sorted(dots, key=lambda dot: dot.x) if dot.best]
    walls = [Box(x - 4, top, x + 4, bottom) for x, top, bottom in bars]
    for (x, y), (right, level) in pairwise(stairs):
        walls += [Box(x, y - 1, right, y + 1), Box(right - 1, min(y, level), right + 1, max(y, level))]
    points = [Point(dot.x, dot.y, dot.name, dot.best) for dot in dots]
    whiskers = [
        Html(f'<path class="error" d="M{x - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8"/>\n')
        for x, top, bottom in bars
    ]
    marks = [_mark(frame, dot) for dot in sorted(dots, key=lambda dot: dot.best)]
    return frame.draw([_front(stairs), *whiskers, *named(frame, points, walls), *marks])


def _front(stairs: Sequence[tuple[float, float]]) -> Html:
    path = "".join(
        f"{'H' if place else 'M'}{x:.1f}{'V' if place else ' '}{y:.1f}" for place, (x, y) in enumerate(stairs)
    )
    return Html(f'<path class="front" d="{path}"/>\n' if len(stairs) > 1 else "")


def _bar(frame: Frame, dot: Dot) -> tuple[float, float, float]:
    """The place of an error bar, and its ends; what is below a logarithmic axis is cut off."""
    x, top = frame.at(dot.x, dot.y + dot.error)
    _, bottom = frame.at(dot.x, max(dot.y - dot.error, frame.y.low))
    return x, top, bottom


def _mark(frame: Frame, dot: Dot) -> Html:
    """Filled on the front, hollow elsewhere; the original is a square."""
    x, y = frame.at(dot.x, dot.y)
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    if dot.original:
        shape = f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    return Html(f'<g class="{"best" if dot.best else "beaten"}"><title>{markup(dot.title)}</title>{shape}</g>\n')
