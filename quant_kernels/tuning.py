"""Which configuration a kernel is launched with: what was measured on this very GPU, else a rule of thumb.

Nothing is tuned while a model runs. `tables/<gpu>.json` holds what `scripts/tune_kernels.py` found best, by operator,
weight shape, group size and bucket of tokens; shapes that are not in it are left to the operator's own heuristic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

TABLES = Path(__file__).parent / "tables"
BUCKETS = (16, 32, 64, 128, 512)
"""The most tokens of each bucket but the last."""


@dataclass(frozen=True)
class Config:
    """How a matrix product is cut up. A thread block makes block_m tokens × block_n outputs of the result."""

    block_m: int
    block_n: int
    block_k: int = 128
    split_k: int = 1
    """Thread blocks that share one piece of the result, each summing over a part of the inputs."""
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = False
    """Compute the transpose: weights become the left operand, which Hopper's wide instructions want in registers."""


def bucket(tokens: int) -> str:
    """The bucket's most tokens, `16`, or `more`."""
    return next((str(most) for most in BUCKETS if tokens <= most), "more")


def tabled(operator: str, device: torch.device, rows: int, columns: int, group_size: int, tokens: int) -> Config | None:
    """The measured best for a weight [rows, columns] on this GPU, if there is one. `group_size` 0: per channel."""
    if device.type != "cuda":
        return None
    entries = _table(torch.cuda.get_device_name(device))
    found = entries.get(f"{operator} {rows}x{columns} g{group_size} m{bucket(tokens)}")
    return Config(**found) if found else None


def split_sums(
    config: Config, tokens: int, outputs: int, inputs: int, *, blocks: int, least: int, per_token: int = 16
) -> Config:
    """`config` with sums split until there are `blocks` thread blocks.

    But into parts of at least `least` inputs, and `per_token` for each token of a block, so that partial sums do not
    outweigh the weights.
    """
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    most = inputs // max(least, per_token * config.block_m)
    return replace(config, split_k=max(1, min(triton.cdiv(blocks, tiles), most)))


def fitted(config: Config) -> Config:
    """What a compute unit of an AMD GPU has room for in 64 KB of shared memory; elsewhere as it is."""
    if torch.version.hip is None:
        return config
    return replace(config, block_n=min(config.block_n, 128), block_k=128, num_stages=2)


@cache
def gpu_of(device: torch.device) -> tuple[bool, int]:
    """Whether a device is a Hopper GPU, and its number of multiprocessors; a CPU counts as an H100."""
    if device.type != "cuda":
        return True, 132
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return hopper, torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _table(gpu: str) -> dict[str, dict[str, Any]]:
    file = TABLES / f"{gpu.replace(' ', '-').lower()}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
