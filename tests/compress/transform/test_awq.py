from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibrate.observers import Moments, MomentsObserver
from compress.core import affine, ranges
from compress.core.metrics import quadratic_error
from compress.core.scheme import Grid, Scheme
from compress.transform.awq import AWQ, search_clip, search_scale

GRIDS = [Grid(bits, symmetric, size) for bits in (2, 3, 4, 8) for symmetric in (True, False) for size in (None, 16)]


def weight(rows: int = 24) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))


def hessian(loud: float = 30.0) -> Tensor:
    """Of inputs of which every sixteenth channel is `loud` times larger."""
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= loud
    observer = MomentsObserver(64)
    observer.update(x)
    return observer.result(2000, "site").hessian


def nearest(w: Tensor, grid: Grid) -> Tensor:
    return affine.quantize(w, *ranges.minmax(w, grid, torch.float32), grid).dequantize()


def error(weights: list[Tensor], scale: Tensor, grids: list[Grid], seen: Tensor) -> float:
    return sum(
        quadratic_error(w, nearest(w * scale, grid) / scale, seen) for w, grid in zip(weights, grids, strict=True)
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("loud", [1.0, 30.0])
def test_the_scale_never_raises_the_error(grid: Grid, loud: float) -> None:
    weights, seen = [weight(24), weight(8)], hessian(loud)
    scale = search_scale(weights, seen, [grid, grid])
    assert error(weights, scale, [grid, grid], seen) <= error(weights, torch.ones(64), [grid, grid], seen)


def test_loud_channels_get_a_larger_scale_and_a_much_smaller_error() -> None:
    seen, grid = hessian(), Grid(4)
    scale = search_scale([weight()], seen, [grid])
    loud = torch.arange(64) % 16 == 0
    assert scale[loud].min() > 1.5 * scale[~loud].max()
    assert error([weight()], scale, [grid], seen) < 0.6 * error([weight()], torch.ones(64), [grid], seen)


def test_a_channel_that_never_fired_keeps_a_finite_scale() -> None:
    seen = hessian()
    silent = torch.arange(64) == 5
    scale = search_scale([weight()], seen.masked_fill(silent | silent.unsqueeze(1), 0), [Grid(3)])
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (scale != 1).any()


def test_each_layer_is_scored_on_its_own_grid() -> None:
    seen, weights = hessian(), [weight(24), weight(8)]
    fine, coarse = Grid(8), Grid(3)
    assert torch.equal(search_scale(weights, seen, [coarse, fine]), search_scale(weights[:1], seen, [coarse])), (
        "eight bits lose so little that three bits decide"
    )


def test_candidates_are_tied_before_they_are_scored() -> None:
    def tie(scale: Tensor) -> Tensor:
        return scale.view(2, 32).log().mean(0, keepdim=True).exp().expand(2, 32).reshape(64)

    scale = search_scale([weight()], hessian(), [Grid(4)], tie=tie)
    assert torch.equal(scale[:32], scale[32:])
    assert (scale != 1).any()


def test_a_single_step_is_the_identity() -> None:
    assert torch.equal(search_scale([weight()], hessian(), [Grid(4)], steps=1), torch.ones(64))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clipping_never_raises_the_error_of_a_group(grid: Grid) -> None:
    w, H = weight(), hessian()
    clipped = search_clip(w, H, grid)
    size = 64 // grid.num_groups(64)
    for a in range(0, 64, size):
        block = H[a : a + size, a : a + size].float()
        before, after = ((nearest(v, grid) - w)[:, a : a + size] for v in (w, clipped))
        assert (((after @ block) * after).sum(1) <= ((before @ block) * before).sum(1) * (1 + 1e-5)).all()


def test_clipping_only_limits_magnitudes() -> None:
    w = weight()
    clipped = search_clip(w, hessian(), Grid(3, group_size=16))
    limit = clipped.view(24, 4, 16).abs().amax(-1, keepdim=True)
    assert torch.equal(clipped.view(24, 4, 16), w.view(24, 4, 16).clamp(-limit, limit))
    assert (limit < w.view(24, 4, 16).abs().amax(-1, keepdim=True)).float().mean() > 0.3


class Bench:
    """What AWQ.apply needs of a block: one site with a source, its second layer not quantized later."""

    def __init__(self) -> None:
        self.site = type("Site", (), {"layers": ("q", "router"), "roles": ("attn.q", "router"), "source": "norm"})()
        self.sites = (self.site,)
        self.weights = {"q": weight(24), "router": weight(8)}
        self.divisor = torch.ones(64)

    def weight(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def moments(self, site: object) -> Moments:
        return Moments(hessian(), hessian()[0], 2000)

    def scale_dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tie(self, site: object, scale: Tensor) -> Tensor:
        return scale

    def fold(self, site: object, scale: Tensor) -> Tensor:
        self.divisor = scale.bfloat16().float()
        return self.divisor

    def rewrite(self, name: str, value: Tensor) -> None:
        self.weights[name] = value


def test_the_stage_preserves_the_function_of_all_layers_of_the_site() -> None:
    bench = Bench()
    AWQ().apply(bench, {"q": Scheme(Grid(4))})
    assert (bench.divisor != 1).any()
    for name, rows in (("q", 24), ("router", 8)):
        assert torch.allclose(bench.weights[name] / bench.divisor, weight(rows), rtol=1e-5)


def test_the_stage_reports_the_error_that_rounding_would_make() -> None:
    bench, seen = Bench(), hessian()
    (report,) = AWQ().apply(bench, {"q": Scheme(Grid(4))})
    energy = quadratic_error(weight(), torch.zeros(24, 64), seen)
    expected = error([weight()], bench.divisor, [Grid(4)], seen) / energy
    assert report.name == "q"
    assert report.error == pytest.approx(expected, rel=1e-3)


def test_a_site_that_nothing_quantizes_is_left_alone() -> None:
    bench = Bench()
    assert AWQ().apply(bench, {}) == []
    assert torch.equal(bench.weights["q"], weight())


def test_scale_steps_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_steps=0 must be at least 1"):
        AWQ(scale_steps=0)
