#!/usr/bin/env python3
"""Find the fastest configurations of the GPU kernels on this GPU, and write them where the operators look for them.

    scripts/tune_kernels.py                                   every operator, layer and bucket of tokens
    scripts/tune_kernels.py --operators w4a8 --layers "8B o"  less; other entries of the table stay

Starts from what an operator would use now and tries up to nine neighbours, each timed as CUDA graphs over cold weights.
What does not compile, or computes something else, is passed over. Run again to go on from the best so far. The table is
quant_kernels/tables/<gpu>.json, with entries as `quant_kernels.tuning` reads them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench_kernels import positive
from kernel_timing import (
    GROUP_SIZE,
    LAYERS,
    MODULES,
    OURS,
    SCHEMES,
    Device,
    Kernel,
    Layer,
    cold_copies,
    median_seconds,
    missing_device,
    roofline_seconds,
    say,
)
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from quant_kernels.tuning import BUCKETS, TABLES, Config, bucket

TOKENS = (*BUCKETS, 4096)
"""One count for each bucket: the most, and 4096 for those beyond."""
GROUPS = {
    "w2a16": GROUP_SIZE, "w3a16": GROUP_SIZE, "w4a16": GROUP_SIZE, "w8a16": 0, "w4a16_fp4": 16, "w8a16_fp8": 0,
    "w4a8": 0, "w4a8_grouped": 64, "w8a8": 0, "fp8": 0, "fp8_grouped": 128,
}  # fmt: skip
"""Operator → its group size in the table, where `w4a8` with groups is an entry of `w4a8`."""
LIMITS = {"split_k": (1, 32), "block_n": (32, 256), "num_stages": (2, 6), "num_warps": (1, 8), "block_k": (128, 256)}
"""Field → its least and most."""
BLOCK_K = ("w4a8", "w4a8_grouped", "w8a8")
"""Operators to whose configuration block_k makes a difference."""
FAST = Device(4.8e12, {"bf16": 1e15, "8-bit": 2e15})
"""Faster than any GPU of today: by it is chosen how often to repeat."""
MOST_CANDIDATES = 10
TOLERANCE = 0.01
"""Relative difference between results, as a norm, that the order of a sum may make in 16 bits."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of the fastest configurations on this GPU.")
    parser.add_argument("--operators", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="LAYER")
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS, metavar="COUNT")
    parser.add_argument("--replays", type=positive, default=50, help="of which the median is taken")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder")
    options = parser.parse_args()

    if error := missing_device():
        say(error)
        return 2
    file = options.tables / f"{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    for operator in options.operators:
        for name in options.layers:
            found = tune(OURS[operator], LAYERS[name], options.tokens, options.replays)
            update(file, found)  # after each, so that an interruption loses little
            say(f"{operator} on {name}: {len(found)} entries in {file}")
    return 0


def tune(kernel: Kernel, layer: Layer, token_counts: list[int], replays: int) -> dict[str, Config]:
    """Key in the table → the fastest configuration."""
    torch.manual_seed(0)
    nbytes = layer.outputs * layer.inputs * SCHEMES[kernel.scheme].bytes_per_weight
    copies = cold_copies(kernel.weights(layer, "cuda"), nbytes)
    found = {}
    for tokens in token_counts:
        x = kernel.activations(tokens, layer.inputs, "cuda")
        start = current(kernel.name, layer, tokens)
        least = roofline_seconds(kernel.scheme, layer, tokens, FAST)
        with torch.inference_mode():
            expected = kernel.run(copies[0], x)
            times = {start: median_seconds(lambda weights, x=x: kernel.run(weights, x), copies, least, replays)}
            for config in candidates(start, block_k=kernel.name in BLOCK_K)[1:]:
                seconds = attempt(kernel, config, copies, x, expected, least, replays)
                if seconds is not None:
                    times[config] = seconds
        best = min(times, key=lambda config: times[config])
        say(f"   {tokens} tokens: {times[start] * 1e6:.1f} → {times[best] * 1e6:.1f} µs with {best}")
        found[key(kernel.name, layer, tokens)] = best
    return found


def attempt(
    kernel: Kernel, config: Config, copies: list[Any], x: Any, expected: Tensor, least: float, replays: int
) -> float | None:
    """Seconds with a configuration; None where it does not run, or gives another result."""
    with using(kernel.name, config):
        try:
            y = kernel.run(copies[0], x)
            difference = (y.float() - expected.float()).norm() / expected.float().norm()
            if not difference < TOLERANCE:
                say(f"   {config} is off by {float(difference):.1e}, not timed")
                return None
            return median_seconds(lambda weights: kernel.run(weights, x), copies, least, replays)
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:
            say(f"   {config} does not run: {type(error).__name__}")
            return None


def current(operator: str, layer: Layer, tokens: int) -> Config:
    """What the operator would use."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind = {
        "w2a16": (GROUP_SIZE, 2), "w3a16": (GROUP_SIZE, 3), "w4a16": (GROUP_SIZE, 4),
        "w8a8": (), "fp8": (False, False), "fp8_grouped": (False, True), "w8a16_fp8": (True, False),
    }.get(operator, (GROUPS[operator],))  # fmt: skip
    return MODULES[operator].configuration(tokens, layer.outputs, layer.inputs, *kind, device)


@contextmanager
def using(operator: str, config: Config) -> Iterator[None]:
    """The operator launched with a configuration, whatever it would choose."""
    module: Any = MODULES[operator]
    chosen = module.configuration
    module.configuration = lambda *_: config
    try:
        yield
    finally:
        module.configuration = chosen


def candidates(start: Config, *, block_k: bool) -> list[Config]:
    """`start`, and configurations that differ from it in one field, by one step."""
    fields = [name for name in LIMITS if block_k or name != "block_k"]
    made = [start]
    for name in fields:
        value, (least, most) = getattr(start, name), LIMITS[name]
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        made += [replace(start, **{name: step}) for step in steps if least <= step <= most]
    return made[:MOST_CANDIDATES]


def key(operator: str, layer: Layer, tokens: int) -> str:
    """An entry's name, as `tuning.tabled` looks for it."""
    outputs, inputs = layer
    return f"{operator.removesuffix('_grouped')} {outputs}x{inputs} g{GROUPS[operator]} m{bucket(tokens)}"


def update(file: Path, found: dict[str, Config]) -> None:
    """Put entries into a table, which may not be there yet; the others stay."""
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entries |= {name: asdict(config) for name, config in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
