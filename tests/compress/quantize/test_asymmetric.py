from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from compress.core.linalg import NotPositiveDefinite, inverse_cholesky
from compress.core.metrics import quadratic_error
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.errors import NumericalError
from compress.quantize import asymmetric as module
from compress.quantize.asymmetric import LIMIT, Target, closed_form, gptaq, qronos
from compress.quantize.gptq import ActOrder, gptq

WIDTH = 12
ORDERS = get_args(ActOrder)
TARGETS = get_args(Target)


def streams(drift: float = 0.2, width: int = WIDTH, tokens: int = 500) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and what errors of earlier layers make of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, width, dtype=torch.float64, generator=generator)

    x = normal(tokens) @ normal(width)
    return x, x + drift * (normal(tokens) + x @ normal(width) / width)


def moments(x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """H and G."""
    return given.T @ given / len(given), x.T @ given / len(given)


def weight(rows: int = 5, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_closed_form_is_the_least_squares_solution() -> None:
    x, given = streams()
    target, moved = closed_form(weight(), *moments(x, given), damping=1e-14, share=1)
    assert 0.01 < moved.max() < LIMIT
    assert torch.allclose(target, torch.linalg.lstsq(given, x @ weight().T).solution.T, rtol=1e-6)


def test_damping_is_a_price_on_leaving_the_weight() -> None:
    x, given = streams()
    H, G = moments(x, given)
    ridge = torch.eye(WIDTH, dtype=torch.float64) * (0.1 * H.diagonal().mean() * len(x)).sqrt()
    left, right = torch.cat([given, ridge]), torch.cat([x, ridge]) @ weight().T
    target, _ = closed_form(weight(), H, G, damping=0.1, share=1)
    assert torch.allclose(target, torch.linalg.lstsq(left, right).solution.T, rtol=1e-6)


def test_on_any_grid_the_weights_nearest_to_the_target_reproduce_the_original_output_best() -> None:
    x, given = streams(0.05, width=4)
    H, G = moments(x, given)
    w = weight(1, 4)
    target, _ = closed_form(w, H, G, damping=1e-14, share=1)
    every = torch.tensor(list(product([-1.5, -0.5, 0.5, 1.5], repeat=4)), dtype=torch.float64)
    error = (x @ w.T - given @ every.T).square().mean(0)
    distance = (((every - target) @ H) * (every - target)).sum(1)
    assert torch.allclose(error - distance, (error - distance)[0].expand(len(every)), rtol=1e-6)
    assert error.argmin() == distance.argmin()


def test_qronos_rounds_one_column_as_if_alone_and_lets_the_others_solve_the_problem_that_leaves() -> None:
    x, given = streams(0.05)
    H, G = moments(x, given)
    w = weight()
    goal, _ = closed_form(w, H, G, damping=1e-14, share=1)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    upper, _ = inverse_cholesky(H, 1e-14, order)
    start = qronos(w, goal, H, G, upper, order, share=1)
    first, rest = order[0], order[1:]
    alone = torch.linalg.lstsq(given[:, first : first + 1], x @ w.T - given[:, rest] @ w[:, rest].T).solution[0]
    assert torch.allclose(start[:, first], alone)
    rounded = alone.mul(4).round().div(4)
    fed_back = start[:, rest] - (alone - rounded).outer(upper[0, 1:] / upper[0, 0])
    left = x @ w.T - given[:, first].outer(rounded)
    assert torch.allclose(fed_back, torch.linalg.lstsq(given[:, rest], left).solution.T, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_drift_every_weight_stays_to_the_bit(dtype: torch.dtype) -> None:
    H, _ = moments(*streams())
    w = weight().to(dtype)
    target, moved = closed_form(w, H, H.clone())
    assert target.dtype == dtype
    assert torch.equal(target, w)
    assert (moved == 0).all()


def test_the_share_is_how_much_of_the_way_is_gone() -> None:
    H, G = moments(*streams())
    whole, far = closed_form(weight(), H, G, share=1)
    quarter, near = closed_form(weight(), H, G, share=0.25)
    assert torch.allclose(quarter, weight() + 0.25 * (whole - weight()))
    assert torch.allclose(near, 0.25 * far)


def test_inputs_that_never_fire_keep_their_weights() -> None:
    x, given = streams()
    given[:, ::4] = 0
    target, _ = closed_form(weight(), *moments(x, given), share=1)
    assert torch.equal(target[:, ::4], weight()[:, ::4])
    assert not torch.equal(target, weight())


def test_no_channel_moves_further_than_the_limit_and_those_below_it_are_left_alone() -> None:
    x, _ = streams()
    given = x.clone()
    given[:, :6] *= 0.5
    w = weight()
    w[0, :6] *= 0.01
    H, G = moments(x, given)
    target, moved = closed_form(w, H, G, damping=1e-12, share=1)
    wanted = w.clone()
    wanted[:, :6] *= 2
    change = target - w
    assert moved[0] < LIMIT < moved[1:].min()
    assert torch.allclose(moved, (wanted - w).norm(dim=1) / w.norm(dim=1), rtol=1e-4)
    assert torch.allclose(target[0], wanted[0], rtol=1e-4)
    assert torch.allclose(change[1:].norm(dim=1), LIMIT * w[1:].norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(change, wanted - w), torch.ones(5, dtype=torch.float64))


def test_rows_do_not_depend_on_each_other() -> None:
    H, G = moments(*streams(drift=2))
    whole, moved = closed_form(weight(), H, G)
    apart = [closed_form(part, H, G) for part in weight().split([2, 3])]
    assert moved.max() > LIMIT
    assert torch.allclose(whole, torch.cat([target for target, _ in apart]))


def test_panels_change_the_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    H, G = moments(*streams())
    whole, _ = closed_form(weight(), H, G)
    monkeypatch.setattr(module, "ROWS", 5)
    assert torch.allclose(closed_form(weight(), H, G)[0], whole)


def test_a_weight_of_zeros_stays() -> None:
    target, moved = closed_form(torch.zeros(2, WIDTH, dtype=torch.float64), *moments(*streams()))
    assert (target == 0).all()
    assert (moved == 0).all()


def test_gptaq_leaves_the_drift_of_each_column_to_the_best_later_columns_can_do() -> None:
    H, G = moments(*streams())
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    upper, _ = inverse_cholesky(H, 0.01, order)
    P = gptaq(H, G, upper, order, share=0.5)
    damped = (H + 0.01 * H.diagonal().mean() * torch.eye(WIDTH))[order][:, order]
    drift = (G - H)[order][:, order]
    assert torch.equal(P, P.triu(1))
    for j in range(WIDTH - 1):
        later = slice(j + 1, None)
        assert torch.allclose(P[j, later], 0.5 * torch.linalg.solve(damped[later, later], drift[j, later]))


def targets(H: Tensor, G: Tensor) -> list[Callable[[], object]]:
    order = torch.arange(len(H))
    upper, _ = inverse_cholesky(H, 0.01)
    return [lambda: closed_form(weight(), H, G), lambda: gptaq(H, G, upper, order)]


def test_nothing_given_is_changed() -> None:
    H, G = moments(*streams())
    before = H.clone(), G.clone()
    for call in targets(H, G):
        call()
    assert torch.equal(H, before[0])
    assert torch.equal(G, before[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_cross_moment_that_is_not_finite_is_refused(poison: float) -> None:
    H, G = moments(*streams())
    G[1, 2] = poison
    for call in targets(H, G):
        with pytest.raises(NumericalError, match="the cross moment has 1 NaN or infinite entries of 144"):
            call()


def test_a_hopeless_hessian_is_refused() -> None:
    H = torch.eye(WIDTH, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 9
    with pytest.raises(NotPositiveDefinite):
        closed_form(weight(), H, H)


def rounded(w: Tensor, H: Tensor, grid: Grid, **settings: object) -> QuantizedTensor:
    return gptq(w, H, grid, **{"scale_dtype": torch.float32, **settings}).tensor


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", ORDERS)
def test_without_a_drift_asymmetric_gptq_is_gptq(target: Target, order: str) -> None:
    H, _ = moments(*streams(width=64))
    settings = {"w": weight(16, 64).float(), "H": H, "grid": Grid(3, group_size=16), "act_order": order}
    assert rounded(**settings, cross=H.clone(), target=target) == rounded(**settings)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid", [Grid(2, False, 8), Grid(3), Grid(3, False), Grid(4, group_size=8)], ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_with_a_drift_it_is_nearer_to_the_original_output(target: Target, grid: Grid, sweeps: int) -> None:
    x, given = streams(1, width=64, tokens=2000)
    H, G = moments(x, given)
    w = weight(16, 64).float()

    def error(tensor: QuantizedTensor) -> float:
        return float((x @ w.double().T - given @ tensor.dequantize().double().T).square().mean())

    ours = rounded(w, H, grid, sweeps=sweeps, cross=G, target=target, share=1)
    assert error(ours) < 0.9 * error(rounded(w, H, grid, sweeps=sweeps))


@pytest.mark.parametrize("target", TARGETS)
def test_refinement_is_towards_the_target(target: Target) -> None:
    H, G = moments(*streams(1, width=64, tokens=2000))
    w = weight(16, 64).float()
    goal, _ = closed_form(w, H, G, share=1)
    before, after = (
        rounded(w, H, Grid(3), sweeps=sweeps, cross=G, target=target, share=1).dequantize() for sweeps in (0, 2)
    )
    assert quadratic_error(goal, after, H) < 0.95 * quadratic_error(goal, before, H)


def test_by_the_closed_form_it_is_gptq_of_another_weight() -> None:
    H, G = moments(*streams(width=64))
    w, grid = weight(16, 64).float(), Grid(3, False, 16)
    goal, moved = closed_form(w, H, G, share=0.7)
    result = gptq(w, H, grid, scale_dtype=torch.float32, cross=G, share=0.7)
    assert result.tensor == rounded(goal, H, grid)
    assert torch.equal(result.moved, moved)


def test_gptaq_is_the_recursion_of_its_paper() -> None:
    H, G = moments(*streams(1))
    w, grid = weight().float(), Grid(3)
    settings = {"range": "minmax", "act_order": "none", "sweeps": 0}
    ours = rounded(w, H, grid, **settings, cross=G, target="gptaq", share=0.25)
    scale, rest = ours.scale.double().squeeze(1), w.double()
    ridge = H + 0.01 * H.diagonal().mean() * torch.eye(WIDTH)
    for j in range(WIDTH):
        now = rest[:, j].clone()
        level = (now / scale).round().clamp(grid.qmin, grid.qmax)
        assert torch.equal(level.to(torch.int8), ours.codes[:, j])
        later = slice(j + 1, None)
        lost = torch.outer(now - level * scale, ridge[j, later]) + 0.25 * torch.outer(now, (G - H)[j, later])
        rest[:, later] += torch.linalg.solve(ridge[later, later], lost, left=False)


@pytest.mark.parametrize("order", ORDERS)
def test_the_block_size_changes_the_speed_of_gptaq_only(order: str) -> None:
    H, G = moments(*streams(1, width=64, tokens=2000))
    settings = {"act_order": order, "sweeps": 0, "cross": G, "target": "gptaq", "share": 1}
    few, many = (
        rounded(weight(16, 64).float(), H, Grid(4, group_size=16), block_size=size, **settings) for size in (5, 128)
    )
    assert (few.codes == many.codes).float().mean() > 0.99


@pytest.mark.parametrize("target", TARGETS)
def test_with_a_drift_too_inputs_that_never_fire_are_rounded_to_nearest(target: Target) -> None:
    x, given = streams(width=64)
    given[:, ::8] = 0
    H, G = moments(x, given)
    w = weight(16, 64).float()
    tensor = rounded(w, H, Grid(8), sweeps=0, cross=G, target=target)
    assert ((tensor.dequantize() - w)[:, ::8].abs() <= 0.501 * tensor.scale.abs()).all()


@pytest.mark.parametrize("target", TARGETS)
def test_gptq_refuses_a_cross_moment_that_is_not_finite(target: Target) -> None:
    H, G = moments(*streams())
    G[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="the cross moment has 1 NaN"):
        rounded(weight(), H, Grid(4), cross=G, target=target)
