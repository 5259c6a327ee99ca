#!/usr/bin/env python3
"""How fast the GPU kernels are, beside the roofline, cuBLAS in bfloat16, and other people's kernels, in the same run.

    scripts/bench_kernels.py                                        everything, into quant_kernels/results/<gpu>.json
    scripts/bench_kernels.py --layers "8B o" --tokens 1 16          less
    scripts/bench_kernels.py --render quant_kernels/results/x.json  a run's tables, in Markdown; needs no GPU
    scripts/bench_kernels.py --publish quant_kernels/results/x.json put them into the README, with a picture

First come the operators' own tests on the device; if one fails no time is taken. Then the device's own limits, by
copying and by large products. Every kernel runs on random data in replays of a CUDA graph that walks through 200 MB of
weights before it meets one again; the median is reported. What is not installed is left out; what a kernel cannot do is
said in its place. The file is written after each layer. Exit status 1: one of this package's own kernels failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kernel_plot import svg
from kernel_rivals import RIVALS
from kernel_timing import (
    LAYERS,
    MODULES,
    OURS,
    SCHEMES,
    Device,
    Kernel,
    Layer,
    cold_copies,
    measured_limits,
    median_seconds,
    missing_device,
    roofline_seconds,
    say,
)
from triton.errors import TritonError

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "quant_kernels" / "README.md"
BEGIN, END = "<!-- bench_kernels -->", "<!-- /bench_kernels -->"
TOKENS = (1, 4, 16, 32, 64, 128, 1024, 4096)
BASELINE = "cuBLAS bf16"
PACKAGES = ("torch", "triton", "gemlite", "conch-triton-kernels", "torchao", "bitsandbytes")
FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError, KeyError, NotImplementedError,
    TritonError,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the GPU kernels beside others, in the same run.")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER")
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS, metavar="COUNT")
    parser.add_argument("--kernels", nargs="+", choices=OURS | RIVALS, metavar="KERNEL", help="default: all installed")
    parser.add_argument("--replays", type=positive, default=50, help="of which the median is taken")
    parser.add_argument("--results", type=Path, default=ROOT / "quant_kernels" / "results", help="folder")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only print the tables of an earlier run")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="only put an earlier run into the README")
    options = parser.parse_args()

    if options.render:
        print(render(json.loads(options.render.read_text(encoding="utf-8"))))
        return 0
    if options.publish:
        publish(options.publish, README)
        return 0
    if error := missing_device():
        say(error)
        return 2
    kernels = [
        kernel
        for name, kernel in (OURS | RIVALS).items()
        if name == BASELINE or not options.kernels or name in options.kernels
        if find_spec(package_of(name)) is not None
    ]
    if not tests_pass([kernel.name for kernel in kernels if kernel.name in OURS]):
        say("error: the kernels' own tests fail on this device, so nothing was timed.")
        return 1
    report, limits = facts(options.replays), measured_limits(options.replays)
    report["limits"] = asdict(limits)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{report['device'].replace(' ', '-').lower()}.json"
    report["results"] = []
    for name in options.layers:
        report["results"] += measure(kernels, {name: LAYERS[name]}, limits, options)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # an interruption loses one layer
    print(render(report))
    say(f"Written to {file}")
    failed = sorted({row["kernel"] for row in report["results"] if "error" in row} & set(OURS))
    if failed:
        say(f"error: {', '.join(failed)} failed; the file says how.")
    return 1 if failed else 0


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def package_of(kernel: str) -> str:
    """The Python package that a kernel's name starts with, if it is not torch's or ours."""
    first = kernel.split()[0]
    return first if first in ("gemlite", "conch", "torchao", "bitsandbytes") else "torch"


def tests_pass(operators: list[str]) -> bool:
    """Whether the operators' tests on the device do."""
    modules = (MODULES[operator].__name__.rpartition(".")[2] for operator in operators)
    files = {f"tests/quant_kernels/test_{module}.py" for module in modules}
    if not files:
        return True
    say("== tests on the device")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *sorted(files)]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode == 0


def facts(replays: int) -> dict[str, Any]:
    """Where, when and of what the numbers are."""
    device = torch.cuda.get_device_name()
    versions = {"cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "capability": list(torch.cuda.get_device_capability()),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "replays": replays,
    }


def commit() -> str:
    """Of this checkout; `+` marks changes on top of it, `unknown` a copy without its history."""
    try:
        found = [
            subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + "+" * bool(found[1])


def measure(
    kernels: list[Kernel], layers: dict[str, Layer], limits: Device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each layer, kernel and number of tokens."""
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        say(f"== {name}")
        torch.manual_seed(0)
        for kernel in kernels:
            known = {"layer": name, **layer._asdict(), "kernel": kernel.name, "scheme": kernel.scheme}
            try:
                rows += timed(kernel, layer, known, limits, options)
            except FAILURES as error:
                rows.append(known | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
                say(f"   {kernel.name}: {rows[-1]['error']}")
    return compared(rows)


def timed(
    kernel: Kernel, layer: Layer, known: dict[str, Any], limits: Device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    nbytes = layer.outputs * layer.inputs * SCHEMES[kernel.scheme].bytes_per_weight
    copies = cold_copies(kernel.weights(layer, "cuda"), nbytes)
    rows = []
    for tokens in options.tokens:
        if tokens < kernel.least_tokens:
            continue
        x = kernel.activations(tokens, layer.inputs, "cuda")
        least = roofline_seconds(kernel.scheme, layer, tokens, limits)

        def call(weights: Any, x: Any = x) -> object:
            return kernel.run(weights, x)

        with torch.inference_mode():
            seconds = median_seconds(call, copies, least, options.replays)
        times = {"microseconds": round(seconds * 1e6, 2), "of_roofline": round(least / seconds, 4)}
        rows.append(known | {"tokens": tokens} | times)
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with `speedup`: how many times as fast as the baseline on the same layer and tokens."""
    baseline = {
        (row["layer"], row["tokens"]): row["microseconds"]
        for row in rows
        if row["kernel"] == BASELINE and "tokens" in row
    }
    made = []
    for row in rows:
        reference = baseline.get((row["layer"], row.get("tokens")))
        made.append(row if reference is None else row | {"speedup": round(reference / row["microseconds"], 3)})
    return made


def render(report: dict[str, Any]) -> str:
    """Markdown: for each layer a line per kernel and a column per number of tokens."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['device']}, commit {report['commit'][:12]}, {report['date'][:10]}, {versions}.",
        f"Median of {report['replays']} replays: µs · share of the roofline · times as fast as {BASELINE}.",
    ]
    rows = report["results"]
    tokens = sorted({row["tokens"] for row in rows if "tokens" in row})
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of_layer = [row for row in rows if row["layer"] == layer]
        shape = f"{of_layer[0]['outputs']} × {of_layer[0]['inputs']}"
        lines += ["", f"**{layer}**, {shape}", "", f"| kernel | {' | '.join(map(str, tokens))} |"]
        lines.append("|---" * (len(tokens) + 1) + "|")
        for kernel in dict.fromkeys(row["kernel"] for row in of_layer):
            found = {row.get("tokens"): row for row in of_layer if row["kernel"] == kernel}
            cells = [cell(found.get(count, found.get(None))) for count in tokens]
            lines.append(f"| {kernel} | {' | '.join(cells)} |")
    notes = [f"{kernel.name}: {kernel.note}." for kernel in (OURS | RIVALS).values() if kernel.note]
    return "\n".join([*lines, "", *notes])


def publish(file: Path, readme: Path) -> None:
    """Puts a run's tables between the two marks of a README, and a picture of it beside its file."""
    report = json.loads(file.read_text(encoding="utf-8"))
    picture = file.with_suffix(".svg")
    picture.write_text(svg(report, OURS), encoding="utf-8")
    link = f"![Share of the roofline](results/{picture.name})"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN, 1)
    readme.write_text(f"{before}{BEGIN}\n{link}\n\n{render(report)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "failed"
    share = f" · {row['of_roofline']:.0%}" if "of_roofline" in row else ""
    speedup = f" · {row['speedup']:.2f}" if "speedup" in row else ""
    return f"{row['microseconds']:.1f}{share}{speedup}"


if __name__ == "__main__":
    sys.exit(main())
