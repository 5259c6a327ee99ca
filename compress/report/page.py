"""The elements of a report's page: one HTML file that needs nothing but a browser.

This module knows tables, bars and heat maps, not what a run is; `compress.report` decides what is shown.
Every function takes plain values and returns `Html`. What is not `Html` yet is escaped by `markup` on its way
in, so a layer's name can never become a tag. The style and the script stand beside this file and are written
into the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


class Html(str):
    """Markup, escaped already."""

    __slots__ = ()


@dataclass(frozen=True)
class Number:
    """A table cell that sorts by its value; None, nothing to show, sorts last."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Square:
    """One square of a heat map."""

    value: float | None
    """None: nothing was measured."""
    label: str
    title: str
    marked: bool = False


def markup(value: object) -> Html:
    """`value` as markup: itself if it is markup, else its escaped text; None is empty."""
    if isinstance(value, Html):
        return value
    return Html("" if value is None else escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(markup, parts)))


# ---- the page --------------------------------------------------------------------------------------------

SEAL = """<svg class="seal" viewBox="0 0 40 40" aria-hidden="true"><rect width="40" height="40" rx="9"/>
<circle cx="14" cy="20" r="3.6"/><circle cx="26" cy="20" r="3.6"/></svg>"""
"""A button netsuke, with the two holes that its cord runs through."""


def page(*, title: str, kicker: str, subtitle: str, verdict: str, sections: Iterable[Html]) -> str:
    """A whole document."""
    here = Path(__file__)
    style = here.with_suffix(".css").read_text(encoding="utf-8")
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{markup(title)} · {markup(subtitle)}</title>
<style>
{style}</style>
</head>
<body>
<header>
{SEAL}
<p class="kicker">{markup(kicker)}</p>
<h1>{markup(title)}</h1>
<p class="subtitle">{markup(subtitle)}</p>
</header>
<main>
<p class="verdict">{markup(verdict)}</p>
{join(sections)}</main>
<script>
{script}</script>
</body>
</html>
"""


def section(heading: str, *parts: Html) -> Html:
    """A headed part of the page, or nothing where all its parts are empty."""
    return Html(f"<section>\n<h2>{markup(heading)}</h2>\n{join(parts)}</section>\n") if any(parts) else Html()


def heading(text: object) -> Html:
    """Of a part of a section; nothing for no text."""
    return Html(f"<h3>{markup(text)}</h3>\n" if text else "")


def note(text: object) -> Html:
    return Html(f'<p class="note">{markup(text)}</p>\n' if text else "")


def notices(texts: Sequence[str]) -> Html:
    """What the reader must not miss, or nothing; a long list folds its end away."""
    items = [Html(f"<li>{markup(text)}</li>\n") for text in texts]
    first, rest = items[:6], items[6:]
    if rest:
        first.append(Html(f"<li>{fold(f'{len(rest)} more', Html(f'<ul>{join(rest)}</ul>'))}</li>\n"))
    return Html(f'<ul class="notices">\n{join(first)}</ul>\n') if texts else Html()


def figures(values: Mapping[str, str]) -> Html:
    """Big numbers side by side, each over its caption."""
    return _pairs("figures", values, "<div><dt>{}</dt><dd>{}</dd></div>\n")


def facts(values: Mapping[str, object]) -> Html:
    """Names and values, one pair a line."""
    return _pairs("facts", values, "<dt>{}</dt><dd>{}</dd>\n")


def _pairs(kind: str, values: Mapping[str, object], form: str) -> Html:
    """A definition list of the pairs that have a value."""
    lines = "".join(form.format(markup(name), markup(value)) for name, value in values.items() if value)
    return Html(f'<dl class="{kind}">\n{lines}</dl>\n' if lines else "")


def code(text: str) -> Html:
    return Html(f"<pre><code>{markup(text)}</code></pre>\n")


def fold(summary: str, content: Html) -> Html:
    """Content that unfolds on a click."""
    return Html(f"<details>\n<summary>{markup(summary)}</summary>\n{content}</details>\n")


# ---- tables and bars -------------------------------------------------------------------------------------


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    marked: Iterable[int] = (),
    sortable: bool = False,
) -> Html:
    """A table without its empty columns; rows in `marked` stand out."""
    kept = [index for index in range(len(columns)) if any(_text(row[index]) for row in rows)]
    if not kept:
        return Html()
    inner = "<button>{}</button>" if sortable else "{}"
    head = "".join(
        f'<th scope="col"{_number_class(rows[0][index])}>{inner.format(markup(columns[index]))}</th>' for index in kept
    )
    strong = set(marked)
    body = "".join(
        f"<tr{_class('marked', place in strong)}>{''.join(_cell(row[index]) for index in kept)}</tr>\n"
        for place, row in enumerate(rows)
    )
    return Html(
        f'<div class="scroll"><table{_class("sortable", sortable)}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def number(value: float | None, form: Callable[[float], str] | str, error: float | None = None) -> Number:
    """A cell that sorts by its value, a standard error behind it to the same place; empty for None."""
    if value is None:
        return Number(None, "")
    text = form.format(value) if isinstance(form, str) else form(value)
    places = len(text.partition(".")[2])
    return Number(
        value, text if not error else f"{text} ± {error:.{places}f}" if "e" not in text else f"{text} ± {error:.1e}"
    )


def bars(rows: Sequence[tuple[str, float, str]], *, accented: int | None = None) -> Html:
    """Horizontal bars from (name, length, label), to one scale; row `accented` stands out."""
    longest = max((length for _, length, _ in rows), default=0) or 1
    lines = "".join(
        f'<tr{_class("accented", place == accented)}><th scope="row">{markup(name)}</th>'
        f'<td><i style="width:{100 * length / longest:.2f}%"></i></td><td>{markup(label)}</td></tr>\n'
        for place, (name, length, label) in enumerate(rows)
    )
    return Html(f'<table class="bars"><tbody>\n{lines}</tbody></table>\n')


def _cell(value: object) -> str:
    key = f' data-key="{value.value:.9g}"' if isinstance(value, Number) and value.value is not None else ""
    return f"<td{_number_class(value)}{key}>{markup(_text(value))}</td>"


def _text(value: object) -> object:
    return value.text if isinstance(value, Number) else value


def _number_class(value: object) -> str:
    return _class("number", isinstance(value, Number))


def _class(name: str, holds: bool) -> str:
    return f' class="{name}"' if holds else ""


# ---- the heat map ----------------------------------------------------------------------------------------

WIDTH, GUTTER, HEIGHT = 720, 96, 30
"""All squares of a row, the names left of them, and one row's height, in SVG units."""
LEGIBLE = 40
"""A square at least this wide carries its label."""


def heat_map(rows: Mapping[str, Mapping[int, Square]], axis: str) -> Html:
    """Rows of squares over numbered columns, shaded by the logarithm of their value."""
    columns = sorted({column for row in rows.values() for column in row})
    if not columns:
        return Html()
    step = min(WIDTH / 6, WIDTH / len(columns))
    shades = _shades([square.value for row in rows.values() for square in row.values()])
    width, height = GUTTER + step * len(columns), HEIGHT * len(rows)
    left = {column: GUTTER + step * place for place, column in enumerate(columns)}
    drawn = [_label("axis", GUTTER, height + 34, axis)]
    for column in columns[:: math.ceil(len(columns) / 24)]:
        drawn.append(_label("column", left[column] + step / 2, height + 16, column))
    for line, (name, row) in enumerate(rows.items()):
        drawn.append(_label("row", GUTTER - 12, HEIGHT * (line + 0.5) + 4, name))
        for column, square in row.items():
            drawn.append(_square(square, shades, left[column], HEIGHT * line, step))
    return Html(
        f'<div class="scroll"><svg class="heat" role="img" aria-label="{markup(axis)}" '
        f'viewBox="0 0 {width:.0f} {height + 40}" style="max-width:{width:.0f}px;min-width:{min(width, 520):.0f}px">\n'
        f"{''.join(drawn)}</svg></div>\n"
    )


def _square(square: Square, shades: Mapping[float | None, float], x: float, y: float, step: float) -> str:
    shade = shades[square.value]
    gap = min(2.0, step / 8)
    label = _label("value", x + step / 2, y + HEIGHT / 2 + 4, square.label) if step >= LEGIBLE else ""
    return (
        f"<g{_class('marked', square.marked)}><title>{markup(square.title)}</title>"
        f'<rect x="{x + gap / 2:.1f}" y="{y + 1:.0f}" width="{step - gap:.1f}" height="{HEIGHT - 2}" rx="2" '
        f'fill-opacity="{shade:.3f}"/>{label}</g>\n'
    )


def _label(kind: str, x: float, y: float, text: object) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.0f}">{markup(text)}</text>\n'


def _shades(values: Iterable[float | None]) -> dict[float | None, float]:
    """How strongly to lay on the accent, 0…1, by value: by its logarithm, from the least to the greatest.

    The scale spans at least a factor of four, so that values which hardly differ look alike.
    """
    known = {value for value in values if value is not None}
    logs = {value: math.log(value) for value in known if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    spread = max(high - low, math.log(4))
    shades: dict[float | None, float] = {None: 0.0, **dict.fromkeys(known, 0.04)}
    for value, log in logs.items():
        shades[value] = 0.08 + 0.92 * (log - low) / spread
    return shades
