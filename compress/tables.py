"""What the command line shows a person: plain data in, rich renderables out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.scoring.tasks import metrics_of

BENCHED = {
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "writing, tokens/s",
    "weights_bytes": "weights",
    "peak_memory_bytes": "memory at the peak",
}
SCORED = ("perplexity", "× baseline", "KL divergence", "same top token")
"""Columns of a text."""
ANSWERED = ("metric", "value", "± standard error", "difference", "± paired", "± unpaired", "flips")
"""Columns of a task."""


def size(count: float) -> str:
    """Bytes as a person says them: `12.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """One line per role, since blocks repeat themselves; totals below."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for layer in plan["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        group = "" if layer["scheme"] is None else str(layer["group_size"] or "channel")
        key = (layer["role"], shape, layer["action"], layer["scheme"] or "", group, layer["reason"])
        count = rows.setdefault(key, [0, 0, 0])
        count[0] += 1
        count[1] += layer["bytes_before"]
        count[2] += layer["bytes_after"]
    table = _table("role", "layers", "shape", "action", "scheme", "group", "before", "after", "why")
    for (role, shape, action, scheme, group, reason), (number, before, after) in rows.items():
        table.add_row(role, str(number), shape, action, scheme, group, size(before), size(after), reason)
    saved = plan["bytes_after"] / plan["bytes_before"]
    bits = f", {plan['bits_per_weight']:.2f} bits per quantized weight" if plan["bits_per_weight"] else ""
    fewer = plan["parameters_after"] < plan["parameters_before"]
    counted = f"{plan['parameters_before']:,} → {plan['parameters_after']:,}"
    totals = [
        *([f"shape     {counted} parameters"] if fewer else []),
        f"weights   {size(plan['bytes_before'])} → {size(plan['bytes_after'])} ({saved:.0%}){bits}",
        f"memory    about {size(plan['peak_memory_bytes'])} at the peak",
        f"text      {plan['calibration_tokens']:,} calibration tokens",
        f"stages    {' → '.join(plan['stages'])}",
        *(f"note      {note}" for note in plan["notes"]),
    ]
    title = Text(f"{plan['recipe']} on {plan['model']} ({plan['family']})", style="bold")
    return Group(title, table, Text("\n".join(totals)))


def inspection_table(found: dict[str, Any]) -> RenderableType:
    table = _table("layer", "scheme", "group", "shape", "bytes")
    for layer in found["layers"]:
        group = "" if layer["scheme"] is None else str(layer["group_size"] or "channel")
        shape = "×".join(map(str, layer["shape"]))
        scheme = layer["scheme"] or " ".join(filter(None, (layer["dtype"], layer["sparsity"])))
        table.add_row(layer["name"], scheme, group, shape, size(layer["bytes"]))
    schemes = Counter(layer["scheme"] or layer["sparsity"] or "kept" for layer in found["layers"])
    told = ", ".join(f"{count} {scheme}" for scheme, count in schemes.items())
    bits = f", {found['bits_per_weight']:.2f} bits per quantized weight" if found["bits_per_weight"] else ""
    keys_and_values = found["kv_cache"]
    if isinstance(keys_and_values, list):
        keys_and_values = ", ".join(f"{count} layers {scheme}" for scheme, count in Counter(keys_and_values).items())
    cache = f"; KV cache: {keys_and_values}" if keys_and_values else ""
    return Group(table, Text(f"{found['format']}, {size(found['bytes'])}{bits}; {told}{cache}"))


def score_table(result: dict[str, Any]) -> RenderableType:
    table = _table("text", "tokens", "context", *SCORED)
    for text in result["texts"]:
        table.add_row(text["name"], f"{text['tokens']:,}", str(text["context"]), *_scored(text))
    tasks = _table("task", *ANSWERED)
    for name, scores in result["tasks"].items():
        for cells in _answered(scores):
            tasks.add_row(name, *cells)
    written = result.get("generation")
    tables = [(table, result["texts"]), (tasks, result["tasks"]), (_written(written) if written else "", written)]
    return Group(*(each for each, wanted in tables if wanted))


def _written(found: dict[str, Any]) -> Table:
    """What a model wrote by itself, in figures, beside the original's."""
    table = _table("written", "new tokens", "repeated 4-grams", "end in a loop", "identical", "tokens in common")
    parted = found.get("divergence_point")
    common = "" if "identical" not in found else "half never part" if parted is None else f"{parted:g} (median)"
    identical = f"{found['identical']:.0%}" if "identical" in found else ""
    habits = (f"{found['repetition']:.1%}", f"{found['loops']:.0%}")
    table.add_row(f"{found['prompts']} prompts", str(found["new_tokens"]), *habits, identical, common)
    if "baseline_repetition" in found:
        table.add_row(
            "the original", "", f"{found['baseline_repetition']:.1%}", f"{found['baseline_loops']:.0%}", "", ""
        )
    return table


def comparison_table(result: dict[str, Any]) -> RenderableType:
    """A table for each text and each task, the smallest model first; below them, who failed and who is on the front."""
    rows = sorted(result["models"], key=lambda row: row["bytes"])
    texts = dict.fromkeys(text["name"] for row in rows for text in row["texts"])
    tasks = dict.fromkeys(name for row in rows for name in row["tasks"])
    drawn: list[RenderableType] = []
    for name in texts:
        found = [(row, _scored(text)) for row in rows for text in row["texts"] if text["name"] == name]
        drawn += [_compared(name, SCORED, found, result["pareto"]), Text()]
    for name in tasks:
        found = [(row, cells) for row in rows if name in row["tasks"] for cells in _answered(row["tasks"][name])]
        drawn += [_compared(name, ANSWERED, found, result["pareto"]), Text()]
    failed = [Text(f"failed   {row['model']}: {row['error']}", style="bold") for row in rows if "error" in row]
    told = [Text(f"●  no other is both as small and as good, by {[*texts, *tasks][0]}")] if result["pareto"] else []
    return Group(*drawn, *told, *failed)


def _compared(
    name: str, columns: Sequence[str], found: list[tuple[dict[str, Any], list[str]]], front: Sequence[str]
) -> Table:
    table = _table("", name, "size", "bits/weight", *columns)
    for row, cells in found:
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else ""
        table.add_row("●" if row["model"] in front else "", row["model"], size(row["bytes"]), bits, *cells)
    return table


def _scored(text: dict[str, Any]) -> list[str]:
    """The cells of a text's scores, under `SCORED`."""
    forms = {
        "perplexity": "{:.3f}",
        "perplexity_ratio": "{:.4f}",
        "kl_divergence": "{:.5f}",
        "top1_agreement": "{:.1%}",
    }
    return [form.format(text[key]) if key in text else "" for key, form in forms.items()]


def _answered(scores: dict[str, Any]) -> list[list[str]]:
    """The cells of a task's scores, under `ANSWERED`, a row for each metric."""
    flips = f"{scores['flips']} of {scores['questions']}" if {"flips", "questions"} <= scores.keys() else ""
    rows = []
    for each in metrics_of(scores):
        numbers = [(each.value, ".4f"), (each.error, ".4f"), (each.difference, "+.4f")]
        numbers += [(each.paired, ".4f"), (each.unpaired, ".4f")]
        cells = ["" if number is None else f"{number:{form}}" for number, form in numbers]
        rows.append([each.name, *cells, flips if each.difference is not None else ""])
    return rows


def bench_table(result: dict[str, Any]) -> RenderableType:
    """A column per model; speeds and sizes below each other, and the ratio beside them."""
    original, ratio = result["baseline_values"], result["ratio"]
    table = _table("", result["scheme"], *([original["scheme"], "ratio"] if original else []))
    for key, name in BENCHED.items():
        shown = [
            size(each[key]) if key.endswith("bytes") else f"{each[key]:.1f}" for each in (result, original) if each
        ]
        table.add_row(name, *shown, *([f"{ratio[key]:.2f}×"] if ratio else []))
    work = (
        f"{result['prompt_tokens']} tokens read and {result['tokens']} written, batch {result['batch']}, "
        f"{result['device']}, {result['threads']} threads, median of {result['repetitions']}"
    )
    warned = [Text(f"warning   {result['warning']}", style="bold")] if result["warning"] else []
    return Group(table, Text(work), *warned)


def demo_table(rows: list[dict[str, Any]]) -> RenderableType:
    table = _table("recipe", "size", "bits/weight", "perplexity", "KL divergence", "sample")
    for row in rows:
        table.add_row(
            row["recipe"],
            size(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl_divergence']:.5f}" if row["kl_divergence"] is not None else "",
            Text(row["sample"]),
        )
    reports = "\n".join(f"{row['recipe']}: {row['report']}" for row in rows if row.get("report"))
    return Group(table, Text(f"reports\n{reports}"))


def doctor_table(found: dict[str, Any]) -> RenderableType:
    versions = _table("", "")
    for name in ("python", "torch", "triton", "transformers", "device"):
        versions.add_row(name, str(found[name]))
    backends = _table("scheme", "backend", "why")
    for scheme, entry in found["backends"].items():
        backends.add_row(scheme, entry["backend"], entry["reason"])
    return Group(versions, backends)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
