"""Sizes are multiples, never nothing, and fit the budget; layers compete as if their scores had one scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from compress.core.widths import ranked_sizes, rounded_size
from compress.errors import NumericalError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("wanted", "total", "multiple", "expected"),
    [
        (100, 256, 32, 96), (112, 256, 32, 128), (111.9, 256, 32, 96), (1, 256, 64, 64), (0, 256, 64, 64),
        (255, 256, 64, 192), (256, 256, 64, 256), (170, 172, 32, 160), (172, 172, 32, 172), (20, 20, 32, 20),
        (7, 20, 32, 20), (3.5, 8, 1, 4), (7.9, 8, 1, 7),
    ],
)  # fmt: skip
def test_sizes_are_rounded_to_multiples_and_never_to_nothing(
    wanted: float, total: int, multiple: int, expected: int
) -> None:
    assert rounded_size(wanted, total, multiple) == expected


def kept(scores: Sequence[Tensor], sizes: Sequence[int], prices: Sequence[int]) -> int:
    assert all(0 < size <= len(layer) for layer, size in zip(scores, sizes, strict=True))
    return sum(size * price for size, price in zip(sizes, prices, strict=True))


def test_layers_compete_by_standardised_scores() -> None:
    scores = [normal(50, seed=seed) * 10**seed + 7 * seed for seed in range(3)]
    sizes = ranked_sizes(scores, [1, 1, 1], 60, [1, 1, 1])
    standard = torch.cat([(layer - layer.mean()) / layer.std(correction=0) for layer in scores])
    expected = [int((standard.view(3, 50)[layer] >= standard.sort().values[-60]).sum()) for layer in range(3)]
    assert sizes == expected
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("multiples", [(1, 1, 1), (8, 8, 1), (32, 16, 2)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
def test_what_is_kept_fits_the_budget_and_leaves_less_than_a_run(share: float, multiples: tuple[int, ...]) -> None:
    scores, prices = [normal(128), normal(100, seed=1).exp(), normal(8, seed=2)], [3, 3, 100]
    whole = kept(scores, [128, 100, 8], prices)
    sizes = ranked_sizes(scores, prices, int(share * whole), multiples)
    spare = int(share * whole) - kept(scores, sizes, prices)
    assert (
        0
        <= spare
        < min(
            (p * m for p, m, size, layer in zip(prices, multiples, sizes, scores, strict=True) if size < len(layer)),
            default=1,
        )
    )
    for size, multiple, layer in zip(sizes, multiples, scores, strict=True):
        assert size % multiple == 0 or size == len(layer)


def test_scale_and_offset_of_a_layers_scores_do_not_matter_and_constant_ones_rank_in_the_middle() -> None:
    scores = [normal(40), normal(40, seed=1), torch.full((40,), 5.0)]
    sizes = ranked_sizes(scores, [1, 1, 1], 70, [1, 1, 1])
    assert ranked_sizes([1e-6 * scores[0], 1e6 * scores[1] + 1e6, scores[2]], [1, 1, 1], 70, [1, 1, 1]) == sizes
    assert sizes[2] == 70 - int((torch.cat([_standard(each) for each in scores[:2]]) > 0).sum())


def _standard(x: Tensor) -> Tensor:
    return x - x.mean()


def test_even_the_least_layer_keeps_a_run() -> None:
    scores = [torch.tensor([1.0, 1, 1, 100]), torch.linspace(0, 1, 4)]
    for budget, size in product((4, 5, 6), (1, 2)):
        assert min(ranked_sizes(scores, [1, 1], budget, [size, size])) >= size


def test_smallest_sizes_beyond_the_budget_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"smallest sizes \[8, 8\] of 2 layers take 64 parameters, 1 more than the budget"
    ):
        ranked_sizes([normal(12), normal(12)], [3, 5], 63, [8, 8])
    with pytest.raises(NumericalError, match="12 of 12 scores are not finite"):
        ranked_sizes([normal(12) / 0], [1], 5, [1])
