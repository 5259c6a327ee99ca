from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.affine import params_from_range, quantize
from compress.core.ranges import minmax
from compress.core.scheme import WEIGHT_BITS, Grid
from compress.errors import NumericalError

GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int = 5, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def rounded(w: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    return quantize(w, *minmax(w, grid, dtype), grid).dequantize()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_zero_points_stay_on_the_grid(grid: Grid, dtype: torch.dtype) -> None:
    w = weight()
    tensor = quantize(w, *minmax(w, grid, dtype), grid)
    assert tensor.scale.dtype == dtype
    assert grid.qmin <= tensor.codes.min()
    assert tensor.codes.max() <= grid.qmax
    assert (tensor.zero_point is None) == grid.symmetric
    if tensor.zero_point is not None:
        assert grid.qmin <= tensor.zero_point.min()
        assert tensor.zero_point.max() <= grid.qmax


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_weight_inside_the_range_moves_by_more_than_half_a_step(grid: Grid) -> None:
    w = weight()
    tensor = quantize(w, *minmax(w, grid, torch.float32), grid)
    step = tensor.scale.abs().repeat_interleave(w.shape[1] // tensor.scale.shape[1], dim=1)
    # The symmetric grid lacks half a step at the end away from the extreme weight, the asymmetric one loses up to
    # half a step to the rounding of its zero point.
    assert ((tensor.dequantize() - w).abs() <= 1.001 * step).all()
    inside = (tensor.codes > grid.qmin) & (tensor.codes < grid.qmax)
    assert ((tensor.dequantize() - w).abs() <= 0.5001 * step)[inside].all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_twice_changes_nothing(grid: Grid) -> None:
    w = weight()
    params = minmax(w, grid, torch.float32)
    once = quantize(w, *params, grid)
    assert torch.equal(quantize(once.dequantize(), *params, grid).codes, once.codes)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_extreme_weight_lands_exactly_on_the_end_of_a_symmetric_grid(bits: int, sign: int) -> None:
    w = weight().bfloat16().float()
    w[:, 3] = sign * 5.03125
    tensor = quantize(w, *minmax(w, Grid(bits), torch.bfloat16), Grid(bits))
    assert (tensor.codes[:, 3] == Grid(bits).qmin).all()
    assert torch.equal(tensor.dequantize()[:, 3], w[:, 3])


def test_a_symmetric_scale_carries_the_sign_that_the_extreme_weight_needs() -> None:
    scale, zero_point = params_from_range(
        torch.tensor([[-1.0, -8.0]]), torch.tensor([[8.0, 1.0]]), Grid(4), torch.float32
    )
    assert scale.tolist() == [[-1.0, 1.0]]
    assert zero_point is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_is_a_level(grid: Grid) -> None:
    w = weight() + 3
    w[:, ::4] = 0
    assert (rounded(w, grid)[:, ::4] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_of_zeros_gets_scale_one_and_code_zero(grid: Grid) -> None:
    w = weight()
    w[2] = 0
    tensor = quantize(w, *minmax(w, grid, torch.float16), grid)
    assert (tensor.scale[2] == 1).all()
    assert (tensor.codes[2] == 0).all()
    assert (tensor.dequantize()[2] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_keeps_its_zero_point_on_the_grid(sign: int) -> None:
    grid = Grid(4, symmetric=False)
    w = sign * (weight().abs() + 10)
    tensor = quantize(w, *minmax(w, grid, torch.float32), grid)
    assert (tensor.zero_point == (grid.qmin if sign > 0 else grid.qmax)).all()
    assert (tensor.dequantize() - w).abs().max() <= 0.501 * tensor.scale.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_belong_to_the_scale_as_it_is_stored(dtype: torch.dtype, symmetric: bool) -> None:
    grid = Grid(8, symmetric)
    w = weight(64, 64)
    tensor = quantize(w, *minmax(w, grid, dtype), grid)
    inside = (tensor.codes > grid.qmin) & (tensor.codes < grid.qmax)
    error = (tensor.dequantize() - w).abs() / tensor.scale.float().abs()
    assert error[inside].max() <= 0.501


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_weights_get_a_scale_that_is_not_zero(dtype: torch.dtype, symmetric: bool) -> None:
    grid = Grid(8, symmetric)
    w = weight() * 1e-38
    tensor = quantize(w, *minmax(w, grid, dtype), grid)
    assert (tensor.scale.float() != 0).all()
    assert tensor.dequantize().isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_not_finite_are_refused(poison: float, symmetric: bool) -> None:
    grid = Grid(4, symmetric)
    w = weight()
    scale, zero_point = minmax(w, grid, torch.float32)
    w[1, 2] = poison
    with pytest.raises(NumericalError, match="NaN"):
        minmax(w, grid, torch.float32)
    with pytest.raises(NumericalError, match="1 of 160 weights"):
        quantize(w, scale, zero_point, grid)


def test_a_scale_too_large_for_its_dtype_is_refused() -> None:
    with pytest.raises(NumericalError, match="float16"):
        minmax(weight() * 1e8, Grid(4), torch.float16)
