"""Split sums are complete, added up in one order, and leave the workspace as they found it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from quant_kernels import split_k
from quant_kernels.library import INTERPRETED
from quant_kernels.split_k import sum_splits, workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "_WORKSPACES", {})


@triton.jit
def _sum_kernel(parts, y, partials, counters, SPLIT_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """parts: [tiles, splits, 4, 8] → y: [tiles, 4, 8]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    part = tl.load(parts + (tile * SPLIT_K + split) * 32 + place)
    total, complete = sum_splits(part, partials, counters, tile, split, SPLIT_K)
    tl.store(y + tile * 32 + place, total, mask=place < tl.where(complete, 32, 0))


def summed(parts: torch.Tensor) -> torch.Tensor:
    tiles, splits = parts.shape[:2]
    y = torch.full((tiles, 4, 8), torch.nan, device=DEVICE)
    partials, counters = workspace(DEVICE, parts.numel(), tiles)
    _sum_kernel[tiles, splits](parts, y, partials, counters, SPLIT_K=splits)
    assert not counters.any()
    return y


@needs_kernels
@pytest.mark.parametrize("splits", [2, 3, 5])
def test_the_sum_is_taken_in_the_order_of_the_splits(splits: int) -> None:
    parts = torch.randn(3, splits, 4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parts *= 10 ** torch.arange(0, 8, device=DEVICE)  # so that another order would round differently
    expected = parts[:, 0].clone()
    for split in range(1, splits):
        expected += parts[:, split]
    for _ in range(2):
        assert torch.equal(summed(parts), expected)


def test_a_workspace_is_used_again() -> None:
    assert workspace(DEVICE, 100, 10)[0] is workspace(DEVICE, 90, 9)[0]


def test_a_workspace_grows_in_both_and_what_it_outgrew_stays_for_graphs_that_hold_it() -> None:
    small = workspace(DEVICE, 1000, 10)
    large = workspace(DEVICE, 10, 1000)
    assert large[0].numel() >= 1000
    assert large[1].numel() >= 1000
    assert any(small[0] is kept for kept, _ in split_k._WORKSPACES[DEVICE])
    assert workspace(DEVICE, 1000, 1000)[0] is large[0]


def test_counters_start_at_zero() -> None:
    assert not workspace(DEVICE, 1, 100)[1].any()
