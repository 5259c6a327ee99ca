"""Packing keeps every code in the bytes that are promised, and what is no weight is refused."""

from __future__ import annotations

import pytest
import torch

from quant_kernels.layout import check, pack_nibbles, unpack_nibbles

ODD_SIZES = [(1, 1), (3, 17), (17, 3), (33, 32)]


@pytest.mark.parametrize("shape", ODD_SIZES)
def test_nibbles_come_back_as_they_went_in(shape: tuple[int, int]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), shape[1]), codes)


@pytest.mark.parametrize("shape", ODD_SIZES)
def test_two_codes_share_a_byte(shape: tuple[int, int]) -> None:
    rows, columns = shape
    assert pack_nibbles(torch.zeros(shape, dtype=torch.int8)).nbytes == rows * ((columns + 1) // 2)


def test_a_code_beyond_its_bits_is_refused_with_both_ranges() -> None:
    with pytest.raises(ValueError, match="hold 0 … 4, but 3 bits reach from -4 to 3"):
        check(torch.tensor([[0, 4]], dtype=torch.int8), torch.ones(1, 1), None, 3)


def test_a_zero_point_beyond_its_bits_is_refused() -> None:
    zero_point = torch.tensor([[-5]], dtype=torch.int8)
    with pytest.raises(ValueError, match="zero_point hold -5"):
        check(torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1), zero_point, 3)


@pytest.mark.parametrize("scale_shape", [(2, 3), (3, 1), (2,), (2, 0)])
def test_scales_that_do_not_divide_the_codes_are_refused(scale_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="scale has shape"):
        check(torch.zeros(2, 8, dtype=torch.int8), torch.ones(scale_shape), None, 4)


def test_zero_points_must_match_the_scales() -> None:
    zero_point = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"zero_point is torch\.int8 of shape"):
        check(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1), zero_point, 4)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_without_a_kernel_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        check(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1), None, bits)
