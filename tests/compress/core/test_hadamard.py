"""Rotations: orthogonal at every size, flat where a Hadamard matrix exists, centred ones keep means."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from compress.core.hadamard import Rotation, factors, hadamard, kronecker, largest_power_of_two, random_rotation

SIZES = (1, 2, 3, 5, 12, 28, 36, 43, 64, 108, 172, 384, 768, 896, 1024, 1536)
FLAT = (1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 64, 76, 84, 108, 128, 384, 768, 896, 1536)


def identity(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def rotation(size: int, *, centred: bool = False) -> Rotation:
    return random_rotation(size, torch.Generator().manual_seed(size), centred=centred)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centred", [False, True])
def test_a_rotation_of_any_size_is_orthogonal(size: int, centred: bool) -> None:
    matrix = rotation(size, centred=centred).apply(identity(size))
    assert_close(matrix @ matrix.T, identity(size), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centred", [False, True])
def test_undo_takes_back_what_apply_did(size: int, centred: bool) -> None:
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotation(size, centred=centred)
    assert_close(turned.undo(turned.apply(x)), x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", FLAT)
def test_where_a_hadamard_matrix_is_known_one_large_coordinate_becomes_equal_small_ones(size: int) -> None:
    matrix = rotation(size).apply(identity(size))
    assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_a_centred_rotation_keeps_the_mean_of_every_vector(size: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(rotation(size, centred=True).apply(x).mean(dim=-1), x.mean(dim=-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [64, 384, 1024])
def test_a_centred_rotation_spreads_a_large_coordinate_too(size: int) -> None:
    off_the_mean = rotation(size, centred=True).apply(identity(size)).abs().max()
    assert off_the_mean < 6 * size**-0.5


def test_a_product_of_factors_is_their_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (2, 3, 4))
    x = torch.randn(5, 24, dtype=torch.float64, generator=generator)
    expected = x @ torch.kron(first, torch.kron(second, third))
    assert_close(kronecker(x, (first, second, third)), expected)


def test_factors_stay_small() -> None:
    assert [len(factor) for factor in factors(4096)] == [64, 64]
    assert [len(factor) for factor in factors(14336)] == [32, 16, 28]


@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_the_hadamard_of_runs_is_its_own_inverse_and_stays_within_a_run(size: int) -> None:
    x = torch.randn(3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(hadamard(hadamard(x, size), size), x, atol=1e-12, rtol=0)
    impulse = torch.zeros(96, dtype=torch.float64)
    impulse[0] = 1
    assert hadamard(impulse, size)[size:].eq(0).all()
    assert_close(hadamard(impulse, size)[:size].abs(), torch.full((size,), size**-0.5, dtype=torch.float64))


def test_the_largest_power_of_two_divides() -> None:
    assert [largest_power_of_two(n) for n in (1, 6, 172, 1024, 11008)] == [1, 2, 4, 1024, 256]
