from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from compress.calibrate.observers import Moments
from compress.core import ranges
from compress.core.metrics import quadratic_error
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import FP8, FP8_TENSOR, MXFP4, NF4, NVFP4, WEIGHT_BITS, Grid, Scheme
from compress.errors import NumericalError
from compress.quantize import gptq as module
from compress.quantize.asymmetric import Target
from compress.quantize.gptq import GPTQ, GPTQResult, gptq
from compress.quantize.rtn import rtn

ORDERS = ["none", "static", "group"]
GRIDS = [
    Grid(bits, symmetric, group_size) for bits in WEIGHT_BITS for symmetric in (True, False) for group_size in (None, 8)
]


def weight(rows: int = 16, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def correlated(columns: int = 64, tokens: int = 2000, seed: int = 1) -> Tensor:
    """A Hessian of inputs that share a few directions and differ in energy, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    x = (shared + torch.randn(tokens, columns, generator=generator)) * torch.logspace(-0.5, 0.5, columns)
    return (x.T @ x).double() / tokens


def solve(w: Tensor, H: Tensor, grid: Grid, **settings: object) -> GPTQResult:
    return gptq(w, H, grid, **{"scale_dtype": torch.float32, **settings})


def nearest(w: Tensor, H: Tensor, grid: Grid) -> QuantizedTensor:
    return rtn(w, grid, scale_dtype=torch.float32, range="importance", importance=H.diagonal())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(grid: Grid, sweeps: int) -> None:
    w, H = weight(), correlated()
    ours = quadratic_error(w, solve(w, H, grid, sweeps=sweeps).tensor.dequantize(), H)
    assert ours < 0.75 * quadratic_error(w, nearest(w, H, grid).dequantize(), H)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_with_uncorrelated_inputs_gptq_is_round_to_nearest(order: str, symmetric: bool, group_size: int | None) -> None:
    w, H = weight(), torch.diag(torch.linspace(1, 3, 64, dtype=torch.float64))
    grid = Grid(4, symmetric, group_size)
    ours = solve(w, H, grid, act_order=order, sweeps=0).tensor
    plain = nearest(w, H, grid)
    assert torch.equal(ours.codes, plain.codes)
    assert torch.allclose(ours.scale, plain.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_lies_between_the_optimum_and_round_to_nearest(symmetric: bool, seed: int) -> None:
    grid = Grid(2, symmetric)
    w = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    H = correlated(columns=4, seed=seed)
    params = ranges.minmax(w, grid, torch.float32)
    ours = solve(w, H, grid, range="minmax", sweeps=0, damping=1e-6).tensor
    assert torch.equal(ours.scale, params[0])
    plain = rtn(w, grid, scale_dtype=torch.float32, range="minmax")
    optimum = 0.0
    for row in range(2):
        zero = 0 if params[1] is None else params[1][row].float()
        candidates = torch.tensor(list(product(range(grid.qmin, grid.qmax + 1), repeat=4)))
        change = (candidates - zero) * params[0][row] - w[row]
        optimum += float(((change @ H.float()) * change).sum(1).min())
    error = quadratic_error(w, ours.dequantize(), H)
    assert optimum * (1 - 1e-4) <= error <= quadratic_error(w, plain.dequantize(), H) * 1.0001


def test_gptq_equals_the_recursion_of_the_paper() -> None:
    w, H, grid = weight(4, 8), correlated(8), Grid(3)
    ours = solve(w, H, grid, range="minmax", act_order="none", sweeps=0).tensor
    scale = ours.scale.double()
    rest, inverse = w.double(), torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(8, dtype=H.dtype))
    for j in range(8):
        level = (rest[:, 0] / scale[:, 0]).round().clamp(grid.qmin, grid.qmax)
        assert torch.equal(level.to(torch.int8), ours.codes[:, j])
        error = rest[:, 0] - level * scale[:, 0]
        rest = (rest - error.unsqueeze(1) * inverse[0] / inverse[0, 0])[:, 1:]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [None, 16])
def test_the_block_size_changes_the_speed_only(order: str, group_size: int | None) -> None:
    w, H, grid = weight(), correlated(), Grid(4, group_size=group_size)
    few, many = (solve(w, H, grid, act_order=order, block_size=size, sweeps=0).tensor for size in (5, 128))
    assert (few.codes == many.codes).float().mean() > 0.99


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [Grid(3, group_size=16), Grid(4, symmetric=False)], ids=str)
def test_stacking_rows_equals_solving_them_apart(order: str, grid: Grid) -> None:
    w, H = weight(24), correlated()
    whole = solve(w, H, grid, act_order=order).tensor
    apart = [solve(part, H, grid, act_order=order).tensor.codes for part in w.split([16, 8])]
    assert (whole.codes == torch.cat(apart)).float().mean() > 0.99


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("target", [None, *get_args(Target)])
@pytest.mark.parametrize("grid", [Grid(4, group_size=8), Grid(3, symmetric=False), MXFP4], ids=str)
def test_weights_that_are_zero_stay_zero(grid: Grid, target: Target | None, order: str) -> None:
    w, H = weight(), correlated()
    w[:, 1::2] = 0
    w[3] = 0
    drift = {"cross": 0.9 * H + 0.1 * correlated(seed=3), "target": target} if target else {}
    result = solve(w, H, grid, act_order=order, **drift).tensor.dequantize()
    assert not result[w == 0].any()
    if not target:
        assert quadratic_error(w, result, H) < quadratic_error(w, nearest(w, H, grid).dequantize(), H)


def test_slices_of_rows_join_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    w, H, grid = weight(24), correlated(), Grid(4, symmetric=False, group_size=8)
    whole = solve(w, H, grid).tensor
    monkeypatch.setattr(module, "SLICE", 7 * w.shape[1])
    sliced = solve(w, H, grid).tensor
    assert sliced.scale.shape == whole.scale.shape
    assert sliced.zero_point.shape == whole.zero_point.shape
    assert (whole.codes == sliced.codes).float().mean() > 0.99


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_scales_belong_to_the_columns_they_are_stored_with(order: str, grid: Grid) -> None:
    w, H = weight(), correlated()
    tensor = solve(w, H, grid, act_order=order).tensor
    assert grid.qmin <= tensor.codes.min()
    assert tensor.codes.max() <= grid.qmax
    relative = (tensor.dequantize() - w).square().sum() / w.square().sum()
    assert relative < 6 * 4.0 ** (1 - grid.bits)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_good_order_and_a_good_range_pay(bits: int) -> None:
    w, H, grid = weight(64), correlated(), Grid(bits, group_size=16)
    textbook = solve(w, H, grid, act_order="none", range="minmax", sweeps=0).tensor
    ours = solve(w, H, grid, sweeps=0).tensor
    assert quadratic_error(w, ours.dequantize(), H) < 0.9 * quadratic_error(w, textbook.dequantize(), H)


@pytest.mark.parametrize("order", ORDERS)
def test_columns_that_never_fired_are_rounded_to_nearest_and_counted(order: str) -> None:
    w, H, grid = weight(), correlated(), Grid(8)
    H[::8] = 0
    H[:, ::8] = 0
    result = solve(w, H, grid, act_order=order, sweeps=0)
    assert result.num_dead == 8
    change = (result.tensor.dequantize() - w)[:, ::8].abs()
    assert (change <= 0.501 * result.tensor.scale.abs()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_weights_stay_zero(symmetric: bool) -> None:
    tensor = solve(torch.zeros(4, 64), correlated(), Grid(4, symmetric, 8)).tensor
    assert (tensor.dequantize() == 0).all()


def test_a_hessian_of_few_tokens_is_solved_and_still_beats_rounding() -> None:
    w, H = weight(), correlated(tokens=10)
    result = solve(w, H, Grid(3))
    assert result.fallback is None
    ours = quadratic_error(w, result.tensor.dequantize(), H)
    assert ours < 0.5 * quadratic_error(w, nearest(w, H, Grid(3)).dequantize(), H)


def test_more_damping_than_asked_for_is_reported() -> None:
    H = torch.eye(64, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    result = solve(weight(), H, Grid(4))
    assert result.damping == pytest.approx(0.1)


def test_a_hopeless_hessian_ends_in_rounding_to_nearest_and_says_so() -> None:
    w, H = weight(), torch.eye(64, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 9
    result = solve(w, H, Grid(4))
    assert "round to nearest" in result.fallback
    assert torch.equal(result.tensor.codes, nearest(w, H, Grid(4)).codes)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(poison: float) -> None:
    w, H = weight(), correlated()
    w[2, 3] = poison
    with pytest.raises(NumericalError, match="weights"):
        solve(w, H, Grid(4))
    H[1, 1] = poison
    with pytest.raises(NumericalError, match="1 NaN or infinite entries of 4096"):
        solve(weight(), H, Grid(4))


def test_inputs_are_left_as_they_were() -> None:
    w, H = weight(), correlated()
    H[::8] = 0
    H[:, ::8] = 0
    before = w.clone(), H.clone()
    solve(w, H, Grid(4))
    solve(w, H, Grid(4), cross=0.9 * H, target="gptaq")
    assert torch.equal(w, before[0])
    assert torch.equal(H, before[1])


def test_scales_come_in_the_dtype_they_are_stored_in() -> None:
    tensor = solve(weight(), correlated(), Grid(4, group_size=8), scale_dtype=torch.bfloat16).tensor
    assert tensor.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [FP8, FP8_TENSOR, NVFP4, MXFP4, NF4], ids=lambda grid: grid.format)
def test_float_grids_lose_less_output_than_by_rounding_to_nearest(grid: Grid) -> None:
    w, H = weight(48), correlated()
    nearest = rtn(w, grid, scale_dtype=torch.bfloat16, range="importance", importance=H.diagonal())
    tensor = solve(w, H, grid, scale_dtype=torch.bfloat16).tensor
    assert torch.equal(tensor.step, nearest.step)
    assert quadratic_error(w, tensor.dequantize(), H) < 0.8 * quadratic_error(w, nearest.dequantize(), H)


class Bench:
    """What GPTQ.apply needs of a block: two sites, the first of two layers."""

    def __init__(self) -> None:
        site = type("Site", (), {})
        self.sites = (site(), site())
        self.sites[0].layers, self.sites[1].layers = ("q", "k"), ("o",)
        self.weights = {"q": weight(16), "k": weight(8) * 2, "o": weight(4)}
        self.observed: list[object] = []
        self.done: dict[str, QuantizedTensor] = {}
        self.weight: Callable[[str], Tensor] = self.weights.__getitem__

    def scale_dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def quantize(self, name: str, tensor: QuantizedTensor, inputs: Grid | None) -> None:
        self.done[name] = tensor

    def moments(self, site: object, inputs: Grid | None, *, cross: bool = False) -> object:
        self.observed.append(site)
        return Moments(correlated(), correlated()[0], num_tokens=100)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_stage_gives_each_layer_its_own_rows(symmetric: bool) -> None:
    bench, grid = Bench(), Grid(4, symmetric, 16)
    reports = GPTQ("w4a16", 16, symmetric).apply(bench, dict.fromkeys("qko", Scheme(grid)))
    assert [report.name for report in reports] == ["q", "k", "o"]
    for report in reports:
        w, tensor = bench.weights[report.name], bench.done[report.name]
        assert tensor.shape == tuple(w.shape)
        expected = quadratic_error(w, tensor.dequantize(), correlated()) / quadratic_error(w, 0 * w, correlated())
        assert report.error == pytest.approx(expected, rel=1e-3)
        assert report.error < 0.01


def test_the_stage_observes_only_sites_it_owns_layers_of() -> None:
    bench = Bench()
    GPTQ("w4a16").apply(bench, {"o": Scheme(Grid(4))})
    assert bench.observed == [bench.sites[1]]
    assert list(bench.done) == ["o"]


def test_layers_of_one_site_may_have_different_grids() -> None:
    bench = Bench()
    GPTQ("w4a16").apply(bench, {"q": Scheme(Grid(4)), "k": Scheme(Grid(8, False, 16))})
    assert {name: tensor.grid for name, tensor in bench.done.items()} == {"q": Grid(4), "k": Grid(8, False, 16)}


def test_a_numerical_failure_names_the_layers() -> None:
    bench = Bench()
    bench.weights["k"][0, 0] = float("nan")
    with pytest.raises(NumericalError, match="^q, k: "):
        GPTQ("w4a16").apply(bench, dict.fromkeys("qk", Scheme(Grid(4))))


def test_the_report_says_when_more_damping_was_needed() -> None:
    bench = Bench()
    H = torch.eye(64, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    bench.moments = lambda site, inputs, cross: Moments(H, H[0], num_tokens=100)
    (report,) = GPTQ("w4a16").apply(bench, {"o": Scheme(Grid(4))})
    assert report.fallback.startswith("damping 0.1, not 0.01")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int4"}, "unknown scheme 'int4'"),
        ({"group_size": -1}, "group_size=-1 must be at least 1"),
        ({"range": "max"}, "unknown range"),
        ({"act_order": "dynamic"}, "act_order='dynamic' must be true, false, none, static, group"),
        ({"damping": 0.0}, "damping=0.0 must be above 0"),
        ({"damping": 2.0}, "damping=2.0 must be above 0 and at most 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"sweeps": -1}, "sweeps=-1 must be at least 0"),
        ({"asymmetric": "obs"}, "asymmetric='obs' must be true, false, closed, gptaq, qronos"),
        ({"share": 0.0}, "share=0.0 must be above 0 and at most 1"),
        ({"share": 1.5}, "share=1.5 must be above 0 and at most 1"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQ(**{"scheme": "w4a16", **fields})


@pytest.mark.parametrize(("given", "meant"), [(True, "static"), (False, "none"), ("group", "group")])
def test_act_order_may_be_yes_or_no(given: bool | str, meant: str) -> None:
    assert GPTQ("w4a16", act_order=given).order == meant


def test_the_report_says_how_many_tokens_were_left_out() -> None:
    bench = Bench()
    bench.moments = lambda site, inputs, cross: Moments(correlated(), correlated()[0], num_tokens=90, num_dropped=10)
    (report,) = GPTQ("w4a16").apply(bench, {"o": Scheme(Grid(4))})
    assert report.fallback == "10 of 100 calibration tokens were not finite and left out"


@pytest.mark.parametrize(("given", "streams"), [(False, False), (True, True), ("closed", True), ("gptaq", True)])
def test_only_the_asymmetric_stage_needs_the_original_stream(given: bool | Target, streams: bool) -> None:
    assert GPTQ("w4a16", asymmetric=given).two_streams is streams


@pytest.mark.parametrize(("given", "target"), [(True, "closed"), ("closed", "closed"), ("gptaq", "gptaq")])
def test_the_asymmetric_stage_aims_at_the_original_output(given: bool | Target, target: Target) -> None:
    bench, H = Bench(), correlated()
    G = (0.8 * H).roll(1, dims=0)
    bench.moments = lambda site, inputs, cross: Moments(H, H[0], num_tokens=100, cross=G if cross else None)
    GPTQ("w3a16", None, sweeps=0, asymmetric=given, share=0.2).apply(bench, {"o": Scheme(Grid(3))})
    settings = {"scale_dtype": torch.bfloat16, "sweeps": 0, "cross": G, "target": target, "share": 0.2}
    assert bench.done["o"] == solve(weight(4), H, Grid(3), **settings).tensor


def test_the_report_says_which_layer_was_held_back_and_how_much() -> None:
    bench, H = Bench(), torch.eye(64, dtype=torch.float64)
    G = H.clone()
    G[0, 0] = 2
    bench.weights["k"][:, 1:] *= 1e-3
    bench.moments = lambda site, inputs, cross: Moments(H, H[0], num_tokens=100, cross=G)
    q, k = GPTQ("w4a16", asymmetric=True).apply(bench, dict.fromkeys("qk", Scheme(Grid(4))))
    assert k.fallback == "8 channels held to 0.3 of their norm, not 0.50"
    assert q.fallback is None
