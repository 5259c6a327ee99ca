"""A picture of a run of `bench_kernels.py`: the share of the roofline that each kernel reaches, by number of tokens."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 760, 380, 52, 30, 40, 190
COLOURS = ("#b3432b", "#2b6cb3", "#2f8f4e", "#8a4fb3", "#b38a2b", "#2b9fb3", "#b32b77", "#5a6b2b", "#333333")


def svg(report: dict[str, Any], ours: Collection[str]) -> str:
    """Shares are geometric means over the layers a kernel ran on; others' kernels are drawn in grey."""
    shares = _shares(report["results"])
    tokens = sorted({count for line in shares.values() for count in line})
    across = {count: LEFT + (WIDTH - LEFT - LEGEND) * index / max(1, len(tokens) - 1)
              for index, count in enumerate(tokens)}  # fmt: skip

    def down(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(share, 1)

    right = WIDTH - LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fffdf8"/>',
        f'<text x="{LEFT}" y="18" font-size="13">Share of the roofline, {report["device"]}</text>',
    ]
    for tenth in range(0, 11, 2):
        y = down(tenth / 10)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd6c8"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    for count, x in across.items():
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    named = [name for name in shares if name in ours]
    for index, name in enumerate([*(name for name in shares if name not in ours), *named]):
        colour = COLOURS[named.index(name) % len(COLOURS)] if name in ours else "#b9b2a5"
        points = [(across[count], down(share)) for count, share in sorted(shares[name].items())]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 14}" y="{TOP + 14 * index + 8}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _shares(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Kernel → tokens → geometric mean over layers."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if "of_roofline" in row:
            found.setdefault(row["kernel"], {}).setdefault(row["tokens"], []).append(math.log(row["of_roofline"]))
    return {
        kernel: {count: math.exp(sum(logs) / len(logs)) for count, logs in line.items()}
        for kernel, line in found.items()
    }
