"""What the command line shows a person: plain data in, rich renderables out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BENCHED = {
    "prefill_tokens_per_second": "reading, tokens/s",
    "decode_tokens_per_second": "writing, tokens/s",
    "weights_bytes": "weights",
    "peak_memory_bytes": "memory at the peak",
}


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
    table = _table("text", "tokens", "context", "perplexity", "× baseline", "KL divergence", "same top token")
    for text in result["texts"]:
        paired = "kl_divergence" in text
        table.add_row(
            text["name"],
            f"{text['tokens']:,}",
            str(text["context"]),
            f"{text['perplexity']:.3f}",
            f"{text['perplexity_ratio']:.4f}" if paired else "",
            f"{text['kl_divergence']:.5f}" if paired else "",
            f"{text['top1_agreement']:.1%}" if paired else "",
        )
    tasks = _table("task", "metric", "value", "± standard error")
    for name, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            if metric != "stderr":
                error = metrics.get("stderr")
                tasks.add_row(name, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    return Group(*(each for each, wanted in ((table, result["texts"]), (tasks, result["tasks"])) if wanted))


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
