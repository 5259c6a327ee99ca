"""Bytes keep every code, words every group, and progressive quantization stays within int8 and loses little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_kernels.byte_planes import (
    GROUP,
    dequantize_progressive,
    pack_bytes,
    pack_channels,
    pack_groups,
    quantize_progressive,
    unpack_bytes,
    unpack_groups,
)

ODD_SIZES = [(1, 1), (3, 17), (17, 64), (2, 65), (5, 128), (3, 129), (2, 300)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", ODD_SIZES)
def test_codes_come_back_as_they_went_in(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_bytes(codes)
    assert packed.shape == (shape[0], -(-shape[1] // 128) * 64)
    assert torch.equal(unpack_bytes(packed, shape[1]), codes)


def test_low_nibbles_are_the_first_64_inputs_of_a_block_and_high_ones_the_next() -> None:
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 3], codes[0, 64 + 3], codes[0, 128 + 5], codes[0, 192 + 5] = 1, 2, 3, 4
    packed = pack_bytes(codes)
    assert packed[0, 3] == 1 + (2 << 4)
    assert packed[0, 64 + 5] == 3 + (4 << 4)
    assert packed.count_nonzero() == 2


def test_signed_codes_and_zero_points_are_shifted_together() -> None:
    codes = torch.randint(-8, 8, (5, 70), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, zero_point = random(5).abs(), torch.tensor([-8, -1, 0, 3, 7])
    weight, scale, zero_scaled = pack_channels(codes, scale, zero_point)
    restored = unpack_bytes(weight, 70) * scale[:, None] - zero_scaled[:, None]
    torch.testing.assert_close(restored, (codes - zero_point[:, None]) * scale[:, None], rtol=0, atol=1e-5)


def test_a_symmetric_weight_has_its_zero_in_the_middle() -> None:
    codes, scale = torch.zeros(3, 8, dtype=torch.int8), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(pack_channels(codes, scale, None)[2], 8 * scale)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_every_scale_and_offset_comes_back(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    scale = torch.randint(1, 18, (300, groups), dtype=torch.int32, generator=generator)
    offset = torch.randint(-128, 128, (300, groups), dtype=torch.int32, generator=generator)
    words = pack_groups(scale, offset)
    assert words.shape == (-(-groups // 2), 300)
    restored = unpack_groups(words)
    assert torch.equal(restored[0][:, :groups], scale)
    assert torch.equal(restored[1][:, :groups], offset)


def weights() -> dict[str, Tensor]:
    heavy = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    outlier = random(8, 512)
    outlier[:, 7] = 40
    return {
        "normal": random(32, 512),
        "heavy tails": heavy.sample((32, 512)),
        "one outlier": outlier,
        "all positive": random(8, 512).abs() + 3,
        "zeros": torch.zeros(4, 512),
        "extremes": torch.tensor([-1.0, 1.0]).repeat(4, 256),
        "odd width": random(8, 333),
        "bfloat16": random(8, 512).to(torch.bfloat16),
    }


@pytest.mark.parametrize("name", weights())
def test_what_the_codes_mean_fits_int8_and_no_byte_carries(name: str) -> None:
    weight = weights()[name]
    packed, _, groups = quantize_progressive(weight)
    values = dequantize_progressive(packed, groups, weight.shape[1])
    assert -128 <= int(values.min()) <= int(values.max()) <= 127
    step = unpack_groups(groups)[0][:, : -(-weight.shape[1] // GROUP)]
    assert int(step.min()) >= 1
    assert int(step.max()) <= 16


@pytest.mark.parametrize("name", weights())
def test_no_weight_is_off_by_more_than_half_a_step_and_what_is_cut(name: str) -> None:
    weight = weights()[name].float()
    packed, scale, groups = quantize_progressive(weight)
    values = dequantize_progressive(packed, groups, weight.shape[1])
    step = unpack_groups(groups)[0].repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]
    error = (values * scale[:, None] - weight).abs() / scale[:, None]
    # The narrower of two scales leaves out at most 15 / 2 at either end, and rounding the ends half of one.
    assert bool((error <= step / 2 + 8.01).all())
    assert float((error > step / 2 + 0.51).float().mean()) < 0.12


def test_groups_of_64_lose_no_more_with_integer_scales_than_with_float_ones() -> None:
    weight = random(64, 1024)
    packed, scale, groups = quantize_progressive(weight)
    restored = dequantize_progressive(packed, groups, 1024) * scale[:, None]
    grouped = weight.view(64, -1, GROUP)
    low, high = grouped.amin(dim=2, keepdim=True), grouped.amax(dim=2, keepdim=True)
    step = (high - low) / 15
    floats = (((grouped - low) / step).round() * step + low).view(64, -1)
    assert (restored - weight).norm() < 1.01 * (floats - weight).norm()


def test_a_weight_of_zeros_is_zeros() -> None:
    packed, scale, groups = quantize_progressive(torch.zeros(2, 130))
    assert not (dequantize_progressive(packed, groups, 130) * scale[:, None]).any()
