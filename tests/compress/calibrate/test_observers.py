from __future__ import annotations

import pytest
import torch

from compress.calibrate import observers
from compress.calibrate.observers import MomentsObserver
from compress.errors import NumericalError


def observe(x: torch.Tensor, batches: int = 1) -> observers.Moments:
    observer = MomentsObserver(x.shape[-1])
    for batch in x.chunk(batches):
        observer.update(batch)
    return observer.result(x.shape[:-1].numel(), "layer")


@pytest.mark.parametrize("width", [1, 17, 192, 500])
def test_the_hessian_is_the_mean_outer_product(width: int) -> None:
    x = torch.randn(6, 40, width)
    moments = observe(x, batches=3)
    flat = x.view(-1, width).double()
    assert torch.allclose(moments.hessian, flat.T @ flat / 240, atol=1e-5)
    assert moments.num_tokens == 240


def test_the_hessian_is_exactly_symmetric() -> None:
    hessian = observe(torch.randn(100, 300)).hessian
    assert torch.equal(hessian, hessian.T)


def test_half_precision_inputs_do_not_overflow() -> None:
    x = torch.full((4, 3), 6e4, dtype=torch.float16)
    assert torch.allclose(observe(x).hessian, torch.tensor(6e4, dtype=torch.float64) ** 2, rtol=1e-3)


def test_many_batches_lose_no_precision() -> None:
    observer = MomentsObserver(1)
    for _ in range(2000):
        observer.update(torch.full((1, 1), 0.1))
    assert observer.result(2000, "layer").hessian.item() == pytest.approx(torch.tensor(0.1).square().item(), rel=1e-7)


def test_wide_inputs_are_kept_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert observe(torch.randn(9, 4)).hessian.dtype == torch.float64
    monkeypatch.setattr(observers, "FLOAT64_BELOW", 4)
    assert observe(torch.randn(9, 4)).hessian.dtype == torch.float32


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_left_out_and_counted(poison: float) -> None:
    x = torch.randn(10, 5)
    poisoned = x.clone()
    poisoned[4, 2] = poison
    moments = observe(poisoned)
    assert moments.num_dropped == 1
    assert moments.num_tokens == 9
    assert torch.allclose(moments.hessian, observe(torch.cat([x[:4], x[5:]])).hessian)


def test_inputs_that_are_all_zero_are_an_error_that_names_the_layer() -> None:
    observer = MomentsObserver(3)
    observer.update(torch.zeros(5, 3))
    with pytest.raises(NumericalError, match=r"blocks\.0\.up: the inputs' mean energy is 0"):
        observer.result(5, "blocks.0.up")


def test_missing_tokens_are_an_error() -> None:
    observer = MomentsObserver(3)
    observer.update(torch.randn(5, 3))
    with pytest.raises(NumericalError, match="observed 5 calibration tokens instead of 6"):
        observer.result(6, "layer")


def test_no_finite_token_at_all_is_an_error() -> None:
    observer = MomentsObserver(3)
    observer.update(torch.full((5, 3), float("nan")))
    with pytest.raises(NumericalError, match="5 of 5 held NaN"):
        observer.result(5, "layer")


def test_products_of_bfloat16_inputs_are_exact_and_the_precision_is_restored() -> None:
    inputs = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_float32_matmul_precision()
    observer = MomentsObserver(40)
    observer.update(inputs)
    hessian = observer.result(500, "x").hessian
    exact = inputs.double().T @ inputs.double() / 500
    assert ((hessian - exact).abs().max() / exact.abs().max()).item() < 1e-5
    assert torch.get_float32_matmul_precision() == before
