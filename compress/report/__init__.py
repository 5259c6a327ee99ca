"""The report of a run: report.json for scripts, report.html for people, a few lines for the terminal.

All three come from one dict, the one `compress.run` returns. A number that is not finite is null in the JSON
and absent elsewhere. What did not go as the recipe asked (a gate missed, a layer that fell back on another
method) is said at the top. `compress.report.words` finds the words, `compress.report.page` draws the elements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from compress.errors import writing
from compress.progress import duration
from compress.report import segments
from compress.report.chart import Point, trade_off
from compress.report.comparison import render_comparison
from compress.report.page import (
    Html,
    Number,
    Square,
    bars,
    code,
    facts,
    figures,
    fold,
    heat_map,
    note,
    notices,
    number,
    page,
    section,
    table,
)
from compress.report.scores import scores
from compress.report.words import (
    Report,
    alarms,
    digits,
    exported,
    finite,
    gate_said,
    layers,
    measures,
    model_name,
    percent,
    said,
    texts,
    verdict,
    verified,
)
from compress.tables import size

__all__ = ["finite", "render", "render_comparison", "render_scores", "summary_lines", "write"]


def write(report: Report, folder: Path) -> None:
    """Write report.json and report.html into `folder`."""
    text = json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    with writing(folder):
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The report as one HTML file that needs no other."""
    report = finite(report)
    return page(
        title=model_name(report["model"]),
        kicker="netsuke · compression report",
        subtitle=report["recipe_name"],
        verdict=verdict(report),
        sections=[
            notices(alarms(report)),
            figures(dict(_figures(report))),
            section("Size", _sizes(report)),
            *scores(report.get("evaluation"), report.get("evaluation_note")),
            section("Gates", _gates(report.get("gates") or [])),
            section("Shape", segments.shapes(report), segments.candidates(report)),
            section("Training", *segments.trainings(report)),
            section("Bits", *_allocation(report)),
            section("KV cache", *_cache(report)),
            section("Error by layer", *_errors(report)),
            section("Time", _times(report)),
            section("Run", facts(dict(_facts(report)))),
            section("Recipe", code(report["recipe"])),
        ],
    )


def render_scores(result: Report) -> str:
    """What `netsuke eval` measured, as one HTML file."""
    result = finite(result)
    baseline = result.get("baseline")
    return page(
        title=model_name(result["model"]),
        kicker="netsuke · scores",
        subtitle=f"against {model_name(baseline)}" if baseline else "on its own",
        verdict=" ".join(map(said, result["texts"])),
        sections=scores(result),
    )


def summary_lines(report: Report) -> list[tuple[str, str]]:
    """What the terminal shows when a run is done: names and values."""
    report = finite(report)
    before, after = report["bytes_before"], report["bytes_after"]
    lines = [
        ("model", model_name(report["model"])),
        ("recipe", report["recipe_name"]),
        ("size", f"{size(before)} → {size(after)} ({after / before:.0%})"),
    ]
    first, last = report.get("parameters_before"), report.get("parameters_after")
    if first and last and last < first:
        lines.append(("parameters", f"{first:,} → {last:,} ({last / first:.0%})"))
    if bits := report.get("bits_per_weight"):
        lines.append(("bits per weight", f"{bits:.2f} in the quantized layers"))
    lines += [(text["name"], ", ".join(measures(text))) for text in texts(report)]
    if not report.get("evaluation") and report.get("evaluation_note"):
        lines.append(("not scored", report["evaluation_note"]))
    lines += [(f"gate {gate['name']}", gate_said(gate)) for gate in report.get("gates") or ()]
    written = [export for export in report.get("exports") or () if not export.get("error")]
    lines += [("also", f"{Path(export['output']).name}: {exported(export)}") for export in written]
    lines += [
        ("verified", verified(report)),
        ("time", duration(report["seconds"])),
        ("peak memory", size(report["peak_memory_bytes"])),
    ]
    lines += [("note", note) for note in report.get("notes") or ()]
    lines += [("warning", alarm) for alarm in alarms(report)]
    return [(name, value) for name, value in lines if value]


# ---- size and gates ---------------------------------------------------------------------------------------


def _figures(report: Report) -> Iterator[tuple[str, str]]:
    yield "smaller", f"{report['bytes_before'] / report['bytes_after']:.2f}×"
    if bits := report.get("bits_per_weight"):
        yield "bits per weight", f"{bits:.2f}"
    first = next(iter(texts(report)), {})
    if (ratio := first.get("perplexity_ratio")) is not None:
        yield "perplexity ratio", f"{ratio:.3f}"
    if (divergence := first.get("kl_divergence")) is not None:
        yield "KL divergence", digits(divergence)
    if (agreement := first.get("top1_agreement")) is not None:
        yield "same top token", f"{agreement:.1%}"
    yield "time", duration(report["seconds"])


def _sizes(report: Report) -> Html:
    before, after = report["bytes_before"], report["bytes_after"]
    return bars([("before", before, size(before)), ("after", after, size(after))], accented=1)


def _gates(gates: Sequence[Report]) -> Html:
    rows = [
        [
            gate["name"],
            number(gate["limit"], "{:g}"),
            number(gate["value"], "{:.4g}"),
            {True: "met", False: "not met", None: "not measured"}[gate["met"]],
        ]
        for gate in gates
    ]
    missed = [index for index, gate in enumerate(gates) if gate["met"] is False]
    return table(["gate", "limit", "measured", ""], rows, marked=missed)


def _allocation(report: Report) -> Iterator[Html]:
    """What an allocator saw: the trade-off, the choice it made, and the bits of each layer."""
    found = report.get("allocation")
    if not found:
        return
    uniform = [f"{each['bits']} bits throughout" for each in found["uniform"]]
    yield from _decision(found, uniform, "megabytes of quantized layers", 1e-6, "rounded to nearest")
    rows = [
        [", ".join(unit["layers"]), Number(bits := found["bits"][unit["layers"][0]], str(bits)), *_costs(unit, "bits")]
        for unit in found["sensitivity"]
    ]
    columns = ["layers", "bits", *(f"loss at {bits}" for bits in found["sensitivity"][0]["cost_by_bits"])]
    yield fold("What each choice would lose", table(columns, rows, sortable=True))


def _cache(report: Report) -> Iterator[Html]:
    """The same of the schemes of a KV cache, layer by layer."""
    found = report.get("kv_cache")
    if not found:
        return
    uniform = [f"{each['scheme']} throughout" for each in found["uniform"]]
    yield from _decision(found, uniform, "bytes of a token in the cache", 1.0, "without a window")
    rows = [
        [Number(unit["layer"], str(unit["layer"])), found["schemes"][unit["layer"]], *_costs(unit, "scheme")]
        for unit in found["sensitivity"]
    ]
    columns = ["layer", "scheme", *(f"loss with {scheme}" for scheme in found["sensitivity"][0]["cost_by_scheme"])]
    yield fold("What each scheme would lose", table(columns, rows, sortable=True))


def _decision(found: Report, uniform: Sequence[str], size: str, scale: float, how: str) -> Iterator[Html]:
    """A trade-off of bytes, times `scale`, and divergence; `uniform`: what to call the choices for all units alike."""
    points = [
        Point(each["bytes"] * scale, each["predicted"], name)
        for each, name in zip(found["uniform"], uniform, strict=True)
    ]
    points.append(Point(found["bytes"] * scale, found["measured"][found["taken"]], "chosen", accented=True))
    curve = [(total * scale, cost) for total, cost in found["frontier"]]
    yield trade_off(curve, points, size, f"KL divergence, {how}")
    others = [f"{name} {digits(value)}" for name, value in found["measured"].items()]
    yield note(f"Measured as a whole before the work, KL divergence by {' and '.join(others)}.")


def _costs(unit: Report, of: str) -> list[Number]:
    return [number(cost, "{:.3g}") for cost in unit[f"cost_by_{of}"].values()]


# ---- layers ----------------------------------------------------------------------------------------------


def _errors(report: Report) -> Iterator[Html]:
    """A heat map for every stage that worked on layers, and one table of all layers."""
    roles = report.get("roles") or {}
    working = [stage for stage in report["stages"] if stage["layers"]]
    for stage in working:
        if len(working) > 1:
            yield note(stage["name"])
        yield heat_map(_squares(stage["layers"], roles, report.get("block_of") or {}), "transformer block")
    if not working:
        return
    yield note(
        "Squared error of the layer's output on the calibration text, relative to the output itself; "
        "of its weight where no text was needed. A frame marks a fallback."
    )
    found = list(layers(report))
    rows = [
        [
            layer["name"],
            stage if len(working) > 1 else None,
            roles.get(layer["name"]),
            layer["scheme"],
            Number(layer["error"], percent(layer["error"])),
            layer["fallback"],
        ]
        for stage, layer in found
    ]
    marked = [index for index, (_, layer) in enumerate(found) if layer["fallback"]]
    columns = ["layer", "stage", "role", "scheme", "error", "fallback"]
    yield fold(f"All {len(found)} layers", table(columns, rows, marked=marked, sortable=True))


def _squares(
    found: Sequence[Report], roles: Mapping[str, str], block_of: Mapping[str, int]
) -> dict[str, dict[int, Square]]:
    """role → block → the layer there; of several, like experts, the worst."""
    worst: dict[str, dict[int, Report]] = {}
    for layer in found:
        name = layer["name"]
        if name in roles and name in block_of:
            row = worst.setdefault(roles[name], {})
            row[block_of[name]] = max(row.get(block_of[name], layer), layer, key=_severity)
    return {role: {block: _square(layer) for block, layer in row.items()} for role, row in worst.items()}


def _severity(layer: Report) -> tuple[bool, float]:
    return bool(layer["fallback"]), math.inf if layer["error"] is None else layer["error"]


def _square(layer: Report) -> Square:
    error = percent(layer["error"])
    told = (layer["name"], layer["scheme"], error, layer["fallback"])
    return Square(layer["error"], error, " · ".join(filter(None, told)), marked=bool(layer["fallback"]))


# ---- the run ---------------------------------------------------------------------------------------------


def _times(report: Report) -> Html:
    spent = [(stage["name"], stage["seconds"]) for stage in report["stages"]]
    rest = max(report["seconds"] - sum(seconds for _, seconds in spent), 0.0)
    return bars([(name, seconds, duration(seconds)) for name, seconds in [*spent, ("everything else", rest)]])


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", report["model"]
    if calibration := report.get("calibration"):
        windows = f"{calibration['windows']:,} windows of {calibration['sequence_length']:,}"
        yield "calibration", f"{calibration['dataset']}, {calibration['tokens']:,} tokens in {windows}"
        yield "its hash", calibration["hash"]
    yield "verified", verified(report)
    yield "peak memory", size(report["peak_memory_bytes"])
    for export in report.get("exports") or ():
        if not export.get("error"):
            yield f"also {Path(export['output']).name}", exported(export)
    if notes := report.get("notes"):
        yield "notes", "; ".join(notes)
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items()),
    )
