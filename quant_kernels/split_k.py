"""Split-K: several thread blocks share one tile of a result, each summing over a part of the inputs.

Every block writes its partial sums to a workspace and counts itself in at the tile's counter. The one that arrives last
adds up all parts in their fixed order, so that the result is the same on every run, and sets the counter back to 0 for
the next launch. There is one launch, no floating-point atomics, and nothing to clear in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.tuning import Config

_WORKSPACES: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
"""Device → its workspaces, smallest first. Outgrown ones stay: CUDA graphs may hold their addresses."""


def workspace(device: torch.device, partials: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Scratch for at least `partials` sums, float32, and counters for at least `tiles` tiles, int32 and all 0.

    All launches on a device use the same, so they must not overlap: keep one model on one stream. What a CUDA graph
    needs should be launched once before the capture; what is first needed within one is made anew at each replay.
    """
    kept = _WORKSPACES.setdefault(device, [])
    if kept and kept[-1][0].numel() >= partials and kept[-1][1].numel() >= tiles:
        return kept[-1]
    sizes = [triton.next_power_of_2(size) for size in (partials, tiles)]
    if kept:
        sizes = [max(size, buffer.numel()) for size, buffer in zip(sizes, kept[-1], strict=True)]
    made = (
        torch.empty(sizes[0], dtype=torch.float32, device=device),
        torch.zeros(sizes[1], dtype=torch.int32, device=device),
    )
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        kept.append(made)
    return made


def share(config: Config, tiles: int, steps: int, device: torch.device) -> tuple[int, Tensor | None, Tensor | None]:
    """Into how many splits the sums of `tiles` tiles over `steps` rounds are cut, none of them empty, and the workspace
    for it; without one where they are not cut."""
    splits = triton.cdiv(steps, triton.cdiv(steps, config.split_k))
    if splits == 1:
        return 1, None, None
    return splits, *workspace(device, tiles * splits * config.block_m * config.block_n, tiles)


@triton.jit
def sum_splits(part, partials, counters, tile, split, splits):  # type: ignore[no-untyped-def]
    """(sum over all splits, True) in the program that arrives last at `tile`; (its own part, False) in the others.

    part: [rows, columns], of the type `partials` points to, in the same layout in all programs of the kernel.
    """
    ROWS: tl.constexpr = part.shape[0]
    COLUMNS: tl.constexpr = part.shape[1]
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    base = partials + tile.to(tl.int64) * (splits * ROWS * COLUMNS)
    tl.store(base + split * (ROWS * COLUMNS) + place, part)
    tl.debug_barrier()  # every thread has written before the first one counts
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        part = tl.load(base + place, cache_modifier=".cg")
        for other in range(1, splits):
            part += tl.load(base + other * (ROWS * COLUMNS) + place, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return part, last
