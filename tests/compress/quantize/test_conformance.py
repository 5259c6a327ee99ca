"""What every weight-quantization method must do, whatever it is; a new one is covered when it is in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.core.scheme import Grid, Scheme
from compress.models.store import LazyModel
from compress.quantize import METHODS

GRIDS = [Grid(4, True, 16), Grid(3, False, 32), Grid(8, True, None), Grid(2, False, 32)]


Quantized = Callable[[type, Grid], tuple[Block, list[Any]]]


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """`quantize`, which is done once for each method and grid."""
    return cache(lambda method, grid: quantize(method, grid, tiny, tmp_path_factory.mktemp("walk")))


def quantize(method: type, grid: Grid, tiny: Path, scratch: Path) -> tuple[Block, list[Any]]:
    """The first block of the tiny model after one stage, and the stage's reports."""
    model = LazyModel.open(tiny)
    stage = method(scheme=f"w{grid.bits}a16", symmetric=grid.symmetric, group_size=grid.group_size)
    tokens = torch.randint(2, 250, (16, 32), generator=torch.Generator().manual_seed(0))
    entrance = enter(model, tokens, scratch / "activations-0")
    reports: list[Any] = []

    def work(block: Block) -> None:
        reports.extend(stage.apply(block, {name: Scheme(grid) for site in block.sites for name in site.layers}))

    steps = walk(model, entrance, entrance.inputs, scratch, work, two_streams=stage.two_streams)
    block, _ = next(steps)
    return block, reports


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
class TestEveryMethod:
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_puts_every_layer_on_its_grid_and_reports_it(self, method: type, grid: Grid, quantized: Quantized) -> None:
        block, reports = quantized(method, grid)
        names = [name for site in block.sites for name in site.layers]
        assert [report.name for report in reports] == names
        for name in names:
            tensor = block.quantized[name]
            assert tensor.grid == grid
            assert grid.qmin <= tensor.codes.min()
            assert tensor.codes.max() <= grid.qmax
            assert tensor.scale.dtype == torch.bfloat16
            assert tensor.scale.shape == (tensor.shape[0], grid.num_groups(tensor.shape[1]))
            assert (tensor.zero_point is None) == grid.symmetric

    def test_the_block_computes_with_what_it_stores(self, method: type, quantized: Quantized) -> None:
        block, _ = quantized(method, GRIDS[0])
        for name, tensor in block.quantized.items():
            weight = block.model.module.get_parameter(f"{name}.weight")
            assert torch.equal(weight, tensor.dequantize(weight.dtype))
            assert ((weight - block.weight(name)).norm() / block.weight(name).norm()).item() < 0.2

    def test_gives_the_same_codes_twice(self, method: type, quantized: Quantized, tiny: Path, tmp_path: Path) -> None:
        first, _ = quantized(method, GRIDS[1])
        second, _ = quantize(method, GRIDS[1], tiny, tmp_path)
        assert first.quantized == second.quantized

    def test_more_bits_lose_less(self, method: type, quantized: Quantized) -> None:
        errors = []
        for bits in (2, 3, 4, 6, 8):
            _, reports = quantized(method, Grid(bits, False, 32))
            errors.append(sum(report.error for report in reports))
        assert errors == sorted(errors, reverse=True)
