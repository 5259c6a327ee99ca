from __future__ import annotations

import pytest
import torch

from compress.core.minifloat import pack_e2m1, round_e2m1, round_e4m3, unpack_e2m1

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_e2m1_is_the_nearest_level_with_halves_to_the_even_mantissa() -> None:
    x = torch.linspace(-7, 7, 14 * 64 + 1)
    distance = (x.clamp(-6, 6).abs().unsqueeze(1) - LEVELS).abs()
    nearest = distance.min(dim=1).values
    ties = (distance == nearest.unsqueeze(1)).sum(dim=1) > 1
    rounded = round_e2m1(x)
    assert torch.equal((rounded - x.clamp(-6, 6)).abs(), nearest)
    even = torch.tensor([0, 1.0, 2, 4])
    assert torch.isin(rounded[ties].abs(), even).all()
    assert torch.isin(rounded.abs(), LEVELS).all()


def test_e4m3_saturates() -> None:
    assert round_e4m3(torch.tensor([1e9, -500.0, 448.0, 17.0])).tolist() == [448.0, -448.0, 448.0, 16.0]


def test_fp4_codes_are_packed_as_the_format_has_them() -> None:
    codes = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]]).to(torch.float8_e4m3fn)
    assert pack_e2m1(codes).tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]]


def test_unpacking_fp4_inverts_packing() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(pack_e2m1(unpack_e2m1(packed)), packed)


def test_an_odd_number_of_fp4_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        pack_e2m1(torch.zeros(2, 3).to(torch.float8_e4m3fn))
