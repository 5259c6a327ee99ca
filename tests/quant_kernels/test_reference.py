"""The reference is an explicitly dequantized matrix product, whatever the bits, groups and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_kernels import reference
from quant_kernels.reference import dequantize_rows, linear_reference, pack

Weight = tuple[Tensor, Tensor, Tensor | None]


def random_weight(rows: int, columns: int, groups: int, bits: int, symmetric: bool) -> Weight:
    """Codes and zero points over the whole grid, scales of both signs."""
    generator = torch.Generator().manual_seed(rows * columns + bits)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=generator) / limit
    zero_point = torch.randint(-limit, limit, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, scale, None if symmetric else zero_point


def explicit(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The weight, one column at a time, in float64."""
    size = codes.shape[1] // scale.shape[1]
    columns = []
    for column in range(codes.shape[1]):
        zero = 0 if zero_point is None else zero_point[:, column // size].double()
        columns.append((codes[:, column].double() - zero) * scale[:, column // size].double())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (3, 17, 1), (17, 33, 3), (33, 32, 4)])
def test_it_equals_the_explicit_product(rows: int, columns: int, groups: int, bits: int, symmetric: bool) -> None:
    codes, scale, zero_point = random_weight(rows, columns, groups, bits, symmetric)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2))
    y = linear_reference(x, pack(codes, scale, zero_point, bits), bias)
    expected = x.double() @ explicit(codes, scale, zero_point).T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, zero_point = random_weight(200, 12, 2, 4, symmetric=False)
    packed = pack(codes, scale, zero_point, 4)
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    whole = linear_reference(x, packed)
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 1)
    assert reference.chunks(packed) == [(0, 64), (64, 128), (128, 192), (192, 200)]
    torch.testing.assert_close(linear_reference(x, packed), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_weight_is_rounded_once_to_the_type_of_x(dtype: torch.dtype) -> None:
    codes, scale, zero_point = random_weight(8, 16, 2, 4, symmetric=False)
    weight = dequantize_rows(pack(codes, scale, zero_point, 4), 0, 8, dtype)
    exact = dequantize_rows(pack(codes, scale, zero_point, 4), 0, 8, torch.float32)
    assert torch.equal(weight, exact.to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_up_to_four_bits_take_half_a_byte(bits: int) -> None:
    codes, scale, _ = random_weight(16, 64, 2, bits, symmetric=True)
    packed = pack(codes, scale, None, bits)
    assert packed.codes.nbytes == 16 * 64 * (0.5 if bits <= 4 else 1)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_4_bit_floats_are_values_times_scales_two_to_a_byte(form: str) -> None:
    """Every byte there is, with every scale that has a value."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(16, 1)
    if form == "nvfp4":
        scale = torch.arange(512).view(128, 4).remainder(127).to(torch.uint8).view(torch.float8_e4m3fn)
        packed, divisor, group_size = pack(codes, scale, None, 4, torch.tensor([300.0])), 300.0, 16
    else:
        scale = torch.arange(256).view(128, 2).clamp(max=254).to(torch.uint8).view(torch.float8_e8m0fnu)
        packed, divisor, group_size = pack(codes, scale, None, 4), 1.0, 32
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    levels = torch.empty(128, 64)
    levels[:, ::2], levels[:, 1::2] = values[codes.long() % 16], values[codes.long() // 16]
    expected = levels * (scale.float() / divisor)[:, torch.arange(64) // group_size]
    assert packed.codes.nbytes == 128 * 64 // 2
    for start, stop in ((0, 64), (64, 128), (0, 128)):
        rows = dequantize_rows(packed, start, stop, torch.float32)
        assert torch.equal(rows.view(torch.int32), expected[start:stop].view(torch.int32)), "signs of zeros too"
