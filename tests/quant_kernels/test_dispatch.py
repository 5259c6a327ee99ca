"""The table gives each layer a kernel and a reason, and no layer more bytes than it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant_kernels import KERNELS, choose, cpu, dequantize, linear, pack

needs_kernels = pytest.mark.skipif(
    cpu.instruction_set() not in cpu.BLOCK_ROWS, reason=f"no CPU kernels for {cpu.instruction_set()}"
)


def choice(**changes: Any) -> Any:
    usual = {"bits": 4, "group_size": 128, "symmetric": True, "dtype": torch.bfloat16, "device": "cpu"}
    return choose(**{**usual, "in_features": 512, "out_features": 512, **changes})


def weight(bits: int, rows: int = 64, columns: int = 256, groups: int = 2) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(bits)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    zero_point = torch.randint(-limit, limit, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, torch.rand(rows, groups, generator=generator) / limit, zero_point


@needs_kernels
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grouped_weights_of_up_to_four_bits_run_on_the_int4_product(bits: int) -> None:
    assert choice(bits=bits).name == "cpu_int4"


@needs_kernels
def test_8_bits_with_one_scale_per_channel_run_on_the_int8_product() -> None:
    assert choice(bits=8, group_size=None).name == "cpu_int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_activations_run_on_the_reference_and_the_reason_says_so(dtype: torch.dtype) -> None:
    backend = choice(dtype=dtype)
    assert backend.name == "reference"
    assert f"cpu_int4 needs bfloat16 activations, not {str(dtype)[6:]}" in backend.reason


def test_the_reason_on_a_gpu_does_not_speak_of_cpu_kernels() -> None:
    backend = choice(device="cuda:0")
    assert "cpu" not in backend.name
    assert "cpu" not in backend.reason


def test_the_last_kernel_of_the_table_runs_everything_everywhere() -> None:
    assert not KERNELS[-1].devices
    assert not KERNELS[-1].dtypes
    assert choice(bits=3, group_size=7, in_features=21, out_features=5, symmetric=False).name == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_kernel_takes_more_than_half_a_byte_and_its_scales(bits: int, dtype: torch.dtype) -> None:
    codes, scale, zero_point = weight(bits, rows=64, columns=1024, groups=8)
    packed = pack(codes, scale.to(torch.bfloat16), zero_point, bits=bits, dtype=dtype)
    assert packed.nbytes <= codes.numel() / 2 + 4 * scale.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_layer_is_the_product_with_its_dequantized_weight(bits: int, dtype: torch.dtype) -> None:
    packed = pack(*weight(bits), bits=bits, dtype=dtype)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double() @ dequantize(packed, torch.float64).T
    error = (linear(x, packed).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 0, 3)])
def test_any_leading_dimensions_are_kept(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = pack(*weight(4), bits=4, dtype=dtype)
    x = torch.randn(*leading, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear(x, packed)
    rows = linear(x.view(-1, 256), packed)
    assert torch.equal(y, rows.view(*leading, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_activations_give_the_same_result(dtype: torch.dtype) -> None:
    packed = pack(*weight(4), bits=4, dtype=dtype)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0)).to(dtype).T
    assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))


def test_activations_of_the_wrong_width_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features=256"):
        linear(torch.zeros(1, 255), pack(*weight(4), bits=4, dtype=torch.float32))


@needs_kernels
def test_activations_of_a_type_the_layout_does_not_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="cpu_int4 needs bfloat16 activations, not float32"):
        linear(torch.zeros(1, 256), pack(*weight(4), bits=4, dtype=torch.bfloat16))


def test_activations_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        linear(torch.zeros(1, 256, device="meta"), pack(*weight(4), bits=4, dtype=torch.float32))


def test_what_is_no_weight_is_not_packed() -> None:
    codes, scale, _ = weight(4)
    with pytest.raises(ValueError, match="3 bits reach"):
        pack(codes, scale, None, bits=3, dtype=torch.float32)


FP4 = {"codes": torch.zeros(3, 32, dtype=torch.uint8), "zero_point": None, "bits": 4, "dtype": torch.float32}
E4M3, E8M0 = torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(3, 2).to(torch.float8_e8m0fnu)
OVERALL = torch.ones(1)
WRONG: dict[str, dict[str, Any]] = {
    "which are FP4, two to a byte, but bits=8": {"bits": 8},
    "scale is torch.float32, expected torch.float8_e4m3fn or torch.float8_e8m0fnu": {"scale": E4M3.float()},
    r"scale has shape \[3, 2\] and is torch.float8_e4m3fn, in which 64 columns have groups of 16": {
        "scale": E4M3[:, :2]
    },
    r"scale has shape \[3, 4\] and is torch.float8_e8m0fnu": {"scale": E8M0.repeat(1, 2)},
    r"scale has shape \[2, 4\]": {"scale": E4M3[:2]},
    "zero_point is given, but floats have none": {"zero_point": torch.zeros(3, 4, dtype=torch.int8)},
    "global_scale is missing": {"global_scale": None},
    r"global_scale is torch.float32 of shape \[\]": {"global_scale": torch.tensor(1.0)},
    "global_scale is given, but MXFP4 has none": {"scale": E8M0},
    "global_scale is given for codes of torch.int8": {"codes": torch.zeros(3, 64, dtype=torch.int8)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_neither_nvfp4_nor_mxfp4_is_not_packed(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(**FP4 | {"scale": E4M3, "global_scale": OVERALL} | WRONG[message])


@pytest.mark.parametrize(("scale", "overall"), [(E4M3, OVERALL), (E8M0, None)], ids=["nvfp4", "mxfp4"])
def test_4_bit_floats_take_half_a_byte_and_the_scales_they_came_with(scale: Tensor, overall: Tensor | None) -> None:
    packed = pack(**FP4, scale=scale, global_scale=overall)
    assert packed.kernel == "reference"
    assert (packed.out_features, packed.in_features) == (3, 64)
    assert packed.nbytes == 3 * 64 // 2 + scale.numel() + (4 if overall is not None else 0)
    assert linear(torch.ones(2, 64), packed).shape == (2, 3)
