"""Axes: where values lie on them, and the round numbers beside them."""

from __future__ import annotations

import pytest

from compress.report.chart import Axis, Point, curves, trade_off


def test_a_logarithmic_axis_gives_equal_factors_equal_room() -> None:
    axis = Axis.over("loss", [0.001, 0.01, 1.0], logarithmic=True)
    assert [axis.share(value) for value in (0.001, 0.01, 0.1, 1.0)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_zero_has_a_place_of_its_own_on_a_logarithmic_axis() -> None:
    axis = Axis.over("loss", [0.0, 0.001, 1.0], logarithmic=True)
    assert axis.share(0.0) == 0 < axis.share(0.001) < axis.share(1.0) == 1
    assert axis.ticks()[0] == 0


@pytest.mark.parametrize(
    ("values", "logarithmic", "ticks"),
    [
        ([0.0, 10.0], False, [0, 2, 4, 6, 8, 10]),
        ([-0.11, 0.06], False, [-0.1, -0.05, 0, 0.05]),
        ([5.0], False, [5]),
        ([0.00002, 0.07], True, [0.0001, 0.001, 0.01]),
        ([0.03, 0.6], True, [0.05, 0.1, 0.2, 0.5]),
        ([9.3e6, 25.2e6], True, [1e7, 1.5e7, 2e7, 2.5e7]),
        ([0.0, 0.0030, 0.0037], True, [0, 0.003, 0.0032, 0.0034, 0.0036]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], logarithmic: bool, ticks: list[float]) -> None:
    axis = Axis.over("", values, logarithmic=logarithmic)
    assert axis.ticks() == pytest.approx(ticks)
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks())


def test_nothing_above_zero_is_no_chart() -> None:
    assert trade_off([(1.0, 0.0)], [Point(1.0, 0.0, "free")], "bytes", "loss") == ""
    assert curves({"training": [(0.0, 0.0)]}, "step", "loss") == ""


def test_a_curve_is_named_at_its_end_and_the_last_one_accented() -> None:
    drawn = curves({"training": [(0, 1.0), (1, 0.5)], "held out": [(0, 1.0), (1, 0.7)]}, "step", "loss")
    assert drawn.count("<polyline") == 2
    assert drawn.count('class="curve accented"') == 1
    assert '<g class="accented"><title>held out: 0.7</title>' in drawn
