from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from compress.core import affine, ranges
from compress.core.metrics import sqnr
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import FP8, MXFP4, NVFP4, WEIGHT_BITS, Grid
from compress.errors import NumericalError
from compress.quantize.hqq import HQQ, hqq
from compress.quantize.rtn import rtn

P = 0.7
GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]


def weight(rows: int = 24, columns: int = 64) -> Tensor:
    """Weights with a few large ones, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    return w * (1 + (torch.rand(rows, columns, generator=generator) > 0.97))


def loss(w: Tensor, tensor: QuantizedTensor, p: float = P) -> Tensor:
    """The p-norm of the error of each group, to the power p."""
    error = (tensor.dequantize() - w).double().view(len(w), tensor.scale.shape[1], -1)
    return error.abs().pow(p).sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_group_is_worse_off_than_with_the_range_of_least_squared_error(grid: Grid, dtype: torch.dtype) -> None:
    w = weight()
    start, found = loss(w, rtn(w, grid, scale_dtype=dtype)), loss(w, hqq(w, grid, scale_dtype=dtype))
    assert (found <= start * (1 + 1e-4)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "factor"), [(2, 0.97), (3, 0.97), (4, 0.985)])
def test_the_norm_falls_at_low_bits(bits: int, factor: float, symmetric: bool) -> None:
    w, grid = weight(), Grid(bits, symmetric, 8)
    start, found = (loss(w, method(w, grid, scale_dtype=torch.bfloat16)).sum() for method in (rtn, hqq))
    assert found < factor * start


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_beyond_the_grid_pulls_the_scale_less_than_by_least_squares(symmetric: bool) -> None:
    grid = Grid(3, symmetric, 32)
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-4, 4, (8, 64), generator=generator) - (0 if symmetric else 1)
    beyond = torch.arange(64) % 32 == 5
    w = torch.where(beyond, 1.3 * levels.amin(), levels)
    far, near = ((method(w, grid, scale_dtype=torch.float32).dequantize() - w).abs() for method in (rtn, hqq))
    assert (near[:, ~beyond].amax(1) < 0.2 * far[:, ~beyond].amax(1)).all()


@pytest.mark.parametrize("grid", [Grid(2, False, 8), Grid(3, False, 8), Grid(3, True, 8)], ids=str)
def test_the_norm_comes_nearer_to_the_least_of_all_scales_and_zero_points(grid: Grid) -> None:
    w = weight(rows=8)
    width = w.view(8, 8, 8).abs().amax(-1)
    least = torch.full_like(width, torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.05, 1.0, 100):
        for zero in (0,) if grid.symmetric else range(int(grid.qmin), int(grid.qmax) + 1):
            for scale in (factor * width, -factor * width):
                zero_point = None if grid.symmetric else torch.full_like(width, zero, dtype=torch.int8)
                least = torch.minimum(least, loss(w, affine.quantize(w, scale, zero_point, grid)))
    start = loss(w, rtn(w, grid, scale_dtype=torch.float32)).sum() - least.sum()
    assert loss(w, hqq(w, grid, scale_dtype=torch.float32)).sum() - least.sum() < 0.85 * start


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_unit_of_the_weights_does_not_matter(symmetric: bool) -> None:
    grid = Grid(3, symmetric, 16)
    large, small = (hqq(weight() * unit, grid, scale_dtype=torch.float32) for unit in (1, 2.0**-12))
    assert large == replace(small, scale=small.scale * 2**12)


def test_without_iterations_it_is_round_to_nearest() -> None:
    grid = Grid(3, False, 16)
    assert hqq(weight(), grid, scale_dtype=torch.bfloat16, iterations=0) == rtn(
        weight(), grid, scale_dtype=torch.bfloat16
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_zero_points_stay_on_the_grid_and_scales_in_their_dtype(grid: Grid) -> None:
    tensor = hqq(weight(), grid, scale_dtype=torch.bfloat16)
    for values in (tensor.codes, *(() if grid.symmetric else (tensor.zero_point,))):
        assert values.dtype == torch.int8
        assert grid.qmin <= values.min()
        assert values.max() <= grid.qmax
    assert tensor.scale.dtype == torch.bfloat16
    assert tensor.scale.shape == (24, grid.num_groups(64))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5, 1e-6, -1e-6])
def test_groups_of_one_value_are_met(symmetric: bool, dtype: torch.dtype, value: float) -> None:
    w = torch.cat([torch.full((3, 8), value), weight(3, 8)], dim=1)
    tensor = hqq(w, Grid(4, symmetric, 8), scale_dtype=dtype)
    assert torch.allclose(tensor.dequantize()[:, :8], w[:, :8], rtol=0.01, atol=1e-7)


def test_slices_of_rows_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(3, False, 16)
    whole = hqq(weight(), grid, scale_dtype=torch.bfloat16)
    monkeypatch.setattr(ranges, "SLICE", 5 * 64)
    assert hqq(weight(), grid, scale_dtype=torch.bfloat16) == whole


@pytest.mark.parametrize("grid", [FP8, NVFP4, MXFP4], ids=lambda grid: grid.format)
def test_float_grids_are_refused_with_the_methods_that_take_them(grid: Grid) -> None:
    with pytest.raises(ValueError, match=f"{grid.format} is none. Use rtn or gptq"):
        hqq(weight(), grid, scale_dtype=torch.float32)


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weight()
    w[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        hqq(w, Grid(4), scale_dtype=torch.float32)


@pytest.mark.parametrize("poisoned", [True, False])
def test_the_stage_quantizes_its_layers_and_names_the_one_that_cannot_be(poisoned: bool) -> None:
    class Bench:
        """What HQQ.apply needs of a block."""

        sites = (type("Site", (), {"layers": ("q", "k")}),)
        done: ClassVar[dict[str, QuantizedTensor]] = {}

        def quantize(self, name: str, tensor: QuantizedTensor, inputs: Grid | None) -> None:
            self.done[name] = tensor

        def weight(self, name: str) -> Tensor:
            return weight() / (0 if poisoned else 1)

        def scale_dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

    bench, stage = Bench(), HQQ("w3a16", 32, False, p=0.5, beta=5, iterations=3)
    if poisoned:
        with pytest.raises(NumericalError, match="^k: "):
            stage.apply(bench, {"k": stage.resolved})
    else:
        (report,) = stage.apply(bench, {"k": stage.resolved})
        grid = stage.resolved.weights
        expected = hqq(weight(), grid, scale_dtype=torch.bfloat16, p=0.5, beta=5, iterations=3)
        assert bench.done == {"k": expected}
        assert report.error == pytest.approx(10 ** (-sqnr(weight(), expected.dequantize()) / 10), rel=1e-3)


def test_only_a_fixed_scale_of_the_inputs_needs_calibration() -> None:
    assert not HQQ("w4a16").calibrated
    assert not HQQ("w8a8").calibrated
    assert HQQ("w8a8-static").calibrated


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "w9a16"}, "unknown scheme 'w9a16'"),
        ({"scheme": "nvfp4"}, "scheme nvfp4 has float weights. Use rtn or gptq"),
        ({"scheme": "nf4"}, "scheme nf4 has float weights. Use rtn or gptq"),
        ({"p": 0}, "p=0, beta=10.0, iterations=20: p must be above 0"),
        ({"p": 1.5}, "p=1.5, beta=10.0, iterations=20: p must be above 0 and at most 1"),
        ({"beta": 0}, "p=0.7, beta=0, .* beta above 0"),
        ({"iterations": -1}, "iterations=-1: .* iterations at least 0"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQQ(**{"scheme": "w4a16", **fields})
