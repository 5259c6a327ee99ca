from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme, parse_scheme
from compress.errors import NumericalError
from compress.models.store import LazyModel
from compress.quantize.autoround import (
    FARTHEST,
    AutoRound,
    Learned,
    Loss,
    Rounding,
    begin,
    block_loss,
    learn,
    moved,
    rounded,
)
from compress.quantize.rtn import RTN, rtn
from compress.stage import LayerReport

GRIDS = [Grid(2), Grid(3, False), Grid(4, True, 8), Grid(4, False, 16), Grid(8, False)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(w: Tensor, grid: Grid, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    return rtn(w, grid, scale_dtype=dtype, range="mse")


def anywhere(w: Tensor, grid: Grid, dtype: torch.dtype = torch.bfloat16) -> Rounding:
    """A rounding somewhere on its way."""
    first = begin(w, nearest(w, grid, dtype))
    offset = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return Rounding(first.weight, first.first, offset, 0.1 * normal(*first.ends.shape, seed=2).clamp(-1, 1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learning_begins_with_round_to_nearest_to_the_bit(grid: Grid) -> None:
    w = normal(8, 32)
    assert rounded(begin(w, nearest(w, grid))) == nearest(w, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learning_can_begin_with_any_codes(grid: Grid) -> None:
    w, other = normal(8, 32), normal(8, 32, seed=5)
    first = nearest(other, grid)
    assert rounded(begin(w, first)) == first


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_goes_to_one_of_its_two_neighbours_or_to_the_end_of_the_grid(grid: Grid) -> None:
    w = normal(8, 32)
    tensor = rounded(anywhere(w, grid))
    codes, step = tensor.codes.float(), tensor.step.repeat_interleave(32 // tensor.step.shape[1], dim=1)
    near = (tensor.dequantize() - w).abs() <= 1.001 * step.abs()
    assert (near | (codes == grid.qmin) | (codes == grid.qmax)).all()
    assert not torch.equal(tensor.codes, nearest(w, grid).codes)


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def differentiated(w: Tensor, rounding: Rounding, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of offset and ends, by autograd through the formulas of the paper."""
    grid, first = rounding.first.grid, rounding.first
    offset, ends = rounding.offset.clone().requires_grad_(), rounding.ends.clone().requires_grad_()
    zero = torch.zeros_like(first.step) if first.zero_point is None else first.zero_point.float()
    low, high = (1 + ends[0]) * (grid.qmin - zero) * first.step, (1 + ends[-1]) * (grid.qmax - zero) * first.step
    scale = (high - low) / (grid.qmax - grid.qmin)
    if not grid.symmetric:
        zero = straight_through(grid.qmin - low / scale)
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    shape = len(w), first.scale.shape[1], -1
    code = (straight_through(w.view(shape) / scale + offset.view(shape)) + zero).clamp(grid.qmin, grid.qmax)
    ((code - zero) * scale).backward(gradient.view(shape))
    return offset.grad, ends.grad


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_step_goes_against_the_sign_of_the_straight_through_gradient(grid: Grid) -> None:
    w, gradient, rate = normal(8, 32), normal(8, 32, seed=3), 1e-3
    rounding = anywhere(w, grid, torch.float32)
    if not grid.symmetric:  # where ends have moved, the rounding of the zero point has no exact gradient
        rounding = Rounding(w, rounding.first, 0.9 * rounding.offset, torch.zeros_like(rounding.ends))
    offset, ends = differentiated(w, rounding, gradient)
    after = moved(rounding, rounded(rounding), gradient, rate)
    assert torch.allclose(after.offset, (rounding.offset - rate * offset.sign()).clamp(-0.5, 0.5))
    assert torch.allclose(after.ends, rounding.ends - 2 / (grid.qmax - grid.qmin) * rate * ends.sign())
    assert ((offset == 0).any(), (ends == 0).any()) == (grid.bits < 8, False)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_step_leads_out_of_bounds_or_changes_what_it_was_given(grid: Grid) -> None:
    w, gradient = normal(8, 32), normal(8, 32, seed=3)
    rounding = anywhere(w, grid)
    before = rounding.weight.clone(), rounding.offset.clone(), rounding.ends.clone()
    after = moved(rounding, rounded(rounding), gradient, 5.0)
    for mine, kept in zip((rounding.weight, rounding.offset, rounding.ends), before, strict=True):
        assert torch.equal(mine, kept)
    assert after.offset.abs().max() == FARTHEST
    assert (after.ends.abs() <= FARTHEST).all()
    assert rounded(after).dequantize().isfinite().all()


def test_scales_come_in_the_dtype_they_are_stored_in() -> None:
    tensor = rounded(anywhere(normal(8, 32), Grid(4, False, 8)))
    assert tensor.scale.dtype == torch.bfloat16
    assert tensor.zero_point is not None
    assert tensor.zero_point.dtype == torch.int8


def linear(w: Tensor, windows: int = 16) -> tuple[Loss, list[Sequence[int]]]:
    """A layer with correlated inputs that is to go on returning W x; and the batches it has been asked about."""
    width = w.shape[1]
    shared = normal(windows, 40, width // 4, seed=8) @ normal(width // 4, width, seed=9)
    x = shared + 0.3 * normal(windows, 40, width, seed=7)
    asked: list[Sequence[int]] = []

    def loss(weights: Mapping[str, Tensor], batch: Sequence[int]) -> Iterator[Tensor]:
        asked.append(batch)
        for window in batch:
            yield (x[window] @ (weights["w"] - w).T).square().mean().view(1)

    return loss, asked


def learned(w: Tensor, grid: Grid, loss: Loss, windows: int = 16, **settings: object) -> Learned:
    defaults = {"iterations": 60, "batch_size": 4, "rate": 1 / 120, "generator": torch.Generator().manual_seed(0)}
    return learn({"w": begin(w, nearest(w, grid))}, loss, range(windows), **{**defaults, **settings})


def mean(loss: Loss, tensor: QuantizedTensor, windows: int = 16) -> float:
    return float(torch.cat(list(loss({"w": tensor.dequantize()}, range(windows)))).double().mean())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learning_beats_round_to_nearest(grid: Grid) -> None:
    w = normal(16, 64)
    loss, _ = linear(w)
    result = learned(w, grid, loss)
    assert result.before == mean(loss, nearest(w, grid))
    assert result.loss < 0.9 * result.before
    assert not result.notes
    assert not result.untouched


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_loss_is_that_of_the_tensors_as_they_are_stored(grid: Grid) -> None:
    w = normal(8, 32)
    loss, _ = linear(w)
    result = learned(w, grid, loss, iterations=10)
    assert result.loss == mean(loss, result.tensors["w"])
    assert result.tensors["w"].scale.dtype == nearest(w, grid).scale.dtype


@pytest.mark.parametrize("rate", [1e-6, 1.0])
def test_what_learning_has_not_made_better_is_left_as_it_was_and_says_so(rate: float) -> None:
    w, grid = normal(8, 32), Grid(6)
    loss, _ = linear(w)
    result = learned(w, grid, loss, iterations=1, rate=rate)
    assert result.tensors["w"] == nearest(w, grid)
    assert result.loss == result.before
    assert "left as it was at the start" in result.notes[0]


def test_every_window_is_drawn_once_before_any_is_drawn_again() -> None:
    w = normal(8, 32)
    loss, asked = linear(w)
    learned(w, Grid(4), loss, iterations=8)
    batches = asked[1:-1]
    assert len(batches) == 8
    for half in (batches[:4], batches[4:]):
        assert sorted(window for batch in half for window in batch) == list(range(16))
    assert batches[:4] != batches[4:]


def test_the_seed_decides() -> None:
    w = normal(8, 32)
    one, same, other = (
        learned(w, Grid(3), linear(w)[0], generator=torch.Generator().manual_seed(seed)).tensors["w"]
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_steps_have_fewer_windows_where_there_are_not_enough() -> None:
    w = normal(8, 32)
    loss, asked = linear(w)
    result = learned(w, Grid(3), loss, windows=1)
    assert result.notes == ("steps of 1 windows, not 4: there are no more",)
    assert set(map(len, asked)) == {1}


def poisoned(loss: Loss, bad: Callable[[int], bool]) -> Loss:
    def worse(weights: Mapping[str, Tensor], batch: Sequence[int]) -> Iterator[Tensor]:
        for window, part in zip(batch, loss(weights, batch), strict=True):
            yield part * float("nan") if bad(window) else part

    return worse


def test_windows_without_a_finite_loss_are_left_out_and_counted() -> None:
    w = normal(8, 32)
    loss, asked = linear(w)
    result = learned(w, Grid(3), poisoned(loss, lambda window: window == 3))
    assert result.notes == ("1 of 16 windows had no finite loss and were left out",)
    assert result.loss < 0.7 * result.before
    assert all(3 not in batch for batch in asked[1:])


def test_where_no_window_has_a_finite_loss_there_is_no_result() -> None:
    w = normal(8, 32)
    with pytest.raises(NumericalError, match="NaN or infinite on all 16 calibration windows"):
        learned(w, Grid(3), poisoned(linear(w)[0], lambda window: True))


def test_a_gradient_that_is_not_finite_ends_learning_and_is_reported() -> None:
    w = normal(8, 32)
    loss, asked = linear(w)
    result = learned(w, Grid(3), poisoned(loss, lambda window: len(asked) == 21))
    assert result.notes[0] == "learning ended at step 19 of 60: a gradient was NaN or infinite"
    assert result.loss <= result.before


def test_a_layer_without_a_gradient_stays_and_is_named() -> None:
    w, loss = normal(8, 32), linear(normal(8, 32))[0]
    roundings = {"w": begin(w, nearest(w, Grid(3))), "idle": begin(w, nearest(w, Grid(3)))}
    generator = torch.Generator().manual_seed(0)
    result = learn(roundings, loss, range(16), iterations=20, batch_size=4, rate=0.05, generator=generator)
    assert result.untouched == {"idle"}
    assert result.tensors["idle"] == nearest(w, Grid(3))
    assert result.tensors["w"] != nearest(w, Grid(3))


def stage(
    tiny: Path, scratch: Path, method: AutoRound | RTN, windows: int = 8, prepare: Callable[[Block], None] | None = None
) -> tuple[Block, list[LayerReport], float]:
    """The first block of the tiny model after a stage, its reports, and the loss of the block as it is then."""
    model = LazyModel.open(tiny)
    tokens = torch.randint(2, 250, (windows, 32), generator=torch.Generator().manual_seed(0))
    entrance = enter(model, tokens, scratch / "activations-0")
    reports: list[LayerReport] = []
    losses: list[float] = []

    def work(block: Block) -> None:
        if prepare:
            prepare(block)
        names = [name for site in block.sites for name in site.layers]
        reports.extend(method.apply(block, dict.fromkeys(names, method.resolved)))
        with torch.no_grad():
            losses.append(float(torch.cat(list(block_loss(block)({}, range(windows)))).double().mean()))

    block, _ = next(walk(model, entrance, entrance.inputs, scratch, work, two_streams=True))
    return block, reports, losses[0]


@pytest.mark.parametrize("scheme", ["w3a16", "w4a4", "w4a8-static"])
def test_a_learned_block_is_nearer_to_the_original_than_a_rounded_one(scheme: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "nearest").mkdir()
    _, _, before = stage(tiny, tmp_path / "nearest", RTN(scheme, 32, range="importance"))
    block, reports, after = stage(tiny, tmp_path, AutoRound(scheme, 32, iterations=20))
    assert after < 0.95 * before
    assert [report.name for report in reports] == [name for site in block.sites for name in site.layers]
    assert all(report.fallback is None for report in reports)
    assert all(report.scheme == parse_scheme(scheme).name for report in reports)


def test_the_block_computes_what_was_measured(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Learned] = []

    def recorded(*args: object, **settings: object) -> Learned:
        results.append(learn(*args, **settings))
        return results[0]

    monkeypatch.setattr("compress.quantize.autoround.learn", recorded)
    block, _, loss = stage(tiny, tmp_path, AutoRound("w3a16", 32, iterations=5))
    assert block.quantized == results[0].tensors
    assert loss == results[0].loss


def test_beginning_with_gptq_ends_below_gptq(tiny: Path, tmp_path: Path) -> None:
    method = AutoRound("w3a16", 32, start="gptq", iterations=40, learning_rate=0.01)
    (tmp_path / "gptq").mkdir()
    _, _, before = stage(tiny, tmp_path / "gptq", method.first)
    _, reports, after = stage(tiny, tmp_path, method)
    assert after < 0.95 * before
    assert all(report.fallback is None for report in reports)


def test_a_layer_of_zeros_stays_and_those_before_it_are_named(tiny: Path, tmp_path: Path) -> None:
    def prepare(block: Block) -> None:
        block.rewrite(down, torch.zeros_like(block.weight(down)))

    down = "model.layers.0.mlp.down_proj"
    block, reports, _ = stage(tiny, tmp_path, AutoRound("w3a16", 32, False, iterations=4), prepare=prepare)
    assert (block.quantized[down].dequantize() == 0).all()
    untouched = {report.name.rpartition(".")[2] for report in reports if report.fallback == "no gradient reached it"}
    assert untouched == {"gate_proj", "up_proj"}


def test_a_calibration_set_of_one_window_is_reported(tiny: Path, tmp_path: Path) -> None:
    _, reports, _ = stage(tiny, tmp_path, AutoRound("w3a16", 32, iterations=30, learning_rate=0.005), windows=1)
    assert all(report.fallback == "steps of 1 windows, not 8: there are no more" for report in reports)


def test_layers_of_other_stages_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    grid, name = Grid(3, True, 32), "model.layers.0.self_attn.o_proj"
    model = LazyModel.open(tiny)
    entrance = enter(model, torch.randint(2, 250, (4, 32)), tmp_path / "activations-0")
    reports: list[LayerReport] = []

    def work(block: Block) -> None:
        method = AutoRound("w3a16", 32, iterations=2, batch_size=2)
        reports.extend(method.apply(block, {name: Scheme(grid)}))
        assert not method.apply(block, {})

    block, _ = next(walk(model, entrance, entrance.inputs, tmp_path, work, two_streams=True))
    assert list(block.quantized) == [name] == [report.name for report in reports]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "int4"}, "unknown scheme 'int4'"),
        ({"scheme": "nf4"}, "scheme nf4: autoround learns integer grids, as w4a16 has; use gptq for floats"),
        ({"scheme": "nvfp4a16"}, "scheme nvfp4a16: autoround learns integer grids, as w4a16 has; use gptq for floats"),
        ({"range": "max"}, "unknown range"),
        ({"start": "awq"}, "start='awq' must be nearest or gptq"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0 and at most 1, or null"),
        ({"learning_rate": 2.0}, "learning_rate=2.0 must be above 0"),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoRound(**{"scheme": "w4a16", **fields})
