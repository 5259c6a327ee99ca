from __future__ import annotations

import pytest
import torch

from compress.core.inputs import clipping_scale, input_scale, round_inputs
from compress.core.scheme import FP8, MXFP4, NVFP4, Grid

INT8, INT4 = Grid(8), Grid(4)
STATIC = Grid(8, rows=None)


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 5, 64, generator=generator) * torch.logspace(-2, 2, 5).view(1, 5, 1)).to(dtype)


@pytest.mark.parametrize(
    "grid", [INT8, INT4, FP8, Grid(8, group_size=16), Grid(8, group_size=16, kind="float")], ids=str
)
def test_every_token_is_rounded_on_its_own(grid: Grid) -> None:
    x = tokens()
    alone = torch.stack([round_inputs(token, grid) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(round_inputs(x, grid), alone)


@pytest.mark.parametrize(("grid", "steps"), [(INT8, 255), (INT4, 15)])
def test_no_number_moves_by_more_than_half_a_step(grid: Grid, steps: int) -> None:
    x = tokens()
    step = 2 * x.abs().amax(dim=-1, keepdim=True) / steps
    assert ((round_inputs(x, grid) - x).abs() <= 0.5001 * step).all()


def test_a_group_is_not_disturbed_by_an_outlier_in_another() -> None:
    x, grid = tokens(), Grid(8, group_size=16)
    x[..., 0] = 1000
    assert torch.equal(round_inputs(x, grid)[..., 16:], round_inputs(tokens(), grid)[..., 16:])


def test_a_fixed_scale_clips_what_is_larger() -> None:
    rounded = round_inputs(torch.tensor([[1.0, -3.0, 0.26]]), STATIC, torch.tensor([1 / 127.5]))
    assert rounded[0].tolist() == pytest.approx([127 / 127.5, -128 / 127.5, 33 / 127.5])


def test_a_grid_with_a_fixed_scale_needs_it() -> None:
    with pytest.raises(ValueError, match="needs a scale that calibration has fixed"):
        round_inputs(tokens(), STATIC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_keep_their_type_and_are_not_changed(dtype: torch.dtype) -> None:
    x = tokens(dtype)
    before = x.clone()
    assert round_inputs(x, INT8).dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("grid", [INT8, FP8], ids=str)
def test_silence_stays_silence(grid: Grid) -> None:
    assert torch.equal(round_inputs(torch.zeros(2, 8), grid), torch.zeros(2, 8))


def test_the_largest_number_meets_the_end_of_the_grid() -> None:
    assert float(input_scale(torch.tensor(448.0), FP8)) == 1
    assert float(input_scale(torch.tensor(127.5), INT8)) == 1


@pytest.mark.parametrize(
    ("grid", "arguments"),
    [
        (INT8, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}),
        (INT4, {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}),
        (FP8, {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
        (
            NVFP4,
            {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
                "scale_dtype": "torch.float8_e4m3fn",
            },
        ),
        (
            MXFP4,
            {
                "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True,
                "scale_dtype": "torch.uint8",
            },
        ),
    ],
)  # fmt: skip
def test_the_official_package_rounds_to_the_same_numbers(grid: Grid, arguments: dict[str, object]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args, x = QuantizationArgs.model_validate(arguments), tokens()
    overall = input_scale(x.abs().amax(), grid) if grid.overall else None
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), overall)
    assert torch.equal(round_inputs(x, grid, overall), fake_quantize(x, scale, zero_point, args, overall))


def test_a_range_is_clipped_where_that_loses_less() -> None:
    x = tokens().flatten(0, 1)
    even, rare = torch.ones(64), x.clone()
    rare[0, 0] = 100 * x.abs().amax()
    largest = rare.abs().amax()

    def lost(scale: torch.Tensor, importance: torch.Tensor) -> float:
        return float((round_inputs(rare, STATIC, scale) - rare).square().sum(dim=0) @ importance)

    ignored = even.clone()
    ignored[0] = 0
    assert clipping_scale(rare, STATIC, largest, ignored) < 0.3 * input_scale(largest, STATIC)
    assert lost(clipping_scale(rare, STATIC, largest, ignored), ignored) < lost(input_scale(largest, STATIC), ignored)
    assert clipping_scale(rare, STATIC, largest, even) == input_scale(largest, STATIC), "one number holds all energy"
    assert clipping_scale(x * 0, STATIC, x.new_zeros(()), even) > 0
