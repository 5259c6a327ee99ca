from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import ranges
from compress.core.affine import quantize
from compress.core.scheme import WEIGHT_BITS, Grid

GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]


def heavy(rows: int = 24, columns: int = 64) -> Tensor:
    """Weights with a few large ones, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    return w * (1 + (torch.rand(rows, columns, generator=generator) > 0.97))


def group_error(w: Tensor, params: ranges.Params, grid: Grid, importance: Tensor | None = None) -> Tensor:
    error = (quantize(w, *params, grid).dequantize() - w).square()
    if importance is not None:
        error = error * importance
    return error.view(len(w), grid.num_groups(w.shape[1]), -1).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_group_is_worse_off_than_with_min_max(grid: Grid, dtype: torch.dtype, weighted: bool) -> None:
    w = heavy()
    importance = torch.logspace(-2, 2, w.shape[1]) if weighted else None
    searched = group_error(w, ranges.search(w, grid, dtype, importance), grid, importance)
    covered = group_error(w, ranges.minmax(w, grid, dtype), grid, importance)
    assert (searched <= covered * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "factor"), [(2, 0.8), (3, 0.92), (4, 0.97)])
def test_search_pays_at_low_bits(symmetric: bool, bits: int, factor: float) -> None:
    grid = Grid(bits, symmetric, 32)
    w = heavy()
    searched = group_error(w, ranges.search(w, grid, torch.float32), grid).sum()
    assert searched < factor * group_error(w, ranges.minmax(w, grid, torch.float32), grid).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_comes_close_to_brute_force_over_all_scales(bits: int) -> None:
    grid = Grid(bits, group_size=32)
    w = heavy(rows=8)
    largest = w.view(8, 2, 32).abs().amax(-1)
    least = torch.full_like(largest, torch.inf)
    for factor in torch.linspace(0.1, 1.5, 500):
        for sign in (1, -1):
            least = torch.minimum(least, group_error(w, (sign * factor * largest / -grid.qmin, None), grid))
    found = group_error(w, ranges.search(w, grid, torch.float32), grid)
    assert found.sum() <= 1.02 * least.sum()


@pytest.mark.parametrize("bits", [2, 3])
def test_search_comes_close_to_brute_force_over_all_scales_and_zero_points(bits: int) -> None:
    grid = Grid(bits, symmetric=False, group_size=16)
    w = heavy(rows=8, columns=32)
    width = w.view(8, 2, 16).amax(-1) - w.view(8, 2, 16).amin(-1)
    least = torch.full_like(width, torch.inf)
    for factor in torch.linspace(0.1, 1.5, 200):
        for zero in range(grid.qmin, grid.qmax + 1):
            zero_point = torch.full_like(width, zero, dtype=torch.int8)
            params = (factor * width / (grid.qmax - grid.qmin), zero_point)
            least = torch.minimum(least, group_error(w, params, grid))
    found = group_error(w, ranges.search(w, grid, torch.float32), grid)
    assert found.sum() <= 1.05 * least.sum()


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    grid = Grid(3, group_size=32)
    w = heavy()
    importance = torch.ones(64)
    importance[::4] = 100
    plain = group_error(w, ranges.search(w, grid, torch.float32), grid, importance).sum()
    weighted = group_error(w, ranges.search(w, grid, torch.float32, importance), grid, importance).sum()
    assert weighted < 0.95 * plain


def test_a_group_without_importance_is_searched_as_if_all_its_inputs_mattered_alike() -> None:
    grid = Grid(4, group_size=32)
    w = heavy()
    importance = torch.cat([torch.zeros(32), torch.ones(32)])
    scale, _ = ranges.search(w, grid, torch.float32, importance)
    plain, _ = ranges.search(w, grid, torch.float32)
    assert torch.allclose(scale, plain)


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, symmetric=False)], ids=str)
def test_rows_are_independent_of_how_they_are_sliced(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    w = heavy()
    whole = ranges.search(w, grid, torch.bfloat16)
    monkeypatch.setattr(ranges, "SLICE", 100)
    sliced = ranges.search(w, grid, torch.bfloat16)
    assert torch.equal(whole[0], sliced[0])
    if not grid.symmetric:
        assert torch.equal(whole[1], sliced[1])


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, symmetric=False)], ids=str)
def test_zero_rows_survive_the_search(grid: Grid) -> None:
    w = heavy()
    w[3] = 0
    tensor = quantize(w, *ranges.search(w, grid, torch.float16), grid)
    assert (tensor.dequantize()[3] == 0).all()
    assert (tensor.scale[3] == 1).all()


def test_scales_of_an_asymmetric_grid_stay_positive() -> None:
    scale, _ = ranges.search(heavy(), Grid(2, symmetric=False, group_size=8), torch.float32)
    assert (scale > 0).all()


def test_the_importance_rule_asks_for_importance() -> None:
    with pytest.raises(ValueError, match="importance"):
        ranges.choose(heavy(), Grid(4), torch.float32, "importance")
