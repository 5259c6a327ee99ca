"""What models write after the same prompts, side by side, and where they part from the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compress.report.page import Html, fold, join, markup, note, number, table
from compress.report.words import Report, num_shared

MANY = 12
"""More texts than these are folded away."""
FIGURES = {
    "identical": ("identical texts", "{:.0%}"),
    "divergence_point": ("tokens in common", "{:g}"),
    "repetition": ("repeated", "{:.1%}"),
    "loops": ("ending in a loop", "{:.0%}"),
}
"""What is shown of a model's texts: the column's name, and how its number is written."""
NOTE = (
    "Greedy, so that each text is the model's only one. Tokens in common: the median over prompts. Repeated: the share "
    "of 4-grams that stood in the same text before. Pale is what is the original's; a rule marks where they part."
)


def samples(by_model: Mapping[str, Report | None]) -> Iterator[Html]:
    """The generations of models by name: what they have in common in figures, and each text."""
    known = {model: found for model, found in by_model.items() if found}
    if not known:
        return
    first = next(iter(known.values()))
    original = {key.removeprefix("baseline_"): value for key, value in first.items() if key.startswith("baseline_")}
    rows = [_figures(model, found) for model, found in (({"original": original} if original else {}) | known).items()]
    yield table(["model", *(name for name, _ in FIGURES.values())], rows)
    yield note(NOTE)
    by_prompt: dict[str, list[tuple[str, Report]]] = {}
    for model, found in known.items():
        for each in found.get("samples") or ():
            by_prompt.setdefault(each["prompt"], []).append((model, each))
    drawn = [_sample(prompt, versions) for prompt, versions in by_prompt.items()]
    shown = max(1, MANY // (1 + len(known)))
    yield join(drawn[:shown])
    if drawn[shown:]:
        yield fold(f"{len(drawn) - shown} more", join(drawn[shown:]))


def _figures(model: str, found: Report) -> list[object]:
    """A row under `FIGURES`."""
    return [model, *(number(found.get(key), form) for key, (_, form) in FIGURES.items())]


def _sample(prompt: str, versions: list[tuple[str, Report]]) -> Html:
    """A prompt and what was written after it, by the original first; it is marked where there is but one other."""
    shown = []
    for model, each in versions:
        text, original = each["text"], each.get("baseline_text")
        if original is None:
            shown.append(_version(model, text))
            continue
        shared = num_shared(text, original)
        if not shown:
            shown.append(_version("original", original, shared if len(versions) == 1 else None))
        told = "the same" if text == original else f"{each['divergence_point']} tokens in common"
        shown.append(_version(model, text, shared, told))
    return Html(f'<figure class="sample">\n<figcaption>{markup(prompt)}</figcaption>\n{join(shown)}</figure>\n')


def _version(name: str, text: str, shared: int | None = None, told: str = "") -> Html:
    """One text, with a rule behind so many characters that are shared."""
    written = markup(text)
    if shared is not None:
        rest = f"<mark>{markup(text[shared:])}</mark>" if text[shared:] else ""
        written = Html(f"<span>{markup(text[:shared])}</span>{rest}")
    return Html(f"<div><h4>{markup(name)} <small>{markup(told)}</small></h4>\n<p>{written}</p></div>\n")
