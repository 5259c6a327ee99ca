from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.core import linalg
from compress.core.linalg import (
    NotPositiveDefinite,
    dead_columns,
    inverse_cholesky,
    invert_upper_,
    pivot_order,
    reverse_,
)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def gram(n: int, tokens: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return x.T @ x / tokens


@pytest.mark.parametrize("n", [1, 2, 7, 130, 300])
def test_the_factor_is_upper_and_its_square_is_the_inverse(n: int) -> None:
    H = gram(n, 4 * n)
    U, used = inverse_cholesky(H, 0.01)
    assert used == 0.01
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ damped(H, 0.01), torch.eye(n, dtype=torch.float64), atol=1e-8)


def test_the_hessian_is_left_as_it_was() -> None:
    H = gram(6, 30)
    before = H.clone()
    inverse_cholesky(H, 0.01)
    pivot_order(H, 0.01)
    assert torch.equal(H, before)


def test_damping_is_raised_tenfold_until_the_hessian_can_be_factored() -> None:
    H = torch.eye(40, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    U, used = inverse_cholesky(H, 0.01)
    assert used == pytest.approx(0.1)
    assert torch.allclose(U.T @ U @ damped(H, used), torch.eye(40, dtype=torch.float64), atol=1e-8)


def test_damping_is_raised_for_fewer_tokens_than_inputs() -> None:
    U, used = inverse_cholesky(gram(40, 3), 1e-20)
    assert 1e-20 < used < 1e-9
    assert U.isfinite().all()


def test_an_indefinite_hessian_is_given_up_on_after_damping_by_the_whole_mean() -> None:
    H = torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 5
    with pytest.raises(NotPositiveDefinite, match="even with damping 1:"):
        inverse_cholesky(H, 0.01)


@pytest.mark.parametrize("n", [1, 129, 400])
def test_inverting_a_triangle_by_halves_equals_inverting_it_at_once(n: int) -> None:
    triangle = torch.linalg.cholesky(gram(n, 4 * n)).T.contiguous()
    inverse = torch.linalg.inv(triangle)
    assert torch.allclose(invert_upper_(triangle), inverse, rtol=1e-6, atol=1e-9 * float(inverse.abs().max()))


def test_dead_columns_are_those_without_energy_relative_to_the_mean() -> None:
    H = torch.diag(torch.tensor([1.0, 0.0, 1e-14, 1e-9], dtype=torch.float64))
    assert dead_columns(H).tolist() == [False, True, True, False]


@pytest.mark.parametrize("n", [1, 2, 5, 64, 130])
def test_a_matrix_is_reversed_in_place(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "ROWS", 3)
    matrix = torch.randn(n, n)
    expected = matrix.flip(0, 1)
    assert torch.equal(reverse_(matrix), expected)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hessian_is_copied_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensors made on the way: no two of them live at a time."""
    H = gram(1500, 1600).to(dtype)
    H.diagonal().add_(1)
    assert most_bytes(lambda: pivot_order(H, 0.01)) < 1.5 * H.numel() * 4
    assert most_bytes(lambda: inverse_cholesky(H, 0.01)) < 1.8 * H.nbytes


def most_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch held at a time, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("n", [5, 32, 33, 200])
def test_the_pivot_order_is_a_permutation(n: int) -> None:
    assert pivot_order(gram(n, 4 * n), 0.01).sort().values.tolist() == list(range(n))


def test_the_pivot_order_ranks_independent_inputs_by_energy() -> None:
    energy = torch.randperm(100, generator=torch.Generator().manual_seed(0)).double() + 1
    assert torch.equal(pivot_order(torch.diag(energy), 0.01), energy.argsort(descending=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_pivot_order_promises_less_error_than_sorting_by_energy(seed: int) -> None:
    H = gram(200, 800, seed)
    H = H * torch.outer(*[torch.logspace(-1, 1, 200, dtype=torch.float64)] * 2)

    def expected_error(order: Tensor) -> float:
        U, _ = inverse_cholesky(H[order.unsqueeze(1), order], 0.01)
        return float(U.diagonal().pow(-2).sum())

    assert expected_error(pivot_order(H, 0.01)) < expected_error(H.diagonal().argsort(descending=True))


def test_the_pivot_order_survives_a_singular_hessian() -> None:
    assert pivot_order(torch.ones(100, 100, dtype=torch.float64), 1e-12).sort().values.tolist() == list(range(100))
