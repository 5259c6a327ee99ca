from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.core.metrics import quadratic_form
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import WEIGHT_BITS, Grid
from compress.quantize import refine as module
from compress.quantize.refine import refine
from compress.quantize.rtn import rtn

GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


H = damped(torch.cov(torch.randn(32, 400, generator=torch.Generator().manual_seed(0)).cumsum(0)).double(), 1e-6)
W = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))


def start(grid: Grid, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    return rtn(W, grid, scale_dtype=dtype, range="minmax")


def row_errors(tensor: QuantizedTensor) -> Tensor:
    change = (tensor.dequantize() - W).double()
    return ((change @ damped(H, 0.01)) * change).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sweep_lowers_the_error_of_every_row_or_leaves_it(grid: Grid, dtype: torch.dtype) -> None:
    errors = [row_errors(refine(W, start(grid, dtype), H, sweeps=sweeps)) for sweeps in range(4)]
    assert torch.equal(errors[0], row_errors(start(grid, dtype)))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stay_on_the_grid_and_scales_in_their_dtype(grid: Grid) -> None:
    before = start(grid, torch.bfloat16)
    after = refine(W, before, H, sweeps=2)
    assert grid.qmin <= after.codes.min()
    assert after.codes.max() <= grid.qmax
    assert after.scale.dtype == torch.bfloat16
    assert (after.scale * before.scale > 0).all()
    assert after.zero_point is before.zero_point


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_the_end_no_single_code_can_be_improved(symmetric: bool) -> None:
    grid = Grid(3, symmetric, 8)
    tensor = refine(W, start(grid), H, sweeps=40)
    least = row_errors(tensor)
    for column in range(32):
        for step in (-1, 1):
            codes = tensor.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(grid.qmin, grid.qmax)
            moved = QuantizedTensor(codes, tensor.scale, tensor.zero_point, grid)
            assert (row_errors(moved) >= least * (1 - 1e-4)).all()


def test_with_codes_that_fit_the_scale_becomes_the_least_squares_scale() -> None:
    true = QuantizedTensor(
        torch.randint(-8, 8, (12, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(2)),
        torch.full((12, 1), 0.25),
        None,
        Grid(4),
    )
    off = QuantizedTensor(true.codes, true.scale * 1.01, None, Grid(4))
    assert torch.allclose(refine(true.dequantize(), off, H, sweeps=1).scale, true.scale, rtol=1e-5)


def test_blocks_of_columns_change_the_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = refine(W, start(Grid(3)), H, sweeps=2)
    monkeypatch.setattr(module, "BLOCK", 5)
    blocks = refine(W, start(Grid(3)), H, sweeps=2)
    assert (whole.codes == blocks.codes).float().mean() > 0.99


def test_a_weight_of_zeros_is_left_alone() -> None:
    zero = torch.zeros(3, 32)
    tensor = rtn(zero, Grid(4), scale_dtype=torch.float32)
    assert torch.equal(refine(zero, tensor, H).dequantize(), zero)


@pytest.mark.parametrize("grid", [Grid(4, group_size=8), Grid(3, symmetric=False)], ids=str)
def test_weights_that_are_to_stay_zero_do_and_rows_gain_without_them(grid: Grid) -> None:
    zeros = torch.arange(32).expand(12, 32) % 4 < 2
    before = rtn(W * ~zeros, grid, scale_dtype=torch.float32, range="minmax")
    after = refine(W, before, H, zeros=zeros, sweeps=3)
    assert not after.dequantize()[zeros].any()
    assert (row_errors(after) <= row_errors(before)).all()
    assert row_errors(after).sum() < 0.6 * row_errors(before).sum()
    assert refine(W, before, H, sweeps=3).dequantize()[zeros].any()


def test_the_start_is_left_as_it_was() -> None:
    tensor = start(Grid(3, False, 8))
    codes, scale = tensor.codes.clone(), tensor.scale.clone()
    assert quadratic_form(refine(W, tensor, H).dequantize() - tensor.dequantize(), H) > 0
    assert torch.equal(tensor.codes, codes)
    assert torch.equal(tensor.scale, scale)
