from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from compress.core.sparsity import (
    Pattern,
    keep_largest,
    magnitude,
    outlier_share,
    owl,
    parse_pattern,
    wanda,
)
from compress.errors import NumericalError

SHARES = [0.1, 0.33, 0.5, 0.7, 0.95]
GROUPED = [Pattern(n=2, m=4), Pattern(n=1, m=4), Pattern(n=4, m=8), Pattern(n=1, m=2)]


def scores(rows: int = 6, columns: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_recipe_names_a_share_of_zeros_or_what_is_kept_of_a_group() -> None:
    assert parse_pattern("2:4") == Pattern(n=2, m=4)
    assert parse_pattern("1:4").zeros == 0.75
    assert parse_pattern(0.6) == parse_pattern("0.6") == Pattern(0.6)
    assert [Pattern(0.6).name, Pattern(0.125).name, Pattern(n=2, m=4).name] == ["60%", "12.5%", "2:4"]


@pytest.mark.parametrize("text", [0, 1, 1.5, -0.5, float("nan"), "half", "2:4:8", "", 124])
def test_what_is_no_pattern_is_refused_with_what_is_one(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"must be a share of zeros, above 0 and below 1, or N:M in quotes"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0:0"])
def test_groups_that_keep_all_or_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must keep 1 to m - 1 of m inputs|above 0 and below 1"):
        parse_pattern(text)


def test_a_pattern_is_one_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="have no other sparsity"):
        Pattern(0.5, 2, 4)
    with pytest.raises(ValueError, match="sparsity=0.0 must be above 0"):
        Pattern()


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="in_features=42 is not a multiple of m=4 of the pattern 2:4"):
        keep_largest(scores(2, 42), Pattern(n=2, m=4))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_every_row_keeps_exactly_its_share(share: float, columns: int) -> None:
    mask = keep_largest(scores(6, columns), Pattern(share))
    assert (mask.sum(dim=1) == columns - math.floor(share * columns + 0.5)).all()


@pytest.mark.parametrize("share", SHARES)
def test_the_matrix_keeps_exactly_its_share_and_rows_as_they_deserve(share: float) -> None:
    S = scores() * torch.logspace(-1, 1, 6).unsqueeze(1)
    mask = keep_largest(S, Pattern(share), "matrix")
    assert int(mask.sum()) == 240 - math.floor(share * 240 + 0.5)
    assert mask.sum(dim=1).diff().ge(0).all()
    assert S[mask].min() >= S[~mask].max()


@pytest.mark.parametrize("pattern", GROUPED, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("among", ["row", "matrix"])
def test_every_group_keeps_its_n_largest(pattern: Pattern, among: str) -> None:
    S = scores()
    mask = keep_largest(S, pattern, among)
    groups, kept = S.view(-1, pattern.m), mask.view(-1, pattern.m)
    assert (kept.sum(dim=1) == pattern.n).all()
    for group, chosen in zip(groups, kept, strict=True):
        assert group[chosen].sum() == max(group[list(each)].sum() for each in combinations(range(pattern.m), pattern.n))


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.7), *GROUPED], ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("among", ["row", "matrix"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_do_not_change_the_count(pattern: Pattern, among: str, value: float) -> None:
    mask = keep_largest(torch.full((6, 40), value), pattern, among)
    assert int(mask.sum()) == pattern.num_kept(240)
    coarse = (4 * scores()).round()
    assert int(keep_largest(coarse, pattern, among).sum()) == pattern.num_kept(240)


def test_wanda_is_the_output_error_of_losing_a_weight_of_uncorrelated_inputs() -> None:
    W, x = torch.randn(3, 5), torch.randn(200, 5) * torch.arange(1, 6)
    S = wanda(W, x.square().mean(dim=0))
    for row, column in [(0, 0), (1, 3), (2, 4)]:
        assert float(S[row, column] ** 2) == pytest.approx(float((x[:, column] * W[row, column]).square().mean()))


def test_inputs_that_were_never_seen_are_pruned_first_and_by_magnitude() -> None:
    W, energy = torch.randn(8, 16), torch.rand(16, dtype=torch.float64) + 0.1
    energy[::4] = 0
    S = wanda(W, energy)
    unseen, seen = S[:, ::4], S[:, torch.arange(16) % 4 > 0]
    assert (unseen.amax(dim=1) < seen[W[:, torch.arange(16) % 4 > 0].abs() > 1e-3].min()).all()
    assert torch.equal(unseen.argsort(dim=1), W[:, ::4].abs().argsort(dim=1))
    assert torch.equal(wanda(W, torch.zeros(16)), magnitude(W))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    S = scores()
    S[1, 2] = bad
    with pytest.raises(NumericalError, match="1 of 240 numbers of the scores are NaN or infinite"):
        keep_largest(S, Pattern(0.5))


def test_outliers_are_counted_by_the_mean_of_their_layer() -> None:
    S = torch.ones(10, 10)
    S[0, :3] = 100
    assert outlier_share(S) == outlier_share(7 * S) == 0.03
    assert outlier_share(S, 50) == 0


def test_owl_spares_layers_with_outliers_and_keeps_to_the_sparsity_and_the_limit() -> None:
    outliers, sizes = [0.01, 0.05, 0.02, 0.02], [4096, 16384, 44032, 44032]
    ratios = owl(outliers, sizes, 0.6)
    assert sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes) == pytest.approx(
        0.6, abs=1e-15
    )
    assert max(abs(ratio - 0.6) for ratio in ratios) == pytest.approx(0.08)
    assert sorted(range(4), key=lambda layer: ratios[layer]) == [1, 2, 3, 0]
    assert ratios[2] == ratios[3]


def test_equal_layers_get_equal_sparsity() -> None:
    assert owl([0.03] * 3, [7, 11, 13], 0.5) == [0.5] * 3
    assert owl([0.3], [7], 0.5) == [0.5]


def test_owl_refuses_what_would_empty_a_layer() -> None:
    with pytest.raises(ValueError, match="limit=0.08 around sparsity=0.95"):
        owl([0.1, 0.2], [1, 1], 0.95)
    with pytest.raises(ValueError, match="2 outlier shares need as many sizes"):
        owl([0.1, 0.2], [1], 0.5)
    with pytest.raises(NumericalError, match="must be finite"):
        owl([0.1, float("nan")], [1, 1], 0.5)
