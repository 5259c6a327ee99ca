from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import refit as module
from compress.core.metrics import quadratic_error, quadratic_form
from compress.core.refit import refit
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern, keep_largest, magnitude, wanda
from compress.errors import NumericalError
from compress.quantize import asymmetric

PATTERNS = [Pattern(0.5), Pattern(0.8), Pattern(n=2, m=4)]


@pytest.fixture(params=["exact", "conjugate gradients"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every claim holds of both ways to solve."""
    monkeypatch.setattr(module, "WIDTH", 10**6 if request.param == "exact" else 0)
    return request.param


def inputs(columns: int = 48, tokens: int = 400, seed: int = 0) -> Tensor:
    """Correlated, of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    return x * torch.logspace(-0.7, 0.7, columns, dtype=torch.float64)


def weight(rows: int = 20, columns: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def masks(W: Tensor, H: Tensor) -> list[Tensor]:
    """Of every kind: rows alike, rows that keep different numbers, among them none and all."""
    uneven = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < torch.linspace(0, 1, len(W)).unsqueeze(1)
    uneven[0], uneven[-1] = False, True
    return [
        *(keep_largest(wanda(W, H.diagonal()), pattern) for pattern in PATTERNS),
        keep_largest(magnitude(W), Pattern(0.6), "matrix"),
        uneven,
    ]


def least_squares(W: Tensor, mask: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Each row by `lstsq` on its own: inputs `x`, outputs that of W on `y`, and √λ (w - q) below."""
    solution = torch.zeros_like(W)
    eye = (len(x) * ridge) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    for row, kept in enumerate(mask):
        if kept.any():
            A = torch.cat([x, eye])[:, kept]
            b = torch.cat([y @ W[row], eye @ W[row]])
            solution[row, kept] = torch.linalg.lstsq(A, b).solution
    return solution


@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_the_refit_is_the_least_squares_solution_of_every_row(damping: float, way: str) -> None:
    W, x = weight(), inputs()
    H = gram(x)
    for mask in masks(W, H):
        result = refit(W, H, mask, damping=damping)
        expected = least_squares(W, mask, x, x, damping * float(H.diagonal().mean()))
        assert result.note is None
        assert not result.weight[~mask].any()
        atol = 1e-8 if way == "exact" else 1e-3
        assert torch.allclose(result.weight, expected, rtol=0, atol=atol * float(expected.abs().max()))
        assert quadratic_error(W, result.weight, H) == pytest.approx(quadratic_error(W, expected, H), rel=1e-5)


def test_with_another_stream_it_is_the_least_squares_solution_for_the_original_output() -> None:
    W, x = weight(), inputs()
    y = x + 0.3 * inputs(seed=5)
    H, cross = gram(x), y.T @ x / len(x)
    for mask in masks(W, H):
        expected = least_squares(W, mask, x, y, 0.01 * float(H.diagonal().mean()))
        result = refit(W, H, mask, cross=cross).weight
        assert torch.allclose(result, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        lost, other = ((y @ W.T - x @ each.T).square().mean() for each in (result, refit(W, H, mask).weight))
        assert lost < other or not mask.any()


def test_with_another_stream_it_is_the_refit_of_the_target_of_asymmetric_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asymmetric, "LIMIT", float("inf"))
    W, x = weight(), inputs()
    H, cross = gram(x), (x + 0.3 * inputs(seed=5)).T @ x / len(x)
    target, _ = asymmetric.closed_form(W, H, cross, share=1.0)
    for mask in masks(W, H):
        ours, theirs = refit(W, H, mask, cross=cross).weight, refit(target, H, mask).weight
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("seed", range(3))
def test_it_never_loses_more_than_the_original_weights_on_the_mask(seed: int) -> None:
    W, H = weight(seed=seed), gram(inputs(seed=seed))
    for mask in masks(W, H):
        before, after = (quadratic_error(W, each, H) for each in (W * mask, refit(W, H, mask).weight))
        assert after <= before * (1 + 1e-9)
    assert after == before == 0 or after < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [10, 400])
def test_it_never_ends_worse_than_where_it_starts(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = weight().to(dtype), gram(inputs(tokens=tokens))
    metric = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    one_pass = sparsegpt(W, H, Pattern(0.5))
    starts = [one_pass.weight, refit(W, H, one_pass.mask).weight]
    monkeypatch.setattr(module, "STEPS", 3)
    for start in starts:
        result = refit(W, H, one_pass.mask, start=start).weight
        for row in range(len(W)):
            before, after = (quadratic_form((W - each)[row : row + 1].double(), metric) for each in (start, result))
            assert after <= before * (1 + 1e-9)
    assert quadratic_error(W.double(), result.double(), H) < quadratic_error(W.double(), one_pass.weight.double(), H)


def test_a_mask_of_everything_gives_the_weight_back() -> None:
    W, H = weight(), gram(inputs(tokens=10))
    assert torch.allclose(refit(W, H, torch.ones_like(W, dtype=torch.bool)).weight, W, atol=1e-9)


def test_inputs_that_never_fired_keep_their_weights() -> None:
    x = inputs()
    x[:, ::6] = 0
    W, H = weight(), gram(x)
    mask = keep_largest(magnitude(W), Pattern(0.5))
    result = refit(W, H, mask)
    assert result.note is None
    assert torch.allclose(result.weight[:, ::6], (W * mask)[:, ::6], rtol=1e-9)


def test_of_fewer_tokens_than_kept_inputs_nothing_is_lost_but_to_damping() -> None:
    W, H = weight(), gram(inputs(tokens=6))
    mask = keep_largest(wanda(W, H.diagonal()), Pattern(0.5))
    lost = quadratic_error(W, refit(W, H, mask, damping=1e-7).weight, H)
    assert lost < 1e-6 * quadratic_form(W, H)


@pytest.mark.parametrize("chunk", [1, 1000, 10**7])
def test_solving_in_chunks_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = weight(), gram(inputs())
    for mask in masks(W, H):
        whole = refit(W, H, mask).weight
        monkeypatch.setattr(module, "SOLVED", chunk)
        assert torch.allclose(refit(W, H, mask).weight, whole, atol=1e-3)


def test_conjugate_gradients_that_run_out_of_steps_say_so(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    W, H = weight(), gram(inputs())
    note = refit(W, H, keep_largest(magnitude(W), Pattern(0.5))).note
    assert note is None if way == "exact" else "not 1e-05, in 2 steps" in note


@pytest.mark.parametrize("empty", [True, False])
def test_a_hopeless_hessian_leaves_the_weights_on_the_mask_and_says_so(empty: bool) -> None:
    W, H = weight(), torch.eye(48, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 9
    mask = keep_largest(magnitude(W), Pattern(0.5))
    result = refit(W, torch.zeros_like(H) if empty else H, mask)
    assert "not refitted, because the Hessian of 48 inputs is not positive definite" in result.note
    assert torch.equal(result.weight, W * mask)


def test_a_layer_of_zeros_stays_one() -> None:
    W = torch.zeros(4, 48)
    assert not refit(W, gram(inputs()), keep_largest(W, Pattern(0.5))).weight.any()


def test_the_weight_comes_in_its_own_dtype_and_nothing_is_written_to() -> None:
    W, H = weight().bfloat16(), gram(inputs())
    mask = keep_largest(magnitude(W), Pattern(0.5))
    before = W.clone(), H.clone(), mask.clone()
    assert refit(W, H, mask, cross=0.9 * H, start=W).weight.dtype == torch.bfloat16
    for given, kept in zip((W, H, mask), before, strict=True):
        assert torch.equal(given, kept)


def test_shapes_that_differ_and_numbers_that_are_not_finite_are_refused() -> None:
    W, H = weight(), gram(inputs())
    mask = keep_largest(magnitude(W), Pattern(0.5))
    with pytest.raises(ValueError, match=r"mask \[19, 48\] must have the shape of the weight, \[20, 48\]"):
        refit(W, H, mask[1:])
    with pytest.raises(ValueError, match="start"):
        refit(W, H, mask, start=W[1:])
    cross = H.clone()
    cross[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="1 of 2304 numbers of the cross"):
        refit(W, H, mask, cross=cross)
