"""4-bit float layers behind the package's one contract, from a quantized weight on; in Triton's interpreter here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compress.core.floats import quantize_float
from compress.core.inputs import round_inputs
from compress.core.minifloat import pack_e2m1
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import MXFP4, NVFP4, Grid
from compress.runtime.modules import QuantLinear
from quant_kernels import KERNELS, Packed, choose, dispatch, fp4, gpu, linear, pack, reference
from quant_kernels.library import INTERPRETED

KERNEL = next(kernel for kernel in KERNELS if kernel.name == "gpu_fp4")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs on the GPU itself here, in the tests marked gpu")
both = pytest.mark.parametrize("grid", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error: one rounding of the result, and where the weight is made first one of that; the interpreter truncates
to bfloat16."""


@pytest.fixture
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table gives layers on the CPU to the kernel, which runs in the interpreter."""
    here = replace(KERNEL, devices=("cpu",))
    monkeypatch.setattr(dispatch, "KERNELS", (here, *KERNELS))
    monkeypatch.setitem(dispatch._BY_NAME, "gpu_fp4", here)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def quantized(grid: Grid, rows: int, columns: int) -> QuantizedTensor:
    """Rows of very different size, one of them empty."""
    weight = randn(rows, columns) * torch.logspace(-3, 0, rows)[:, None]
    weight[rows // 2] = 0
    return quantize_float(weight, grid, torch.bfloat16)


def plain(weight: QuantizedTensor) -> tuple[Tensor, Tensor, None, int, Tensor | None]:
    return pack_e2m1(weight.codes), weight.scale, None, 4, weight.global_scale


def error(y: Tensor, x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> float:
    exact = reference.linear_reference(
        x.double(), reference.pack(*plain(weight)), None if bias is None else bias.double()
    )
    return float((y.cpu().double() - exact).norm() / exact.norm())


@interpreted
@pytest.mark.usefixtures("_on_this_device")
@both
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 3, 32), (5, 70, 160), (33, 64, 416), (gpu.MOST_TOKENS + 1, 70, 160)]
)
def test_a_layer_computes_what_the_reference_computes(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, grid: Grid
) -> None:
    weight, x, bias = quantized(grid, rows, columns), randn(tokens, columns, dtype=dtype), randn(rows, dtype=dtype)
    layer = QuantLinear.from_quantized(weight, bias, dtype=dtype)
    assert layer.backend == "gpu_fp4"
    assert error(layer(x), x, weight, bias) < TOLERANCE[dtype]


@interpreted
@both
@pytest.mark.parametrize("bias", [None, randn(130, dtype=torch.float16)], ids=["no bias", "bias"])
def test_every_route_computes_what_the_reference_computes(bias: Tensor | None, grid: Grid) -> None:
    weight, x = quantized(grid, 130, 224), randn(7, 224, dtype=torch.float16)
    packed = KERNEL.pack(*plain(weight))
    for route in KERNEL.routes:
        assert error(route.linear(x, packed, bias), x, weight, bias) < TOLERANCE[x.dtype], route.summary


@interpreted
@pytest.mark.usefixtures("_on_this_device")
@both
def test_inputs_that_a_scheme_rounds_are_rounded_before(grid: Grid) -> None:
    weight, x = quantized(grid, 70, 160), randn(5, 160, dtype=torch.float16)
    input_scale = torch.tensor([500.0]) if grid == NVFP4 else None
    layer = QuantLinear.from_quantized(weight, inputs=grid, input_scale=input_scale, dtype=x.dtype)
    assert layer.backend == "gpu_fp4"
    rounded = round_inputs(x, grid, input_scale)
    assert not torch.equal(rounded, x)
    assert error(layer(x), rounded, weight) < TOLERANCE[x.dtype]


@pytest.mark.usefixtures("_on_this_device")
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_dequantizes_to_the_very_same_weight(dtype: torch.dtype, grid: Grid) -> None:
    weight = quantized(grid, 130, 224)
    layer = QuantLinear.from_quantized(weight, dtype=torch.bfloat16)
    assert layer.backend == "gpu_fp4"
    assert torch.equal(layer.dequantize(dtype), weight.dequantize(dtype))


@both
def test_rows_are_dequantized_as_packed(grid: Grid) -> None:
    weight = quantized(grid, 130, 224)
    packed = KERNEL.pack(*plain(weight))
    for start, stop in ((0, 64), (64, 130), (0, 130)):
        rows = KERNEL.dequantize_rows(packed, start, stop, torch.float32)
        assert torch.equal(rows, weight.dequantize()[start:stop])


@both
def test_a_weight_takes_the_bits_it_is_stored_in(grid: Grid) -> None:
    packed = KERNEL.pack(*plain(quantized(grid, 128, 512)))
    assert packed.nbytes == 128 * 512 // 2 + 128 * 512 // grid.group_size + 4  # type: ignore[operator]


def chosen(group_size: int, dtype: torch.dtype = torch.bfloat16) -> dispatch.Backend:
    return choose(4, group_size, True, dtype, "cuda", 512, 70, levels="fp4")


@pytest.mark.parametrize("group_size", [16, 32])
def test_the_table_gives_layers_on_a_gpu_to_it(group_size: int) -> None:
    assert chosen(group_size).name == "gpu_fp4"
    assert chosen(group_size, torch.float16).name == "gpu_fp4"
    assert f"from {gpu.MOST_TOKENS + 1} tokens on dequantized once" in chosen(group_size).reason


def test_other_layers_run_on_the_reference_and_the_reason_says_why() -> None:
    groups, floats = chosen(64), chosen(16, torch.float32)
    assert groups.name == floats.name == "reference"
    assert "gpu_fp4 needs groups of 16 (NVFP4) or 32 (MXFP4) columns, not 64" in groups.reason
    assert "gpu_fp4 needs float16 or bfloat16 activations, not float32" in floats.reason


@pytest.mark.parametrize("byte", [0x7F, 0x80])
def test_scales_that_are_none_are_refused(byte: int) -> None:
    codes, scale, _, _, overall = plain(quantized(NVFP4, 3, 32))
    scale.view(torch.uint8)[1, 1] = byte
    with pytest.raises(ValueError, match="negative or NaN"):
        KERNEL.pack(codes, scale, None, 4, overall)


def words(grid: Grid) -> tuple[Tensor, Tensor, Tensor, int]:
    packed: Packed = KERNEL.pack(*plain(quantized(grid, 70, 160)))
    assert packed.global_scale is not None
    return packed.codes.to(DEVICE), packed.scale.to(DEVICE), packed.global_scale.to(DEVICE), packed.in_features


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_weight_made_for_many_tokens_is_the_formula(dtype: torch.dtype, grid: Grid) -> None:
    made, exact = torch.ops.netsuke.dequantize_fp4(*words(grid), dtype), quantized(grid, 70, 160).dequantize()
    # Rounded from a float32 that has two roundings of its own; the interpreter truncates.
    allowed = 1.01 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert made.dtype == dtype
    assert bool(((made.cpu().float() - exact).abs() <= allowed).all())
    by_reference = fp4.dequantize_fp4_reference(*words(grid), dtype)
    assert bool(((by_reference.cpu().float() - exact).abs() <= allowed).all())


@both
def test_that_operator_meets_the_contract_of_torch_library(grid: Grid) -> None:
    torch.library.opcheck(torch.ops.netsuke.dequantize_fp4, (*words(grid), torch.float16))


def test_what_does_not_fit_that_operator_is_named() -> None:
    codes, scale, overall, inputs = words(NVFP4)
    for arguments, sentence in (
        ((codes.int(), scale, overall, inputs, torch.float16), "words is torch.int32"),
        ((codes, scale, overall, 640, torch.float16), "scale has 4 rows: 640 inputs"),
        ((codes, scale, overall[0], inputs, torch.float16), r"global_scale has shape \[\]"),
        ((codes, scale, overall, inputs, torch.int8), "dtype=torch.int8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fp4.dequantize_fp4(*arguments)


@pytest.mark.gpu
@both
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 17, 200, gpu.MOST_TOKENS + 1])
def test_a_layer_on_the_device_computes_what_the_reference_computes(
    tokens: int, dtype: torch.dtype, grid: Grid
) -> None:
    weight, x = quantized(grid, 520, 1056), randn(tokens, 1056, dtype=dtype)
    codes, scale, _, bits, overall = plain(weight)
    packed = pack(codes, scale, None, bits=bits, dtype=dtype, device="cuda", global_scale=overall)
    assert packed.kernel == "gpu_fp4"
    assert error(linear(x.cuda(), packed), x, weight) < TOLERANCE[dtype]
    assert torch.equal(dispatch.dequantize(packed).cpu(), weight.dequantize())
