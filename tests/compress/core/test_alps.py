from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from compress.core import alps as module
from compress.core.alps import alps
from compress.core.metrics import quadratic_error, relative_error
from compress.core.refit import refit
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern, keep_largest, wanda

PATTERNS = [Pattern(0.3), Pattern(0.5), Pattern(0.75), Pattern(n=2, m=4), Pattern(n=1, m=4), Pattern(n=4, m=8)]
DAMPING = 1e-6


def correlated(columns: int, tokens: int = 2000, seed: int = 1) -> Tensor:
    """A Hessian of inputs that share a few directions and differ in energy, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, columns // 4)
    shared = torch.randn(tokens, width, generator=generator) @ torch.randn(width, columns, generator=generator)
    x = (shared + torch.randn(tokens, columns, generator=generator)) * torch.logspace(-0.5, 0.5, columns)
    return (x.T @ x).double() / tokens


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_masks(rows: int, columns: int, pattern: Pattern) -> list[Tensor]:
    """Every mask of the pattern, of a layer so small that they can be listed."""
    size = pattern.m or rows * columns
    choices = [
        torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        for kept in combinations(range(size), pattern.num_kept(size))
    ]
    return [torch.cat(groups).view(rows, columns) for groups in product(choices, repeat=rows * columns // size)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("rows", "pattern"), [(1, Pattern(n=2, m=4)), (2, Pattern(0.5)), (1, Pattern(0.75))], ids=["2:4", "50%", "75%"]
)
def test_no_method_is_below_the_best_of_all_masks_and_alps_is_near_it(rows: int, pattern: Pattern, seed: int) -> None:
    columns = 8 // rows
    W, H = weight(rows, columns, seed), correlated(columns, seed=seed)
    optimum = min(
        quadratic_error(W, refit(W, H, mask, damping=DAMPING).weight, H) for mask in all_masks(rows, columns, pattern)
    )
    one_pass = sparsegpt(W, H, pattern, damping=DAMPING)
    ladder = [
        alps(W, H, pattern, damping=DAMPING).weight,
        refit(W, H, one_pass.mask, damping=DAMPING).weight,
        one_pass.weight,
    ]
    errors = [quadratic_error(W, each, H) for each in ladder]
    assert optimum <= errors[0] * (1 + 1e-4) <= errors[1] * (1 + 2e-4) <= errors[2] * (1 + 3e-4)
    assert errors[0] < 1.6 * optimum


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_the_count_is_exact_and_the_mask_is_that_of_the_weights(pattern: Pattern) -> None:
    result = alps(weight(12, 64), correlated(64), pattern)
    assert int(result.mask.sum()) == pattern.num_kept(12 * 64)
    assert torch.equal(result.weight != 0, result.mask)
    if pattern.m:
        assert (result.mask.view(-1, pattern.m).sum(dim=1) == pattern.n).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Pattern(0.7), Pattern(n=2, m=4)], ids=lambda pattern: pattern.name)
def test_alps_loses_clearly_less_than_sparsegpt_refitted(pattern: Pattern, seed: int) -> None:
    W, H = weight(48, 64, seed), correlated(64, seed=seed)
    one_pass = refit(W, H, sparsegpt(W, H, pattern).mask).weight
    ours = alps(W, H, pattern)
    assert ours.note is None
    assert relative_error(W, ours.weight, H) < 0.95 * relative_error(W, one_pass, H)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(n=2, m=4)], ids=lambda pattern: pattern.name)
def test_the_mask_settles_long_before_the_turns_run_out(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = weight(24, 64), correlated(64)
    whole = alps(W, H, pattern)
    monkeypatch.setattr(module, "TURNS", 60)
    assert torch.equal(alps(W, H, pattern).weight, whole.weight)


def test_the_scale_of_the_inputs_is_of_no_consequence() -> None:
    W, H = weight(24, 64), correlated(64)
    scale = 2.0 ** (torch.arange(64) % 5)
    plain, scaled = (
        alps(W / by, H * by * by.unsqueeze(1), Pattern(0.5), damping=1e-9) for by in (torch.ones(64), scale)
    )
    assert (plain.mask == scaled.mask).float().mean() > 0.99


def test_the_weights_are_the_best_on_their_mask() -> None:
    W, H = weight(12, 64), correlated(64)
    result = alps(W, H, Pattern(0.5))
    assert torch.equal(result.weight, refit(W, H, result.mask).weight)


def test_where_sparsegpt_does_better_it_is_returned_and_noted() -> None:
    noted = 0
    for seed in range(12):
        W, H, pattern = weight(1, 8, seed), correlated(8, seed=seed), Pattern(n=2, m=4)
        result, one_pass = alps(W, H, pattern), refit(W, H, sparsegpt(W, H, pattern).mask)
        if result.note is None:
            assert relative_error(W, result.weight, H) <= relative_error(W, one_pass.weight, H)
        else:
            noted += 1
            assert "SparseGPT refitted, whose relative error" in result.note
            assert torch.equal(result.weight, one_pass.weight)
    assert 0 < noted < 12


def test_with_uncorrelated_inputs_it_is_wanda() -> None:
    W, H = weight(12, 64), torch.diag(torch.linspace(1, 3, 64, dtype=torch.float64))
    result = alps(W, H, Pattern(n=2, m=4), damping=1e-9)
    assert torch.equal(result.mask, keep_largest(wanda(W, H.diagonal()), Pattern(n=2, m=4)))
    assert torch.allclose(result.weight, W * result.mask)


def test_a_hessian_of_few_tokens_or_with_unseen_inputs_is_solved() -> None:
    W, few = weight(12, 64), correlated(64, tokens=10)
    partial = correlated(64)
    partial[::8] = 0
    partial[:, ::8] = 0
    for H in (few, partial):
        result = alps(W, H, Pattern(0.5))
        assert result.damping == 0.01
        one_pass = sparsegpt(W, H, Pattern(0.5))
        assert quadratic_error(W, result.weight, H) < quadratic_error(W, one_pass.weight, H)


def test_a_pattern_that_leaves_nothing_of_a_tiny_layer_is_carried_out() -> None:
    result = alps(weight(1, 4), correlated(4), Pattern(0.95))
    assert not result.mask.any()
    assert not result.weight.any()
