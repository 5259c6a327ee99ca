"""Layers that round their inputs, and FP8 layers, behind the package's one contract; in Triton's interpreter here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import Packed, choose, gpu_rounded, pack, reference, rounds_inputs
from quant_kernels.dispatch import KERNELS
from quant_kernels.library import INTERPRETED

KERNEL = {
    kernel.name: kernel
    for kernel in KERNELS
    if kernel.devices == ("cuda",) and (kernel.inputs or "fp8" in kernel.levels)
}
FP8 = torch.float8_e4m3fn
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs on the GPU itself here, in the tests marked gpu")


def weight(name: str, rows: int, columns: int, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None, int]:
    generator = torch.Generator().manual_seed(rows + columns)
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).to(torch.bfloat16) / 100
    if "fp8" in name:
        return torch.randn(rows, columns, generator=generator).mul(50).to(FP8), scale, None, 8
    limit = 8 if "w4" in name else 128
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    zero_point = torch.randint(-limit, limit, (rows, 1), generator=generator, dtype=torch.int8)
    return codes, scale, None if symmetric else zero_point, 4 if "w4" in name else 8


def rounded(x: Tensor, inputs: str | None) -> Tensor:
    """x as the kernels round it, in float64."""
    if inputs is None:
        return x.double()
    span = 127 if inputs == "int" else 448
    scale = x.double().abs().amax(dim=1, keepdim=True) / span
    levels = x.double() / scale
    return (levels.round() if inputs == "int" else levels.float().to(FP8).double()) * scale


def exact(x: Tensor, plain: Packed, bias: Tensor) -> Tensor:
    return reference.linear_reference(x, plain, bias.double())


@interpreted
@pytest.mark.parametrize("name", KERNEL)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 64, 128), (5, 70, 256), (33, 48, 100)])
def test_a_layer_rounds_its_inputs_and_multiplies(name: str, tokens: int, rows: int, columns: int) -> None:
    kernel, plain_weight = KERNEL[name], weight(name, rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    bias = torch.ones(rows, dtype=torch.float16)
    packed = kernel.pack(*plain_weight)
    expected = exact(rounded(x, kernel.inputs), reference.pack(*plain_weight), bias)
    assert float((kernel.linear(x, packed, bias).double() - expected).norm() / expected.norm()) < 2e-3
    assert rounds_inputs(packed) == (kernel.inputs is not None)


@interpreted
def test_w4a8_takes_off_zero_points() -> None:
    plain_weight = weight("gpu_w4a8", 64, 256, symmetric=False)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    bias = torch.zeros(64, dtype=torch.float16)
    expected = exact(rounded(x, "int"), reference.pack(*plain_weight), bias)
    y = gpu_rounded.linear_w4a8(x, gpu_rounded.pack_w4a8(*plain_weight))
    assert float((y.double() - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("name", KERNEL)
def test_rows_are_dequantized_as_packed(name: str) -> None:
    plain_weight = weight(name, 130, 200)
    packed, plain = KERNEL[name].pack(*plain_weight), reference.pack(*plain_weight)
    for start, stop in ((0, 64), (64, 130), (0, 130)):
        expected = reference.dequantize_rows(plain, start, stop, torch.float32)
        torch.testing.assert_close(KERNEL[name].dequantize_rows(packed, start, stop, torch.float32), expected)


@pytest.mark.parametrize(
    ("bits", "levels", "inputs", "name"),
    [
        (8, "int", "int", "gpu_w8a8"),
        (4, "int", "int", "gpu_w4a8"),
        (8, "fp8", "fp8", "gpu_fp8"),
        (8, "fp8", None, "gpu_fp8_weights"),
        (8, "int", None, "gpu_int8"),
        (4, "int", "fp8", "gpu_int4"),
    ],
)
def test_a_scheme_goes_to_its_kernel(bits: int, levels: str, inputs: str | None, name: str) -> None:
    chosen = choose(bits, None, True, torch.bfloat16, "cuda", 256, 64, levels=levels, inputs=inputs)  # type: ignore[arg-type]
    assert chosen.name == name


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "reason"),
    [
        (4, 128, True, "gpu_w4a8 needs one scale per row, not groups of 128"),
        (8, None, False, "gpu_w8a8 has no room for zero points"),
    ],
)
def test_where_no_kernel_can_round_inputs_the_reason_is_given(
    bits: int, group_size: int | None, symmetric: bool, reason: str
) -> None:
    chosen = choose(bits, group_size, symmetric, torch.bfloat16, "cuda", 256, 64, inputs="int")
    assert reason in chosen.reason
    assert chosen.name in {"gpu_int4", "gpu_int8"}


def test_on_the_cpu_the_caller_rounds() -> None:
    codes, scale, _, bits = weight("gpu_w8a8", 64, 128)
    assert not rounds_inputs(pack(codes, scale, None, bits=bits, dtype=torch.bfloat16, inputs="int"))
