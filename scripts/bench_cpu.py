#!/usr/bin/env python3
"""How fast quantized linear layers are on this CPU, beside torch's own in bfloat16, in the same run.

    scripts/bench_cpu.py                        a table in Markdown
    scripts/bench_cpu.py --publish              the same, into quant_kernels/README.md
    scripts/bench_cpu.py --size 2048 --threads 2

Medians of the ratio of two calls, one directly after the other; above 1 is faster than bfloat16. Every route of a
kernel that is open on this machine is measured at every number of tokens it can take, so that the limits in the table
of kernels can be seen to be right.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import commit, positive
from torch import Tensor

import quant_kernels
from compress.doctor import describe
from quant_kernels import Packed, reference
from quant_kernels.dispatch import KERNELS, Route

README = Path(__file__).resolve().parents[1] / "quant_kernels" / "README.md"
BEGIN, END = "<!-- bench_cpu -->", "<!-- /bench_cpu -->"
TOKENS = (1, 4, 8, 16, 32, 64, 128, 512)


@dataclass(frozen=True)
class Row:
    """A weight in the layout of one kernel."""

    title: str
    bits: int
    groups_of: int | None
    symmetric: bool
    pack: Callable[..., Packed] | None = None
    """None: of the kernel that the table chooses."""


ROWS = (
    Row("int4, groups of 128", 4, 128, True),
    Row("int4, groups of 128, zero points", 4, 128, False),
    Row("int4, one scale per channel", 4, None, True),
    Row("int8, one scale per channel", 8, None, True),
    Row("int8, groups of 128", 8, 128, True, reference.pack),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time quantized linear layers on the CPU beside bfloat16.")
    parser.add_argument("--size", type=positive, default=4096, help="rows and columns of the weight")
    parser.add_argument("--tokens", type=positive, nargs="+", default=TOKENS)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repetitions", type=positive, default=9)
    parser.add_argument("--publish", action="store_true", help="put the table into the README")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = torch.randn(options.size, options.size).to(torch.bfloat16)
    lines = [
        f"{options.size} × {options.size}, {describe('cpu')}, {platform.processor() or platform.machine()}, torch "
        f"{torch.__version__}, commit {commit()[:12]}, median of {options.repetitions}.",
        "",
        f"| layer | kernel and route | {' | '.join(map(str, options.tokens))} |",
        "|---|---|" + "--:|" * len(options.tokens),
    ]
    for row in ROWS:
        packed = weight(row, options.size)
        kernel = next(kernel for kernel in KERNELS if kernel.name == packed.kernel)
        for route in filter(lambda route: route.is_open(), kernel.routes):
            cells = " | ".join(
                f"{faster(route, packed, dense, tokens, options.repetitions):.2f}" if tokens <= most(route) else "–"
                for tokens in options.tokens
            )
            lines.append(f"| {row.title} | `{kernel.name}`: {route.summary} | {cells} |")
    table = "\n".join(lines)
    print(table)
    if options.publish:
        before, rest = README.read_text(encoding="utf-8").split(BEGIN, 1)
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    return 0


def weight(row: Row, size: int) -> Packed:
    limit, groups = 1 << (row.bits - 1), size // (row.groups_of or size)
    codes = torch.randint(-limit, limit, (size, size), dtype=torch.int8)
    scale = (torch.rand(size, groups) * 0.01).to(torch.bfloat16)
    zero_point = None if row.symmetric else torch.randint(-limit, limit, (size, groups), dtype=torch.int8)
    if row.pack is not None:
        return row.pack(codes, scale, zero_point, row.bits)
    return quant_kernels.pack(codes, scale, zero_point, bits=row.bits, dtype=torch.bfloat16)


def most(route: Route) -> float:
    """Tokens that a route can take: that for one can no more, the others any number, if not as quickly."""
    return 1 if route.most_tokens == 1 else math.inf


@torch.inference_mode()
def faster(route: Route, packed: Packed, dense: Tensor, tokens: int, repetitions: int) -> float:
    """How many times as fast as the dense layer."""
    x = torch.randn(tokens, packed.in_features).to(torch.bfloat16)
    pairs = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        F.linear(x, dense)
        middle = time.perf_counter()
        route.linear(x, packed, None)
        pairs.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(pairs[2:])


if __name__ == "__main__":
    main()
