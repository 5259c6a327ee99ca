"""Learned rotations: better than random ones on tokens they have not seen, never worse, one site at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from compress.core.hadamard import random_rotation
from compress.core.inputs import input_scale, round_inputs
from compress.core.learned_rotation import HELD_OUT, Site, learn, output_error
from compress.core.ranges import nearest
from compress.core.scheme import FP8, MXFP4, NVFP4, Grid
from compress.core.stiefel import deviation
from compress.errors import NumericalError

SIZE = 32
INT4 = Grid(4)
GRIDS = (INT4, Grid(8), Grid(4, group_size=8), Grid(8, rows=None), FP8, NVFP4, MXFP4)
WEIGHTS = (None, INT4, Grid(4, symmetric=False), Grid(3, group_size=8), MXFP4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hadamard(seed: int = 0, *, size: int = SIZE, centred: bool = False) -> Tensor:
    eye = torch.eye(size, dtype=torch.float64)
    return random_rotation(size, torch.Generator().manual_seed(seed), centred=centred).apply(eye)


def mixed(tokens: int, seed: int = 0) -> Tensor:
    """Coordinates that are even or rarely large, mixed by one rotation: there is something to be found."""
    even = torch.rand(tokens, SIZE // 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    rare = normal(tokens, SIZE // 2, seed=seed + 1).pow(3)
    return torch.cat((even, rare), dim=1) @ torch.linalg.qr(normal(SIZE, SIZE, seed=99))[0]


def stream(num_sites: int = 3, tokens: int = 256) -> list[Site]:
    made = [(mixed(tokens, 10 * index), normal(48, SIZE, seed=index)) for index in range(num_sites)]
    return [lambda site=site: site for site in made]


def measured(sites: list[Site], rotation: Tensor, inputs: Grid = INT4, weights: Grid | None = None) -> float:
    """The mean error of the tokens that are not learned from."""
    errors = []
    for x, weight in (site() for site in sites):
        kept = x[-(len(x) // HELD_OUT) :]
        errors.append(float(output_error(kept, weight, rotation, inputs, weights)))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_error_is_that_of_rounding_in_turned_coordinates(grid: Grid, weights: Grid | None) -> None:
    x, weight, R = mixed(20), normal(6, SIZE), hadamard().float()
    scale = input_scale((x @ R).abs().amax(), grid) if grid.overall else None
    other = weight @ R if weights is None else nearest(weight @ R, weights, torch.float32)
    wanted = x @ weight.T
    expected = (round_inputs(x @ R, grid, scale) @ other.T - wanted).square().sum() / wanted.square().sum()
    assert_close(output_error(x, weight, R, grid, weights), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_asking_for_a_gradient_does_not_change_the_error(weights: Grid | None) -> None:
    x, weight, R = mixed(20), normal(6, SIZE), hadamard()
    error = output_error(x, weight, R.clone().requires_grad_(), INT4, weights)
    assert torch.equal(error.detach(), output_error(x, weight, R, INT4, weights))


def test_the_gradient_is_that_of_the_ranges_each_weighted_by_the_error_behind_it() -> None:
    x, weight, R = mixed(20), normal(6, SIZE), hadamard()
    variable = R.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output_error(x, weight, variable, INT4), variable)
    y, direction = x @ R.float(), normal(SIZE, SIZE, seed=5).double()
    error = (round_inputs(y, INT4) - y).double() @ R.T @ weight.double().T
    x, y, weight = x.double(), y.double(), weight.double()

    def with_ranges_at(rotation: Tensor) -> Tensor:
        growth = torch.linalg.vector_norm(x @ rotation, 8, dim=1) / torch.linalg.vector_norm(y, 8, dim=1)
        return (error * growth.unsqueeze(1)).square().sum() / (x @ weight.T).square().sum()

    slope = (with_ranges_at(R + 1e-5 * direction) - with_ranges_at(R - 1e-5 * direction)) / 2e-5
    assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weights", [None, INT4], ids=str)
def test_learned_beats_the_best_of_eight_random_rotations_on_tokens_it_has_not_seen(weights: Grid | None) -> None:
    sites = stream()
    result = learn(hadamard(), sites, INT4, weights)
    assert result.after < 0.85 * min(measured(sites, hadamard(seed), weights=weights) for seed in range(8))
    assert not result.notes


def test_knowing_that_weights_are_rounded_gives_less_error_with_rounded_weights() -> None:
    sites = stream()
    knowing, unaware = (learn(hadamard(), sites, INT4, weights).rotation for weights in (INT4, None))
    assert measured(sites, knowing, weights=INT4) < 0.97 * measured(sites, unaware, weights=INT4)


def test_what_is_reported_is_the_error_of_what_is_returned() -> None:
    sites = stream()
    result = learn(hadamard(), sites, INT4, steps=20)
    assert result.before == pytest.approx(measured(sites, hadamard()), rel=1e-6)
    assert result.after == pytest.approx(measured(sites, result.rotation), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_the_rotation_is_orthogonal_after_any_number_of_steps(steps: int) -> None:
    result = learn(hadamard(), stream(), INT4, steps=steps)
    assert result.rotation.dtype == torch.float64
    assert deviation(result.rotation) < 1e-12


@pytest.mark.parametrize("inputs", GRIDS, ids=str)
@pytest.mark.parametrize("learning_rate", [0.1, 100.0])
def test_it_is_never_worse_than_the_start(inputs: Grid, learning_rate: float) -> None:
    sites = stream(tokens=64)
    result = learn(hadamard(), sites, inputs, steps=10, learning_rate=learning_rate)
    assert result.after <= result.before
    assert measured(sites, result.rotation, inputs) <= result.before * (1 + 1e-6)


def test_where_nothing_better_is_found_the_start_comes_back_and_is_said_to() -> None:
    sites = stream()
    best = learn(hadamard(), sites, INT4).rotation
    result = learn(best, sites, INT4, steps=5, learning_rate=100.0)
    assert torch.equal(result.rotation, best)
    assert result.after == result.before
    assert "left as it was" in result.notes[0]


def test_tokens_that_are_measured_on_are_not_learned_from() -> None:
    def with_last(value: float) -> list[Site]:
        sites = []
        for x, weight in (site() for site in stream()):
            x[-len(x) // HELD_OUT :] *= value
            sites.append(lambda site=(x, weight): site)
        return sites

    plain, changed = (learn(hadamard(), with_last(value), INT4, steps=20) for value in (1.0, 3.0))
    assert torch.equal(plain.rotation, changed.rotation)


def test_a_seed_gives_the_same_rotation_and_another_another() -> None:
    first, second, other = (learn(hadamard(), stream(), INT4, steps=10, seed=seed).rotation for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_no_more_than_one_site_is_in_memory() -> None:
    alive: list[weakref.ref[Tensor]] = []
    loads = []

    def site(index: int) -> Site:
        def load() -> tuple[Tensor, Tensor]:
            assert not any(reference() is not None for reference in alive), "the site before is still in memory"
            tensors = mixed(64, index), normal(8, SIZE, seed=index)
            alive[:] = [weakref.ref(tensor) for tensor in tensors]
            loads.append(index)
            return tensors

        return load

    learn(hadamard(), [site(index) for index in range(3)], INT4, steps=6)
    assert sorted(loads[3:6]) == [0, 1, 2], "every site has its turn before one comes again"


def test_a_centred_start_stays_centred() -> None:
    x = mixed(50).double()
    result = learn(hadamard(centred=True), stream(), INT4, steps=30, centred=True)
    assert_close((x @ result.rotation).mean(dim=1), x.mean(dim=1), atol=1e-10, rtol=0)
    assert result.after < 0.95 * result.before


def test_a_site_without_inputs_or_with_tiny_ones_disturbs_nobody() -> None:
    for factor in (0.0, 1e-30):
        silent: Site = lambda factor=factor: (factor * mixed(64), normal(8, SIZE))  # noqa: E731
        result = learn(hadamard(), [*stream(2), silent], INT4, steps=20)
        assert result.after < result.before
        assert deviation(result.rotation) < 1e-12


def test_inputs_of_half_precision_are_learned_from_as_well() -> None:
    halves: list[Site] = [lambda s=s: tuple(tensor.bfloat16() for tensor in s()) for s in stream()]  # type: ignore[misc]
    result = learn(hadamard(), halves, INT4, steps=30)
    assert result.after < 0.95 * result.before


def test_a_gradient_that_is_not_finite_ends_learning_with_the_best_so_far() -> None:
    x, weight = mixed(512), normal(8, SIZE)
    broken = x.clone()
    broken[0, 0] = torch.inf
    visits = []

    def site() -> tuple[Tensor, Tensor]:
        visits.append(len(visits))
        return (x if len(visits) < 20 else broken), weight

    result = learn(hadamard(), [site], INT4, steps=100)
    assert result.notes == ("learning ended at step 18 of 100: the gradient of site 0 is NaN or infinite",)
    assert result.after < result.before


def test_an_objective_that_is_not_finite_at_the_start_is_an_error() -> None:
    broken: Site = lambda: (torch.full((8, SIZE), torch.nan), normal(4, SIZE))  # noqa: E731
    with pytest.raises(NumericalError, match="site 2 of 3: its inputs or weights are NaN"):
        learn(hadamard(), [*stream(2), broken], INT4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sites": []}, "no sites"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"start": normal(SIZE, SIZE)}, "not orthogonal"),
        ({"start": hadamard(size=64)}, r"inputs \[256, 32\] and weights \[48, 32\] does not fit a rotation of size 64"),
        ({"sites": [lambda: (normal(1, SIZE), normal(2, SIZE))]}, "2 tokens at least"),
        ({"centred": True}, "does not keep the mean"),
        ({"inputs": replace(INT4, group_size=5)}, "in_features=32 is not a multiple of group_size=5"),
    ],
)
def test_what_cannot_be_learned_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(**{"start": hadamard(), "sites": stream(), "inputs": INT4, **changed})  # type: ignore[arg-type]
