"""The page of `netsuke compare`: size against quality of several checkpoints, and everything they were measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.report.page import Html, note, notices, number, page, section, table
from compress.report.samples import samples
from compress.report.scatter import Dot, scatter
from compress.report.scores import cells, tasks
from compress.report.words import SCORES, Report, digits, finite, model_name, names_of, shared_beginning
from compress.scoring.front import Measure, measures
from compress.tables import size

OF_MODEL = ("perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement")
"""The scores that differ from model to model."""
LEGEND = (
    "Filled: on the front, where nothing beats a model in both. Bars: one standard error. Sizes that differ by a "
    "factor of two, and values that differ by ten, are on a logarithmic axis."
)


def render_comparison(result: Report) -> str:
    """What `netsuke compare` measured, as one HTML file."""
    result = finite(result)
    rows, baseline = sorted(result["models"], key=lambda row: row["bytes"]), result["baseline"]
    names, beginning = _names([row["model"] for row in rows], baseline)
    told = f"Names are shown without “{beginning}”, which all of them begin with." if beginning else ""
    found = measures(result)
    texts = {text["name"] for row in rows for text in row["texts"]}
    charted = [measure for measure in found if measure.of in texts] or found
    others = [row for row in rows if row["model"] != baseline]
    return page(
        title=model_name(baseline) if baseline else f"{len(rows)} checkpoints",
        kicker="netsuke · comparison",
        subtitle=f"{len(others)} checkpoints beside it" if baseline else "side by side",
        verdict=" ".join(_verdict(rows, names, charted[:1])),
        sections=[
            notices([f"{names[row['model']]} was not scored: {row['error']}" for row in rows if "error" in row]),
            *(
                section(f"{measure.name} on {measure.of}", *_measured(measure, rows, names, baseline), note(told))
                for measure in charted
            ),
            section("Tasks", *tasks({names[row["model"]]: row["tasks"] for row in others})),
            section("Samples", *samples({names[row["model"]]: row.get("generation") for row in others})),
        ],
    )


def _names(models: Sequence[str], baseline: str | None) -> tuple[dict[str, str], str]:
    """What each model is called, and what their names begin with, which is left out."""
    names = names_of([model for model in models if model != baseline])
    beginning = shared_beginning([*names.values()])
    return {model: names[model][len(beginning) :] if model in names else "original" for model in models}, beginning


def _verdict(rows: Sequence[Report], names: dict[str, str], found: Sequence[Measure]) -> Iterator[str]:
    """How much there is, and what of it lies on the front of the first measure."""
    sizes = {row["model"]: row["bytes"] for row in rows if "error" not in row}
    if not sizes:
        return
    yield f"{len(sizes)} models from {size(min(sizes.values()))} to {size(max(sizes.values()))}."
    for measure in found:
        *first, last = [names[model].replace("original", "the original") for model in measure.front(sizes)]
        listed = f"{', '.join(first)} and {last}" if first else last
        yield f"Nothing beats {listed} in both size and {measure.name} on {measure.of}."


def _measured(measure: Measure, rows: Sequence[Report], names: dict[str, str], baseline: str | None) -> Iterator[Html]:
    """The chart of one text or task, and a text's table."""
    sizes = {row["model"]: row["bytes"] for row in rows}
    front = measure.front(sizes)
    dots = []
    for model, value in measure.values.items():
        error = measure.errors.get(model, 0.0)
        title = f"{names[model]}: {size(sizes[model])}, {measure.name} {number(value, digits, error).text}"
        dots.append(Dot(sizes[model], value, names[model], title, error, model in front, model == baseline))
    better = "higher is better" if measure.rising else "lower is better"
    yield scatter(dots, "size", f"{measure.name}, {better}", lambda value: size(value).replace(".0 ", " "))
    yield note(LEGEND)
    texts = {row["model"]: text for row in rows for text in row["texts"] if text["name"] == measure.of}
    if not texts:
        return
    columns = ["model", "size", "bits/weight", "format", *(SCORES[key][0] for key in OF_MODEL), "front"]
    lines = []
    for row in rows:
        if text := texts.get(row["model"]):
            held = [number(row["bytes"], size), number(row.get("bits_per_weight"), "{:.2f}"), row["format"]]
            mark = "●" if row["model"] in front else ""
            lines.append([names[row["model"]], *held, *cells(text, OF_MODEL), mark])
    yield table(columns, lines, sortable=True)
    first = next(iter(texts.values()))
    yield note(f"{first['tokens']:,} tokens in windows of {first['context']:,}.")
