"""What segments did, on the page: the shape that each left, and how trainings went."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.chart import curves
from compress.report.page import Html, Number, join, note, table
from compress.report.words import Report, digits
from compress.tables import size


def shapes(report: Report) -> Html:
    """Parameters and bytes of the model after each segment."""
    segments = report.get("segments") or []
    if not segments:
        return Html()
    first = Number(report["parameters_before"], f"{report['parameters_before']:,}")
    rows = [["original", first, Number(report["bytes_before"], size(report["bytes_before"])), ""]]
    for found in segments:
        parameters, total = found["parameters"], found["bytes"]
        rows.append([found["stage"], Number(parameters, f"{parameters:,}"), Number(total, size(total)), _told(found)])
    notes = [note(f"{found['stage']}: {told}") for found in segments for told in found.get("notes") or ()]
    return join([table(["after", "parameters", "bytes", ""], rows), *notes])


def _told(found: Report) -> str:
    """What went, or what is left, in a few words."""
    gone = found.get("removed")
    return f"without block {', '.join(map(str, gone))}" if gone else found.get("kept") or ""


def candidates(report: Report) -> Html:
    """What a search for a shape has measured, the chosen one marked; and each choice alone."""
    found = report.get("shape")
    if not found:
        return Html()
    rows = []
    for tried in [*found["alone"], *found["candidates"]]:
        shape = [Number(tried[name], f"{tried[name]:g}") for name in ("removed", "ffn", "heads")]
        share = Number(tried["share"], f"{tried['share']:.1%}")
        timed = [f"{value:.1%}" if (value := tried.get("latency")) is not None else ""]
        guessed, measured = (tried.get(name) for name in ("predicted", "measured"))
        rows.append([*shape, share, *timed, *("" if value is None else digits(value) for value in (guessed, measured))])
    (kind, limit), chosen = found["budget"], len(found["alone"]) + found["chosen"]
    columns = ["blocks removed", "ffn", "heads", "share", "time measured", "KL divergence by parts", "measured"]
    told = (
        f"Shapes within {limit:.1%} of the {kind}, the one taken marked, and what they are made of; fitted on "
        f"{found['fitted']} windows, measured on {found['held_out']} others, before any training."
    )
    return join([note(told), table(columns, rows, marked=[chosen])])


def trainings(report: Report) -> Iterator[Html]:
    """The loss of each training, on the text it saw and on text it did not."""
    for found in report.get("segments") or []:
        if not (curve := found.get("curve")):
            continue
        seen = [(each["step"], each["loss"]) for each in curve if each.get("loss") is not None]
        held_out = [(each["step"], each["held_out"]) for each in curve if each.get("held_out") is not None]
        yield curves({"training": seen, "held out": held_out}, "step", f"loss of {found['stage']}")
        before, after = held_out[0][1], min(loss for _, loss in held_out)
        ended = "; it ended early, as nothing became better" if found["stopped_early"] else ""
        yield note(
            f"{found['stage']}: held-out loss {digits(before)} → {digits(after)} at step {found['best_step']} "
            f"of {found['steps']}, over {found['tokens']:,} tokens{ended}."
        )
