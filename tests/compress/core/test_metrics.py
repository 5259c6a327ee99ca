from __future__ import annotations

import itertools
import math

import pytest
import torch

from compress.core import metrics
from compress.core.affine import quantize
from compress.core.metrics import quadratic_error, relative_error, sqnr
from compress.core.ranges import minmax
from compress.core.scheme import Grid


def test_the_quadratic_error_is_the_mean_squared_error_of_the_output() -> None:
    W, V, x = torch.randn(5, 8), torch.randn(5, 8), torch.randn(1000, 8)
    expected = (x @ W.T - x @ V.T).square().sum(dim=1).mean()
    assert quadratic_error(W, V, x.T @ x / 1000) == pytest.approx(float(expected), rel=1e-4)


def test_slicing_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W, V, H = torch.randn(7, 8), torch.randn(7, 8), torch.eye(8, dtype=torch.float64)
    whole = quadratic_error(W, V, H)
    monkeypatch.setattr(metrics, "ROWS", 2)
    assert quadratic_error(W, V, H) == pytest.approx(whole)


def test_relative_error_is_one_for_an_output_of_zeros() -> None:
    W, x = torch.randn(5, 8), torch.randn(100, 8)
    assert relative_error(W, torch.zeros_like(W), x.T @ x) == pytest.approx(1)
    assert relative_error(W, torch.zeros_like(W)) == pytest.approx(1)


def test_relative_error_of_a_zero_weight_is_zero_or_infinite() -> None:
    zero = torch.zeros(2, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, torch.ones(2, 2)) == math.inf


def test_a_bit_is_worth_six_decibels() -> None:
    W = torch.rand(64, 64) - 0.5
    noise = [sqnr(W, quantize(W, *minmax(W, Grid(b), torch.float32), Grid(b)).dequantize()) for b in (4, 5, 6, 7)]
    assert [b - a for a, b in itertools.pairwise(noise)] == pytest.approx([6.02] * 3, abs=0.5)
    assert sqnr(W, W) == math.inf
