from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.core.scheme import Grid, Scheme, parse_scheme
from compress.models.store import LazyModel
from compress.transform.smoothquant import SmoothQuant, rounding_error, smoothing_scale

W8A8 = parse_scheme("w8a8")


def weight(rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))


def inputs() -> torch.Tensor:
    """Tokens with one channel a hundred times as large as the others."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 100
    return x


def test_at_half_inputs_and_weights_end_up_equally_uneven() -> None:
    x, w = inputs(), weight()
    scale = smoothing_scale(x.abs().amax(dim=0), [w], 0.5)
    assert torch.allclose((x / scale).abs().amax(dim=0), (w * scale).abs().amax(dim=0), rtol=1e-5)


def test_a_planted_outlier_is_found_again() -> None:
    x, w = inputs(), weight()
    planted = torch.ones(32)
    planted[5] = 64
    natural = smoothing_scale(x.abs().amax(dim=0), [w], 0.7)
    found = smoothing_scale((x * planted).abs().amax(dim=0), [w / planted], 0.7)
    assert torch.allclose(found / natural, planted, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_silent_channel_and_one_that_nobody_reads_are_left_alone(alpha: float) -> None:
    largest, w = inputs().abs().amax(dim=0), weight()
    largest[3], w[:, 4] = 0, 0
    scale = smoothing_scale(largest, [w], alpha)
    assert scale[3] == scale[4] == 1
    assert scale.isfinite().all()


def test_smoothing_lowers_the_rounding_error_where_there_are_outliers() -> None:
    x, w = inputs(), weight()
    scale = smoothing_scale(x.abs().amax(dim=0), [w], 0.5)
    before, _ = rounding_error(x, w, W8A8, torch.ones(32), torch.float32)
    after, _ = rounding_error(x, w, W8A8, scale, torch.float32)
    assert after < 0.2 * before


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="must be from 0 to 1, or search"):
        SmoothQuant(alpha=alpha)


def smoothed(stage: SmoothQuant, scheme: Scheme, tiny: Path, scratch: Path) -> tuple[Block, torch.Tensor, torch.Tensor]:
    """The first block of the tiny model before and after: what it returns for the calibration windows."""
    model = LazyModel.open(tiny)
    tokens = torch.randint(2, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    entrance = enter(model, tokens, scratch / "activations-0")
    before: list[torch.Tensor] = []

    def work(block: Block) -> None:
        before.append(block._run(0).clone())
        names = [name for site in block.sites for name in site.layers]
        reports = stage.apply(block, dict.fromkeys(names, scheme))
        assert [report.name for report in reports] == (names if scheme.inputs else [])

    block, outputs = next(walk(model, entrance, entrance.inputs, scratch, work))
    return block, before[0], outputs.read(0, 8)


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_the_block_computes_what_it_did_before(alpha: float | str, tiny: Path, tmp_path: Path) -> None:
    block, before, after = smoothed(SmoothQuant(alpha), W8A8, tiny, tmp_path)
    assert block.rewritten
    assert ((after - before).norm() / before.norm()).item() < 2e-3  # norms are stored in bfloat16


def test_weight_only_schemes_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    block, before, after = smoothed(SmoothQuant(0.5), Scheme(Grid(4, group_size=32)), tiny, tmp_path)
    assert not block.rewritten
    assert torch.equal(before, after)
