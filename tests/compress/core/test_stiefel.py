"""Descent on orthogonal matrices: never leaves them, goes down, finds what was planted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.core.hadamard import random_rotation
from compress.core.stiefel import begin, descend, deviation, nearest_orthogonal, skew_gradient, turned

SIZES = (1, 2, 3, 17, 64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, *, seed: int = 0, centred: bool = False) -> Tensor:
    eye = torch.eye(size, dtype=torch.float64)
    return random_rotation(size, torch.Generator().manual_seed(seed), centred=centred).apply(eye)


def skew(size: int, seed: int = 0) -> Tensor:
    matrix = normal(size, size, seed=seed)
    return matrix - matrix.T


def minimum(
    start: Tensor, function: Callable[[Tensor], Tensor], *, steps: int, rate: float, centred: bool = False
) -> Tensor:
    descent = begin(start)
    for step in range(steps):
        variable = descent.rotation.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(variable), variable)
        descent = descend(descent, gradient, rate * (1 - step / steps), centred=centred)
    return descent.rotation


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_a_turn_of_any_size_keeps_a_matrix_orthogonal(size: int, length: float) -> None:
    assert deviation(turned(rotation(size), length * skew(size))) < 1e-12


def test_a_small_turn_is_the_exponential_up_to_its_third_power() -> None:
    R, direction = rotation(16), skew(16) / 16
    errors = [
        float((turned(R, size * direction) - R @ torch.linalg.matrix_exp(size * direction)).norm())
        for size in (1e-1, 1e-2)
    ]
    assert errors[0] / errors[1] == pytest.approx(1000, rel=0.05)


def test_the_direction_of_ascent_is_what_a_function_gains_by_turning() -> None:
    R, G, direction = rotation(8), normal(8, 8), skew(8, seed=1)
    gain = ((turned(R, 1e-6 * direction) - turned(R, -1e-6 * direction)) * G).sum() / 2e-6
    assert_close((skew_gradient(R, G) * direction).sum(), gain, rtol=1e-8, atol=0)
    assert torch.equal(skew_gradient(R, G), -skew_gradient(R, G).T)


def test_many_large_steps_in_all_directions_never_leave_the_orthogonal_matrices() -> None:
    descent = begin(rotation(64))
    for step in range(500):
        descent = descend(descent, normal(64, 64, seed=step), 0.5)
    assert deviation(descent.rotation) < 1e-12
    assert (descent.rotation - rotation(64)).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_first_step_turns_axes_by_its_rate_however_large_the_gradient(scale: float) -> None:
    R = rotation(64)
    after = descend(begin(R), scale * normal(64, 64), 0.01, momentum=0).rotation
    assert float((after - R).norm() / 8) == pytest.approx(0.01, rel=1e-3)


def test_steps_that_agree_turn_by_the_rate_and_steps_that_do_not_by_less() -> None:
    descent = begin(rotation(64))
    for _ in range(100):
        descent = descend(descent, descent.rotation @ skew(64), 0.01)
    assert float(descent.ascent.norm() / 8) == pytest.approx(1, rel=1e-3)
    for seed in range(100):
        descent = descend(descent, descent.rotation @ skew(64, seed), 0.01)
    assert float(descent.ascent.norm() / 8) < 0.5


def test_without_a_gradient_a_descent_stays_where_it_began() -> None:
    descent = descend(begin(rotation(5)), torch.zeros(5, 5, dtype=torch.float64), 0.1)
    assert torch.equal(descent.rotation, rotation(5))


@pytest.mark.parametrize("size", [3, 17, 64])
def test_descent_finds_the_rotation_that_aligns_two_clouds(size: int) -> None:
    x = normal(200, size)
    hidden = turned(torch.eye(size, dtype=torch.float64), skew(size) / size**0.5)
    found = minimum(
        torch.eye(size, dtype=torch.float64), lambda R: (x @ R - x @ hidden).square().sum(), steps=300, rate=0.1
    )
    assert_close(found, hidden, atol=5e-3, rtol=0)


def test_descent_on_a_quartic_separates_what_was_mixed() -> None:
    """Sums of fourth powers of independent signs, mixed by a rotation, are least in the signs' own coordinates."""
    sources = normal(2000, 8).sign()
    hidden = turned(torch.eye(8, dtype=torch.float64), skew(8) / 3)
    found = minimum(rotation(8), lambda R: (sources @ hidden.T @ R).pow(4).sum(), steps=200, rate=0.2)
    back = (hidden.T @ found).abs()
    assert_close(back.amax(dim=0), torch.ones(8, dtype=torch.float64), atol=1e-2, rtol=0)
    assert_close(back.amax(dim=1), torch.ones(8, dtype=torch.float64), atol=1e-2, rtol=0)


def test_a_centred_rotation_keeps_means_all_the_way() -> None:
    x, start = normal(50, 24), rotation(24, centred=True)
    assert_close((x @ start).mean(dim=1), x.mean(dim=1), atol=1e-12, rtol=0)
    found = minimum(start, lambda R: (x @ R).pow(4).sum(), steps=50, rate=0.1, centred=True)
    assert_close((x @ found).mean(dim=1), x.mean(dim=1), atol=1e-12, rtol=0)
    assert (x @ found).pow(4).sum() < 0.98 * (x @ start).pow(4).sum()
    assert deviation(found) < 1e-12


def test_a_step_gives_the_same_every_time_and_changes_nothing_it_was_given() -> None:
    R, G = rotation(16), normal(16, 16)
    kept = R.clone(), G.clone()
    first, second = (descend(begin(R), G, 0.1).rotation for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(R, kept[0])
    assert torch.equal(G, kept[1])


@pytest.mark.parametrize("size", SIZES)
def test_the_nearest_orthogonal_matrix_is_the_polar_factor(size: int) -> None:
    disturbed = rotation(size) + 0.1 / size * normal(size, size)
    U, _, V = torch.linalg.svd(disturbed)
    found = nearest_orthogonal(disturbed)
    assert_close(found, U @ V, atol=1e-10, rtol=0)
    assert deviation(found) <= 1e-12


def test_what_rounding_to_float32_has_disturbed_is_orthogonal_to_float64_again() -> None:
    disturbed = rotation(384).float()
    assert deviation(disturbed.double()) > 1e-10
    assert deviation(nearest_orthogonal(disturbed)) <= 1e-12


@pytest.mark.parametrize("matrix", [normal(8, 8), torch.zeros(3, 3), torch.full((2, 2), torch.nan)], ids=str)
def test_a_matrix_that_is_far_from_orthogonal_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        nearest_orthogonal(matrix)
