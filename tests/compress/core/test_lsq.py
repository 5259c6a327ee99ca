"""Learned step sizes: what is trained is what is stored, and every gradient is the one that is written down."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.core.affine import by_group, quantize
from compress.core.lsq import fake_quantize, rounded
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import choose
from compress.core.scheme import FP8, NF4, WEIGHT_BITS, Grid
from compress.errors import NumericalError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]
FEW = [Grid(bits, symmetric, 8) for bits in (2, 4) for symmetric in (True, False)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(rows: int = 5, columns: int = 32) -> Tensor:
    return normal(0, rows, columns)


def params(w: Tensor, grid: Grid, shrunk: float = 0.8) -> tuple[Tensor, Tensor | None]:
    """Float32 parameters as training has them: between what can be stored, and some weights are clamped."""
    scale, zero_point = choose(w, grid, torch.float32, "minmax")
    jitter = 0.3 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(1))
    return shrunk * scale, None if zero_point is None else zero_point.float() + jitter


def straight_through(w: Tensor, s: Tensor, z: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The same by autograd: each rounding adds a constant."""

    def through(x: Tensor, rounded: Tensor) -> Tensor:
        return x + (rounded - x).detach()

    step = through(s, s.to(dtype).float()).unsqueeze(-1)
    zero = torch.zeros(()) if z is None else through(z, z.round().clamp(grid.qmin, grid.qmax)).unsqueeze(-1)
    levels = by_group(w, grid) / step
    codes = (through(levels, levels.round()) + zero).clamp(grid.qmin, grid.qmax)
    return ((codes - zero) * step).view_as(w)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forward_pass_is_the_quantized_tensor_that_is_stored_bit_for_bit(grid: Grid, dtype: torch.dtype) -> None:
    w = weight()
    scale, zero_point = params(w, grid)
    tensor = rounded(w, scale, zero_point, grid, dtype)
    assert tensor.scale.dtype == dtype
    stored_zero = None if zero_point is None else zero_point.round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    assert tensor == quantize(w, scale.to(dtype), stored_zero, grid)
    for compute in DTYPES:
        fake = fake_quantize(w.to(compute), scale, zero_point, grid, dtype)
        assert fake.dtype == compute
        assert torch.equal(fake, rounded(w.to(compute), scale, zero_point, grid, dtype).dequantize(compute))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_was_quantized_elsewhere_begins_as_it_is(grid: Grid) -> None:
    w = weight()
    first = quantize(w, *choose(w, grid, torch.bfloat16, "mse"), grid)
    zero_point = None if first.zero_point is None else first.zero_point.float()
    assert rounded(w, first.scale.float(), zero_point, grid, torch.bfloat16) == first


@pytest.mark.parametrize("grid", FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_straight_through_rounding(grid: Grid, dtype: torch.dtype) -> None:
    w = weight().requires_grad_()
    scale, zero_point = params(w.detach(), grid)
    leaves = [w, scale.requires_grad_()]
    if zero_point is not None:
        leaves.append(zero_point.requires_grad_())
    seen = normal(2, *w.shape)
    found = torch.autograd.grad((fake_quantize(w, scale, zero_point, grid, dtype) * seen).sum(), leaves)
    wanted = torch.autograd.grad((straight_through(w, scale, zero_point, grid, dtype) * seen).sum(), leaves)
    factor = 1 / math.sqrt(8 * grid.qmax)
    assert_close(found[0], wanted[0])
    for mine, its in zip(found[1:], wanted[1:], strict=True):
        assert_close(mine, factor * its, atol=1e-5, rtol=1e-4)
        assert mine.any()


def gradient_of_scale(value: float, scale: float, bits: int, zero_point: float | None = None) -> tuple[float, ...]:
    """Gradients in a weight, a scale and a zero point that stand alone, without the factor."""
    grid = Grid(bits, zero_point is None)
    w, s = (torch.full((1, 1), x, requires_grad=True) for x in (value, scale))
    leaves, z = [w, s], None
    if zero_point is not None:
        z = torch.full((1, 1), zero_point, requires_grad=True)
        leaves.append(z)
    gradients = torch.autograd.grad(fake_quantize(w, s, z, grid, torch.float32).sum(), leaves)
    return float(gradients[0]), *(float(gradient) * math.sqrt(grid.qmax) for gradient in gradients[1:])


@pytest.mark.parametrize(
    ("level", "of_weight", "of_scale"),
    [
        (0.0, 1, 0.0),
        (0.2, 1, -0.2),
        (0.7, 1, 0.3),
        (-2.4, 1, 0.4),
        (6.9, 1, 0.1),
        (7.6, 0, 7.0),
        (100.0, 0, 7.0),
        (-7.9, 1, -0.1),
        (-8.6, 0, -8.0),
        (-100.0, 0, -8.0),
    ],
)
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_one_weight_has_the_gradients_of_the_paper(
    level: float, of_weight: float, of_scale: float, scale: float
) -> None:
    """Four bits, whatever the sign of the scale: round(v) - v inside, -Qn or Qp outside."""
    found = gradient_of_scale(level * scale, scale, 4)
    assert found == pytest.approx((of_weight, of_scale), abs=1e-5)


@pytest.mark.parametrize("level", [7.4, -8.4])
def test_a_weight_within_half_a_level_of_the_end_is_not_clamped_yet(level: float) -> None:
    end = round(level)
    assert gradient_of_scale(0.25 * level, 0.25, 4) == pytest.approx((1, end - level), abs=1e-5)


@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        (1.2, (1, -0.2, 0)),  # code 4 of -8 … 7
        (5.0, (0, 7 - 3, -0.25)),
        (-12.0, (0, -8 - 3, -0.25)),
    ],
)
def test_a_zero_point_moves_what_is_clamped_and_nothing_else(level: float, wanted: tuple[float, ...]) -> None:
    assert gradient_of_scale(0.25 * level, 0.25, 4, 3.0) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("grid", FEW, ids=str)
def test_where_nothing_is_rounded_anew_the_scale_s_gradient_is_that_of_finite_differences(grid: Grid) -> None:
    """With codes as they are, ŵ grows with s by c - z; straight through, an unclamped weight adds -w / s to that."""
    w = weight()
    scale, zero_point = params(w, grid)
    before = rounded(w, scale, zero_point, grid, torch.float32)
    step = 1e-3 * scale
    zero = before.zero_point
    higher, lower = (QuantizedTensor(before.codes, scale + sign * step, zero, grid).dequantize() for sign in (1, -1))
    slope = by_group(higher.double() - lower.double(), grid) / (2 * step.double().unsqueeze(-1))
    levels = by_group(w, grid) / scale.unsqueeze(-1)
    unclamped = levels.round() + (0 if zero is None else zero.float().unsqueeze(-1))
    inside = (unclamped >= grid.qmin) & (unclamped <= grid.qmax)
    seen = normal(2, *w.shape)
    wanted = (by_group(seen, grid) * (slope - levels * inside)).sum(-1) / math.sqrt(8 * grid.qmax)
    leaf = scale.clone().requires_grad_()
    (found,) = torch.autograd.grad((fake_quantize(w, leaf, zero_point, grid, torch.float32) * seen).sum(), leaf)
    assert 0 < int((~inside).sum()) < inside.numel() / 2
    assert_close(found.double(), wanted, atol=1e-4, rtol=1e-3)


def test_the_gradient_of_a_scale_does_not_grow_with_its_group() -> None:
    """Of weights whose gradients have no common direction, as is assumed: the sum grows like √N, the factor falls."""
    norms = []
    for columns in (64, 4096):
        leaf = torch.full((64, 1), 0.3, requires_grad=True)
        fake = fake_quantize(normal(0, 64, columns), leaf, None, Grid(4), torch.float32)
        (gradient,) = torch.autograd.grad((fake * normal(1, 64, columns)).sum(), leaf)
        norms.append(float(gradient.square().mean().sqrt()))
    assert norms[1] / norms[0] == pytest.approx(1, rel=0.3)


def test_only_what_is_asked_for_has_a_gradient_and_a_fixed_zero_point_may_be_of_integers() -> None:
    w, grid = weight(), Grid(4, symmetric=False)
    scale, zero_point = choose(w, grid, torch.float32, "minmax")
    leaf = scale.clone().requires_grad_()
    fake = fake_quantize(w, leaf, zero_point, grid, torch.float32)
    fake.sum().backward()
    assert leaf.grad is not None
    assert w.grad is None
    assert rounded(w, scale, zero_point, grid, torch.float32).zero_point is not None
    assert not fake_quantize(w, scale, zero_point, grid, torch.float32).requires_grad


def test_a_weight_in_bfloat16_gets_a_gradient_in_bfloat16_and_its_scale_one_in_float32() -> None:
    w = weight().bfloat16().requires_grad_()
    scale = params(w.detach().float(), Grid(4))[0].requires_grad_()
    fake_quantize(w, scale, None, Grid(4), torch.bfloat16).sum().backward()
    assert w.grad is not None
    assert scale.grad is not None
    assert (w.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_that_has_shrunk_to_nothing_stays_off_zero(dtype: torch.dtype) -> None:
    for tiny in (0.0, 1e-45, -1e-45):
        tensor = rounded(weight(), torch.full((5, 1), tiny), None, Grid(4), dtype)
        assert (tensor.scale.float() != 0).all()
        assert tensor.dequantize().isfinite().all()


def test_a_zero_point_that_has_left_the_grid_is_stored_at_its_end() -> None:
    tensor = rounded(weight(), torch.ones(5, 1), torch.full((5, 1), 12.3), Grid(4, symmetric=False), torch.float32)
    assert (tensor.zero_point == 7).all()


def test_descent_on_weights_scales_and_zero_points_loses_less_than_the_best_rounding() -> None:
    """A layer whose inputs are correlated, at two bits: what the search over ranges of single groups cannot see."""
    w, grid = normal(0, 16, 32), Grid(2, symmetric=False, group_size=16)
    x = normal(1, 512, 8) @ normal(2, 8, 32) + 0.3 * normal(3, 512, 32)
    scale, zero_point = choose(w, grid, torch.bfloat16, "mse")
    assert zero_point is not None
    leaves = [each.float().clone().requires_grad_() for each in (w, scale, zero_point)]
    losses = []
    for step in range(200):
        error = x @ (fake_quantize(*leaves, grid, torch.bfloat16) - w).T
        losses.append(float(error.detach().square().mean()))
        gradients = torch.autograd.grad(error.square().mean(), leaves)
        with torch.no_grad():
            for leaf, gradient, rate in zip(leaves, gradients, (1e-2, 1e-3, 3e-2), strict=True):
                leaf -= rate * (1 - step / 200) * gradient.sign()
    final = rounded(*leaves, grid, torch.bfloat16)
    after = float((x @ (final.dequantize() - w).T).square().mean())
    assert losses[0] == pytest.approx(
        float((x @ (quantize(w, scale, zero_point, grid).dequantize() - w).T).square().mean())
    )
    assert after < 0.6 * losses[0]
    assert final.scale.dtype == torch.bfloat16
    assert not torch.equal(final.scale, scale)


@pytest.mark.parametrize("grid", [FP8, NF4, Grid(8, rows=None)], ids=str)
def test_grids_that_are_not_of_integers_by_rows_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="integer grids with scales for each row"):
        rounded(weight(5, 64), torch.ones(5, 1), None, grid, torch.float32)


@pytest.mark.parametrize(("symmetric", "zero_point"), [(True, torch.zeros(5, 1)), (False, None)])
def test_a_zero_point_goes_with_an_asymmetric_grid(symmetric: bool, zero_point: Tensor | None) -> None:
    with pytest.raises(ValueError, match="symmetric grid has no zero point"):
        rounded(weight(), torch.ones(5, 1), zero_point, Grid(4, symmetric), torch.float32)


def test_training_that_has_diverged_is_noticed() -> None:
    w, scale = weight(), torch.ones(5, 1)
    with pytest.raises(NumericalError, match="1 of 5 scales are no finite torch.float16"):
        rounded(w, torch.tensor([[1.0], [1e6], [1], [1], [1]]), None, Grid(4), torch.float16)
    w[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="1 of 160 weights"):
        fake_quantize(w, scale, None, Grid(4), torch.float32)
