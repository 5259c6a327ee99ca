"""What segments did, on the page: the shape that each left, and how trainings went."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.chart import curves
from compress.report.page import Html, Number, note, table
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
        told = found.get("removed") or found.get("kept") or ""
        parameters, total = found["parameters"], found["bytes"]
        rows.append([found["stage"], Number(parameters, f"{parameters:,}"), Number(total, size(total)), told])
    return table(["after", "parameters", "bytes", ""], rows)


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
