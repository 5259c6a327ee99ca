"""Selectors: the one language in which a recipe names layers.

A selector is tried as each of these in turn, and the first that matches any layer decides:

    model.layers.3.mlp.down_proj     exact module path
    re:.*\\.[0-3]\\.mlp\\..*            regular expression over the whole path
    *.down_proj   attn.*             glob over the whole path or the whole role (`*` crosses dots)
    attn.q   attn                    role, or the first words of roles: `attn` is every `attn.…`
    Linear                           class name

Nothing ever matches a *part* of a name. With substrings, `mlp.gate`, written to keep a mixture's router in
full precision, also finds `mlp.gate_proj`; its partner `mlp.up_proj` is still quantized, a serving engine
that runs the two as one matrix refuses the checkpoint, and hours of work are lost to one missing underscore.
Whoever wants a part of a name says so with `*`. And because a selector that matches nothing is always a
mistake, `select` reports each with the nearest selector that would match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class LayerName:
    """Everything a selector may refer to in one layer."""

    name: str
    """Full module path, `model.layers.3.mlp.down_proj`."""
    role: str
    """What the layer does: `attn.q`, `mlp.down`, `expert`, `lm_head`, `embedding`."""
    kind: str
    """Class name: `Linear`, `Conv1D`, `Embedding`."""


def match(selector: str, layers: Sequence[LayerName]) -> list[str]:
    """Paths of the layers that `selector` names, in their order. Raises ValueError for a broken pattern."""
    for matches in _readings(selector):
        if names := [layer.name for layer in layers if matches(layer)]:
            return names
    return []


def select(selectors: Iterable[str], layers: Sequence[LayerName]) -> tuple[dict[str, list[str]], list[str]]:
    """Names by selector for those that match, and one sentence for each selector that does not."""
    names_by_selector: dict[str, list[str]] = {}
    problems: list[str] = []
    for selector in selectors:
        try:
            names = match(selector, layers)
        except ValueError as error:
            problems.append(str(error))
            continue
        if names:
            names_by_selector[selector] = names
        else:
            problems.append(f"{selector!r} matches no layer.{_advice(selector, layers)}")
    return names_by_selector, problems


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, if there is one."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence to append to a complaint about `word`, empty where nothing is near."""
    found = closest(word, known)
    return f" Did you mean {found!r}?" if found else ""


def _readings(selector: str) -> Iterator[Callable[[LayerName], bool]]:
    yield lambda layer: layer.name == selector
    if selector.startswith("re:"):
        pattern = _compiled(selector)
        yield lambda layer: pattern.fullmatch(layer.name) is not None
    elif any(sign in selector for sign in "*?["):
        yield lambda layer: fnmatchcase(layer.name, selector) or fnmatchcase(layer.role, selector)
    else:
        yield lambda layer: layer.role == selector or layer.role.startswith(f"{selector}.")
        yield lambda layer: layer.kind == selector


def _compiled(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"{selector!r} is not a regular expression: {error}.") from error


def _advice(selector: str, layers: Sequence[LayerName]) -> str:
    if selector.startswith("re:"):
        pattern = _compiled(selector)
        found = next((layer.name for layer in layers if pattern.search(layer.name)), None)
        return f" A pattern must match the whole path, and this one matches a part of {found!r}." if found else ""
    return did_you_mean(selector, _vocabulary(layers))


def _vocabulary(layers: Sequence[LayerName]) -> set[str]:
    """Selectors that match something."""
    words: set[str] = set()
    for layer in layers:
        words |= {layer.name, layer.kind, layer.role, layer.role.partition(".")[0]}
        parent, _, last = layer.name.rpartition(".")
        if parent:
            words |= {f"{parent}.*", f"*.{last}"}
    return words
