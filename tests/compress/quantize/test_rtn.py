from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from compress.core.metrics import quadratic_error, sqnr
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import WEIGHT_BITS, Grid, Scheme
from compress.errors import NumericalError
from compress.quantize.rtn import RTN, rtn


def weight() -> torch.Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_every_bit_lowers_the_error(symmetric: bool, group_size: int | None) -> None:
    noise = [
        sqnr(weight(), rtn(weight(), Grid(bits, symmetric, group_size), scale_dtype=torch.float32).dequantize())
        for bits in WEIGHT_BITS
    ]
    assert all(later > earlier + 4 for earlier, later in itertools.pairwise(noise))


def test_smaller_groups_lower_the_error() -> None:
    noise = [
        sqnr(weight(), rtn(weight(), Grid(3, group_size=size), scale_dtype=torch.float32).dequantize())
        for size in (None, 32, 16, 8)
    ]
    assert noise == sorted(noise)


def test_importance_lowers_the_output_error_where_inputs_differ_in_energy() -> None:
    H = torch.diag(torch.logspace(-2, 2, 64))
    plain, weighted = (
        rtn(weight(), Grid(3, group_size=32), scale_dtype=torch.float32, range=rule, importance=H.diagonal())
        for rule in ("mse", "importance")
    )
    assert quadratic_error(weight(), weighted.dequantize(), H) < 0.9 * quadratic_error(weight(), plain.dequantize(), H)


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weight()
    w[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        rtn(w, Grid(4), scale_dtype=torch.float32)


@pytest.mark.parametrize("poisoned", [True, False])
def test_the_stage_quantizes_its_layers_and_names_the_one_that_cannot_be(poisoned: bool) -> None:
    class Bench:
        """What RTN.apply needs of a block."""

        sites = (type("Site", (), {"layers": ("q", "k")}),)
        done: ClassVar[dict[str, object]] = {}

        def quantize(self, name: str, tensor: QuantizedTensor, inputs: Grid | None) -> None:
            self.done[name] = tensor

        def weight(self, name: str) -> torch.Tensor:
            return weight() / (0 if poisoned else 1)

        def scale_dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

    bench, stage = Bench(), RTN("w4a16", 32)
    if poisoned:
        with pytest.raises(NumericalError, match="^k: "):
            stage.apply(bench, {"k": stage.resolved})
    else:
        (report,) = stage.apply(bench, {"k": stage.resolved})
        assert list(bench.done) == ["k"]
        assert report.error == pytest.approx(10 ** (-sqnr(weight(), bench.done["k"].dequantize()) / 10), rel=1e-3)


def test_only_the_importance_rule_needs_calibration() -> None:
    stage = RTN(scheme="w4a16")
    assert not stage.calibrated
    assert not replace(stage, range="minmax").calibrated
    assert replace(stage, range="importance").calibrated


def test_the_grid_says_what_the_recipe_says() -> None:
    assert RTN(scheme="w3a16", group_size=64, symmetric=False).resolved == Scheme(Grid(3, False, 64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "w9a16"}, "unknown scheme 'w9a16'"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"range": "max"}, "unknown range 'max'; there are minmax mse importance"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RTN(**{"scheme": "w4a16", **fields})
