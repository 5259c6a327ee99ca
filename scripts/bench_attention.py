#!/usr/bin/env python3
"""How fast attention reads a quantized cache, beside torch's attention over a plain one, in the same run.

    scripts/bench_attention.py                                     on a GPU, into quant_kernels/results/attention-….json
    scripts/bench_attention.py --device cpu --tokens 8192          printed, one thread
    scripts/bench_attention.py --render FILE                       a run's table, in Markdown

One decoding step of one layer: a query per sequence, 32 heads of 128 channels, 8 of keys and values (Llama 3 8B). On a
GPU the calls are replayed as a CUDA graph, over copies of the cache that no second-level cache holds, and medians are
reported; the plain cache is bfloat16, read by torch's fastest attention that takes groups of heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import COLD_BYTES, median_seconds, missing_device, say
from torch import Tensor

from compress.core.kv import KV_SCHEMES
from compress.runtime.attention import packed_attention
from compress.runtime.cache import PackedLayer
from quant_kernels.kv_cache import attend

ROOT = Path(__file__).resolve().parents[1]
HEADS, KV_HEADS, D = 32, 8, 128
BASELINE = "bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description="Time attention over quantized caches beside torch's.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1024, 8192, 32768), metavar="COUNT")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16), metavar="COUNT")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--results", type=Path, default=ROOT / "quant_kernels" / "results", help="folder")
    parser.add_argument("--render", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.render:
        print(render(json.loads(options.render.read_text(encoding="utf-8"))))
        return 0
    if options.device == "cuda" and (error := missing_device()):
        say(error)
        return 2
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread"
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "results": []}
    for batch in options.batches:
        for tokens in options.tokens:
            report["results"] += measure(batch, tokens, options.device, options.replays)
    print(render(report))
    if options.device == "cuda":
        options.results.mkdir(parents=True, exist_ok=True)
        file = options.results / f"attention-{device.replace(' ', '-').lower()}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {file}")
    return 0


@torch.inference_mode()
def measure(batch: int, tokens: int, device: str, replays: int) -> list[dict[str, Any]]:
    """Every scheme at one size."""
    keys, values = (torch.randn(batch, KV_HEADS, tokens, D, device=device).bfloat16() for _ in range(2))
    query = torch.randn(batch, HEADS, 1, D, device=device).bfloat16()
    rows = []
    for name in (BASELINE, *KV_SCHEMES):
        call, copies, nbytes = plain(query, keys, values) if name == BASELINE else packed(query, keys, values, name)
        seconds = (median_seconds(call, copies, nbytes / 5e12, replays) if device == "cuda" else
                   cpu_seconds(lambda call=call, copies=copies: call(copies[0])))  # fmt: skip
        rows.append({"scheme": name, "batch": batch, "tokens": tokens, "seconds": seconds, "bytes": nbytes})
    return rows


def plain(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Callable[[Any], Tensor], list[Any], int]:
    nbytes = keys.nbytes + values.nbytes
    copies = [(keys, values), *((keys.clone(), values.clone()) for _ in range(num_copies(nbytes, keys.is_cuda)))]
    return lambda cache: F.scaled_dot_product_attention(query, *cache, enable_gqa=True), copies, nbytes


def packed(query: Tensor, keys: Tensor, values: Tensor, name: str) -> tuple[Callable[[Any], Tensor], list[Any], int]:
    def layer() -> PackedLayer:
        made = PackedLayer(KV_SCHEMES[name])
        made.update(keys, values)
        made.pack([0] * len(keys))
        return made

    first = layer()
    if not keys.is_cuda:
        return lambda layer: packed_attention(query, layer, D**-0.5), [first], first.nbytes
    layers = [first, *(layer() for _ in range(num_copies(first.nbytes, True)))]
    return (
        lambda arguments: attend(query, *arguments[0], D**-0.5, **arguments[1]),
        [*map(reading, layers)],
        first.nbytes,
    )


def reading(layer: PackedLayer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a step is given of a layer, made beforehand: a graph is captured of the kernels alone."""

    def on_device(counts: list[int]) -> Tensor:
        return torch.tensor(counts, dtype=torch.int32, device=layer.sides[0].slots.device)

    keys, values = layer.sides
    recent: dict[str, Any] = {}
    if layer.scheme.window:
        recent = {"k_recent": keys.slots, "v_recent": values.slots, "recent_lengths": on_device(layer.num_recent)}
    return (keys.planes, values.planes, on_device(layer.num_quantized)), recent | {"num_sinks": layer.scheme.sinks}


def num_copies(nbytes: int, cold: bool) -> int:
    return int(COLD_BYTES / nbytes) if cold else 0


def cpu_seconds(call: Callable[[], object], repetitions: int = 7) -> float:
    """Of processor time, the median."""
    times = []
    for repetition in range(-1, repetitions):
        start = time.process_time()
        call()
        if repetition >= 0:
            times.append(time.process_time() - start)
    return statistics.median(times)


def render(report: dict[str, Any]) -> str:
    """Speed by scheme, as a multiple of the plain cache's."""
    schemes = list(dict.fromkeys(row["scheme"] for row in report["results"]))
    found = {(row["batch"], row["tokens"], row["scheme"]): row for row in report["results"]}
    lines = [
        f"{report['device']}, torch {report['torch']}: times as fast as attention over a bfloat16 cache.",
        "",
        f"| sequences × tokens | {' | '.join(schemes)} |",
        f"|---|{'--:|' * len(schemes)}",
    ]
    for batch, tokens in dict.fromkeys((row["batch"], row["tokens"]) for row in report["results"]):
        base = found[batch, tokens, BASELINE]["seconds"]
        cells = [f"{base / found[batch, tokens, scheme]['seconds']:.2f}" for scheme in schemes]
        lines.append(f"| {batch} × {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
