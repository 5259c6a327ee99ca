from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.checkpoint import CompressedTensors
from compress.core.floats import quantize_float
from compress.core.scheme import FP8, FP8_TENSOR, MXFP4, NF4, NVFP4, Grid, Scheme
from compress.errors import NumericalError

BLOCK = Grid(8, group_size=128, kind="float", rows=128)
GRIDS = [FP8, FP8_TENSOR, BLOCK, NVFP4, MXFP4]


def weight(heavy: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(192, 256, generator=generator)
    return w * w.abs() ** 2 if heavy else w


def error(w: Tensor, grid: Grid, **options: Any) -> float:
    return float((quantize_float(w, grid, torch.float32, **options).dequantize() - w).square().mean())


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.format)
@pytest.mark.parametrize("search", [False, True])
def test_every_weight_goes_to_the_nearest_level_of_its_scale(grid: Grid, search: bool) -> None:
    w = weight()
    tensor = quantize_float(w, grid, torch.float32, search=search)
    step = tensor.step.repeat_interleave(256 // tensor.step.shape[1], dim=1)
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()]
    if grid.bits == 4:
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        levels = torch.cat((levels, -levels))
    nearest = ((w / step).unsqueeze(-1)[:32] - levels).abs().amin(dim=-1)
    assert torch.allclose((w / step - tensor.codes.float())[:32].abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("grid", "share"), [(NVFP4, 0.95), (MXFP4, 1), (NF4, 0.95)], ids=["nvfp4", "mxfp4", "nf4"])
def test_searching_scales_lowers_the_error(grid: Grid, share: float, heavy: bool) -> None:
    w = weight(heavy)
    assert error(w, grid, search=True) < share * error(w, grid, search=False)


@pytest.mark.parametrize("grid", [NVFP4, MXFP4, NF4], ids=lambda grid: grid.format)
def test_importance_lowers_the_weighted_error(grid: Grid) -> None:
    w, mass = weight(), torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(2))]
    plain, weighted = (
        ((quantize_float(w, grid, torch.float32, importance=given).dequantize() - w).square() * mass).sum()
        for given in (None, mass)
    )
    assert weighted < plain


def test_layers_that_run_as_one_share_the_scale_of_all_groups() -> None:
    w = weight()
    whole = quantize_float(w, NVFP4, torch.float32)
    part = quantize_float(w[:64], NVFP4, torch.float32, largest=float(w.abs().max()))
    assert torch.equal(part.global_scale, whole.global_scale)
    assert torch.equal(part.dequantize(), whole.dequantize()[:64])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.format)
def test_a_group_of_zeros_stays_zero(grid: Grid) -> None:
    w = weight()
    w[:128, :128] = 0
    assert torch.equal(quantize_float(w, grid, torch.float32).dequantize()[:128, :128], torch.zeros(128, 128))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.format)
def test_a_weight_that_is_no_number_is_refused(grid: Grid) -> None:
    w = weight()
    w[3, 4] = torch.nan
    with pytest.raises(NumericalError, match="1 of 49152 weights are NaN or infinite"):
        quantize_float(w, grid, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.format)
def test_the_official_package_has_the_same_scales_codes_and_weights(grid: Grid, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = weight(heavy=True).to(dtype)
    w[5, 32:64] = 0
    form, scheme = CompressedTensors(), Scheme(grid)
    tensor = quantize_float(w, grid, dtype, search=False)
    stored = {name.removeprefix("a."): value for name, value in form.encode("a", tensor).items()}
    config = QuantizationConfig.model_validate(form.quantization_config({"a": scheme}, []))
    official, group = BaseCompressor.get_value_from_registry(config.format), config.config_groups["group_0"]
    if not (grid == NVFP4 and dtype == torch.float32):  # which the package decompresses in bfloat16 at all times
        assert torch.equal(official.decompress(stored, group)["weight"], tensor.dequantize(dtype))

    if grid.bits == 4:
        groups = w.float().view(len(w), -1, grid.group_size)
        overall = generate_gparam(w.float().min(), w.float().max()) if grid == NVFP4 else None
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), group.weights, overall)
        there = groups.abs().amax(-1) > 0
        assert torch.equal(scale.float()[there], (tensor.scale.float() if grid == NVFP4 else tensor.step)[there])
        assert overall is None or torch.equal(overall, tensor.global_scale)
