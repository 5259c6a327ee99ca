"""What models scored, on the page: texts, and tasks beside the original's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from compress.report.intervals import Interval, intervals
from compress.report.page import Html, Number, fold, heading, join, note, number, section, table
from compress.report.samples import samples
from compress.report.words import SCORES, Report, model_name
from compress.scoring.tasks import Metric, metrics_of

ERRORS = {"perplexity_ratio": "perplexity_ratio_standard_error", "kl_divergence": "kl_standard_error"}
"""A score of a text → its standard error."""
MANY = 4
"""Charts of more tasks than these are folded away."""
LONG = 24
"""A table of more rows than these is folded away."""


def scores(scored: Report | None, reason: str | None = None) -> list[Html]:
    """The sections of one model's scores; why there are none, where nothing was scored."""
    if not scored:
        return [section("Scores", note(f"Not scored: {reason}"))] if reason else []
    rows = [[text["name"], *cells(text, SCORES)] for text in scored["texts"]]
    known = any(text.get("kl_standard_error") for text in scored["texts"])
    return [
        section(
            "Scores",
            table(["text", *(name for name, _ in SCORES.values())], rows),
            note("After ±: one standard error, windows taken as the samples." if known else ""),
        ),
        section("Tasks", *tasks({"": scored.get("tasks") or {}})),
        section("Samples", *samples({model_name(scored["model"]): scored.get("generation")})),
    ]


def cells(text: Report, keys: Iterable[str]) -> list[Number]:
    """Some of a text's scores, with the standard errors that are known."""
    return [number(text.get(key), SCORES[key][1], text.get(ERRORS.get(key, ""))) for key in keys]


# ---- tasks -----------------------------------------------------------------------------------------------

PAIRED = (
    "Differences from the original, question by question; the narrow bar is one standard error of their mean. The pale "
    "one is what it would be, had the two models been asked different questions."
)
TASKS = ("task", "model", "metric", "value", "original", "difference", "± paired", "± unpaired", "flips", "to wrong")


def tasks(by_model: Mapping[str, Mapping[str, Report]]) -> Iterator[Html]:
    """The tasks of one model, or of several by name: what changed as a chart, and all there is as a table."""
    rows = []
    drawn: dict[str, list[Interval]] = {}
    for task in dict.fromkeys(task for scored in by_model.values() for task in scored):
        for model, scored in by_model.items():
            found = metrics_of(scored.get(task, {}))
            rows += [[task, model, *_cells(metric, scored[task])] for metric in found]
            if found and found[0].difference is not None:
                drawn.setdefault(task if model else "", []).append(_interval(model or task, found[0]))
    drawn = {task: lines for task, lines in drawn.items() if any(line.value or line.narrow for line in lines)}
    charts = [join([heading(task), intervals(lines, "difference")]) for task, lines in drawn.items()]
    yield note(PAIRED if charts else "")
    yield join(charts[:MANY])
    if charts[MANY:]:
        yield fold(f"{len(charts) - MANY} more", join(charts[MANY:]))
    listed = table(TASKS, rows, sortable=True)
    yield fold(f"All {len(rows)} results", listed) if len(rows) > LONG else listed


def _cells(metric: Metric, scores: Report) -> list[object]:
    counts = [scores.get(key) if metric.difference is not None else None for key in ("flips", "flips_to_wrong")]
    flips, to_wrong = (number(count, "{:,}") for count in counts)
    if flips.value is not None and scores.get("questions"):
        flips = Number(flips.value, f"{flips.text} of {scores['questions']:,}")
    return [
        metric.name,
        number(metric.value, "{:.4f}", metric.error),
        number(metric.baseline, "{:.4f}"),
        number(metric.difference, "{:+.4f}"),
        number(metric.paired, "{:.4f}"),
        number(metric.unpaired, "{:.4f}"),
        flips,
        to_wrong,
    ]


def _interval(name: str, metric: Metric) -> Interval:
    value = metric.difference or 0.0
    known = ((metric.paired, "paired"), (metric.unpaired, "unpaired"))
    errors = "".join(f", ± {error:.4f} {how}" for error, how in known if error is not None)
    return Interval(name, value, metric.paired, metric.unpaired, f"{name}: {metric.name} {value:+.4f}{errors}")
