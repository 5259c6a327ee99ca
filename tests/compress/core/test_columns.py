from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.columns import Feedback, round_float, round_integer
from compress.core.floats import quantize_float
from compress.core.linalg import inverse_cholesky
from compress.core.metrics import quadratic_error
from compress.core.scheme import FP8, MXFP4, NF4, NVFP4, Grid
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern

PATTERNS = [Pattern(0.5), Pattern(n=2, m=4)]


def weight(rows: int = 12, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def hessian(columns: int = 64, tokens: int = 2000) -> Tensor:
    """Of inputs that share a few directions, as real ones do."""
    generator = torch.Generator().manual_seed(1)
    shared, own = (torch.randn(tokens, count, dtype=torch.float64, generator=generator) for count in (8, columns))
    x = shared @ torch.randn(8, columns, dtype=torch.float64, generator=generator) + own
    return x.T @ x / tokens


def feedback(H: Tensor, order: Tensor | None = None) -> Feedback:
    order = torch.arange(len(H)) if order is None else order
    upper = inverse_cholesky(H, 0.01, order)[0]
    return Feedback(order, (upper / upper.diagonal().unsqueeze(1)).float(), None, block_size=16)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_on_a_fine_grid_with_the_zeros_of_sparsegpt_it_is_sparsegpt(pattern: Pattern) -> None:
    """To within the steps of 8 bits, which the feedback carries on. One large weight a row leaves room for it."""
    W, H = weight(), hessian()
    W[:, 0] = 6
    pruned = sparsegpt(W, H, pattern)
    energy = H.diagonal().float()
    ours = round_integer(W, ~pruned.mask, feedback(H), Grid(8), torch.float32, "minmax", energy, static=True)
    result = ours.dequantize()
    assert not result[~pruned.mask].any()
    moved = (pruned.weight - W * pruned.mask).norm()
    assert (result - pruned.weight).norm() < 0.1 * moved


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_zeros_end_as_zeros_and_the_others_make_up_for_it(
    pattern: Pattern, group_size: int | None, symmetric: bool, static: bool
) -> None:
    W, H = weight(), hessian()
    zeros = ~sparsegpt(W, H, pattern).mask
    order = torch.arange(64) if static is False else torch.randperm(64, generator=torch.Generator().manual_seed(2))
    grid, energy = Grid(4, symmetric, group_size), H.diagonal().float()

    def solved(turn: Feedback) -> Tensor:
        return round_integer(W, zeros, turn, grid, torch.float32, "importance", energy, static).dequantize()

    made_up = solved(feedback(H, order))
    alone = solved(Feedback(order, torch.eye(64), None, block_size=16))
    assert not made_up[zeros].any()
    assert quadratic_error(W, made_up, H) < 0.8 * quadratic_error(W, alone, H)


@pytest.mark.parametrize("grid", [NVFP4, MXFP4, NF4, FP8], ids=str)
def test_so_do_those_of_float_grids(grid: Grid) -> None:
    W, H = weight(), hessian()
    zeros = ~sparsegpt(W, H, Pattern(n=2, m=4)).mask
    nearest = quantize_float(W, grid, torch.float32)
    codes = round_float(W, zeros, feedback(H), grid, nearest.step)
    result = type(nearest)(codes, nearest.scale, None, grid, nearest.global_scale).dequantize()
    assert not result[zeros].any()
    assert quadratic_error(W, result, H) < 0.8 * quadratic_error(W, nearest.dequantize() * ~zeros, H)
