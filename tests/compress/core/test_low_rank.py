from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from compress.core.affine import quantize
from compress.core.low_rank import Method, compensate
from compress.core.metrics import quadratic_form
from compress.core.ranges import minmax
from compress.core.scheme import Grid
from compress.errors import NumericalError

METHODS = get_args(Method)
SHAPES = [(24, 32), (32, 24), (16, 16), (1, 8), (8, 1)]


def inputs(width: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Correlated, of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(width, width, dtype=torch.float64, generator=generator)
    return x * torch.logspace(-1.5, 1.5, width, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def rounding_error(rows: int, columns: int, seed: int = 1) -> Tensor:
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight - quantize(weight, *minmax(weight, Grid(3), torch.float64), Grid(3)).dequantize(torch.float64)


def compensated(error: Tensor, rank: int, x: Tensor, method: Method = "qera") -> Tensor:
    A, B = compensate(error, rank, gram(x), method, magnitude=x.abs().mean(0))
    return A @ B


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_no_other_compensation_of_its_rank_leaves_less_output_error_than_qera(
    rows: int, columns: int, rank: int
) -> None:
    x, E = inputs(columns), rounding_error(rows, columns)
    H = gram(x)
    A, B = compensate(E, rank, H)
    least = quadratic_form(E - A @ B, H)
    for method in METHODS:
        assert least <= quadratic_form(E - compensated(E, rank, x, method), H) * (1 + 1e-6) + 1e-12
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other = [M + size * M.norm() * torch.randn(M.shape, dtype=M.dtype, generator=generator) for M in (A, B)]
            assert least <= quadratic_form(E - other[0] @ other[1], H) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_the_output_error_that_qera_leaves_is_the_tail_of_the_singular_values(
    rows: int, columns: int, rank: int
) -> None:
    x, E = inputs(columns), rounding_error(rows, columns)
    tail = torch.linalg.svdvals(E @ x.T / len(x) ** 0.5)[rank:].square().sum()
    left = quadratic_form(E - compensated(E, rank, x), gram(x))
    assert left == pytest.approx(float(tail), rel=1e-6, abs=1e-12 * quadratic_form(E, gram(x)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_each_method_is_the_truncated_singular_value_decomposition_under_its_own_root(rows: int, columns: int) -> None:
    x, E = inputs(columns), rounding_error(rows, columns)
    values, vectors = torch.linalg.eigh(gram(x))
    magnitude = x.abs().mean(0)
    roots: dict[Method, Tensor] = {
        "qera": vectors * values.sqrt() @ vectors.T,
        "qera-approx": gram(x).diagonal().sqrt().diag(),
        "lqer": (magnitude / (magnitude.max() * magnitude.min()).sqrt()).diag(),
        "svd": torch.eye(columns, dtype=torch.float64),
    }
    for method in METHODS:
        U, S, V = torch.linalg.svd(E @ roots[method], full_matrices=False)
        expected = (U[:, :3] * S[:3]) @ V[:3] @ roots[method].inverse()
        assert torch.allclose(compensated(E, 3, x, method), expected, rtol=1e-5, atol=1e-6 * float(E.abs().max()))


def test_knowing_more_of_the_inputs_leaves_less_output_error() -> None:
    for seed in range(5):
        x, E = inputs(64, seed=seed), rounding_error(48, 64, seed=seed)
        left = [quadratic_form(E - compensated(E, 8, x, method), gram(x)) for method in ("qera", "qera-approx", "svd")]
        assert left == sorted(left)
        assert left[0] < 0.9 * left[1]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_whole_error_back(rows: int, columns: int, method: Method) -> None:
    x, E = inputs(columns), rounding_error(rows, columns)
    assert torch.allclose(compensated(E, min(rows, columns), x, method), E, rtol=0, atol=1e-10)


def test_rank_beyond_full_is_left_out() -> None:
    A, B = compensate(rounding_error(6, 4), 100, gram(inputs(4)))
    assert (A.shape, B.shape) == ((6, 4), (4, 4))


@pytest.mark.parametrize("method", METHODS)
def test_rank_zero_gives_empty_factors_and_no_change(method: Method) -> None:
    A, B = compensate(rounding_error(6, 4), 0, gram(inputs(4)), method, magnitude=torch.ones(4))
    assert (A.shape, B.shape) == ((6, 0), (0, 4))
    assert torch.equal(A @ B, torch.zeros(6, 4, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (8, 6)])
@pytest.mark.parametrize("method", ["qera", "qera-approx", "lqer"])
def test_dead_inputs_get_columns_of_zeros(rows: int, columns: int, method: Method) -> None:
    x, E = inputs(columns), rounding_error(rows, columns)
    x[:, [1, 4]] = 0
    for rank in (2, 8):
        _, B = compensate(E, rank, gram(x), method, magnitude=x.abs().mean(0))
        assert torch.equal(B.any(dim=0), x.any(dim=0))


def test_without_any_energy_nothing_is_compensated() -> None:
    A, B = compensate(rounding_error(6, 8), 3, torch.zeros(8, 8))
    assert not A.any()
    assert not B.any()


def test_with_fewer_tokens_than_rank_the_output_error_vanishes_and_the_rest_goes_to_the_weight() -> None:
    x, E = inputs(32, tokens=4), rounding_error(24, 32)
    some, more = compensated(E, 4, x), compensated(E, 12, x)
    assert quadratic_form(E - some, gram(x)) < 1e-9 * quadratic_form(E, gram(x))
    assert quadratic_form(E - more, gram(x)) < 1e-9 * quadratic_form(E, gram(x))
    rest = torch.linalg.svdvals(E - some).square()
    assert (E - more).square().sum() == pytest.approx(float(rest[8:].sum()), rel=1e-3)


def test_the_first_pairs_are_the_compensation_of_lower_rank() -> None:
    x, E = inputs(32), rounding_error(24, 32)
    A, B = compensate(E, 9, gram(x))
    assert torch.allclose(A[:, :4] @ B[:4], compensated(E, 4, x), atol=1e-12)


def test_pairs_share_their_norm_so_that_storing_them_in_bfloat16_costs_little() -> None:
    x, E = inputs(64), 1e-4 * rounding_error(48, 64)
    A, B = compensate(E, 16, gram(x))
    assert torch.allclose(A.norm(dim=0), B.norm(dim=1))
    rounded = A.bfloat16().double() @ B.bfloat16().double()
    left, exact = (quadratic_form(E - C, gram(x)) for C in (rounded, A @ B))
    assert left < 1.02 * exact


def test_factors_have_the_dtype_of_the_error_and_nothing_is_written_to() -> None:
    E, H = rounding_error(6, 8).float(), gram(inputs(8))
    before = E.clone(), H.clone()
    A, B = compensate(E, 2, H)
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(E, before[0])
    assert torch.equal(H, before[1])


@pytest.mark.parametrize("where", ["error", "hessian"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(where: str, bad: float) -> None:
    tensors = {"error": rounding_error(6, 8), "hessian": gram(inputs(8))}
    tensors[where][2, 3] = bad
    with pytest.raises(NumericalError, match=f"1 of {tensors[where].numel()} numbers of the {where} are not finite"):
        compensate(tensors["error"], 2, tensors["hessian"])


@pytest.mark.parametrize(
    ("method", "message"), [("qera", "needs the hessian"), ("qera-approx", "needs the hessian"), ("lqer", r"E\|x\|")]
)
def test_a_method_without_its_statistics_is_refused(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compensate(rounding_error(6, 8), 2, None, method)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=-1 must be 0 or more"):
        compensate(rounding_error(6, 8), -1, method="svd")


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown method 'pca'; there are qera qera-approx lqer svd"):
        compensate(rounding_error(6, 8), 1, gram(inputs(8)), "pca")  # type: ignore[arg-type]
