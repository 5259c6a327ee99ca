"""Packing three-bit codes loses nothing and costs three bits, and kernels read back exactly what went in."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant_kernels import library, three_bit_words
from quant_kernels.packed_codes import code_addresses, load_planes
from quant_kernels.three_bit_words import (
    high_bit,
    pack_three_bits,
    three_bit_offset,
    three_bit_shape,
    unpack_three_bits,
)

SIZES = [(1, 1), (3, 17), (64, 256), (65, 257), (130, 600)]
ALL_WORDS = np.arange(1 << 16, dtype=np.uint32)


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 8, (rows, columns), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("size", SIZES)
def test_codes_come_back_as_they_went_in(size: tuple[int, int], dtype: torch.dtype) -> None:
    codes = random_codes(*size).to(dtype)
    packed = pack_three_bits(codes)
    assert [*packed.shape] == three_bit_shape(*size)
    assert packed.dtype == torch.int16
    assert packed.is_contiguous()
    assert torch.equal(unpack_three_bits(packed, *size), codes.to(torch.uint8))


def test_a_code_takes_three_bits() -> None:
    assert 8 * pack_three_bits(random_codes(128, 512)).nbytes == 3 * 128 * 512


def test_two_words_and_their_high_bits_have_a_code_of_each_plane_and_a_tile_is_in_one_piece() -> None:
    codes = random_codes(128, 512)
    data = pack_three_bits(codes).flatten().numpy().view(np.uint16)
    row, column = 70, 256 + 4  # tile 1 of rows, tile 1 of columns
    tile = data[(1 * 2 + 1) * 3072 :]
    high = int(tile[64 * 32 + (row - 64) * 16 + 2])
    for odd in (0, 1):
        word = int(tile[(row - 64) * 32 + 4 + odd])
        found = [word >> 2 * plane & 3 | (high >> high_bit(plane) - 2 * odd & 1) << 2 for plane in range(8)]
        assert found == codes[row, column + odd : column + 256 : 32].tolist()


def test_what_is_missing_of_a_tile_is_zero() -> None:
    packed = pack_three_bits(torch.full((1, 33), 7))
    assert int(packed[0, 0, 0, 0]) == 0xF
    assert int(packed[0, 0, 64, 0]) == 0b1101  # planes 0 and 1 of the first column, plane 0 of the second
    assert int((packed != 0).sum()) == 32 + 16


@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_assembly_turns_each_of_all_words_and_each_high_bit_into_codes(dtype: torch.dtype, half: int) -> None:
    """Runs the very text, both words of a register at once: the other one and its high bits are the complements."""
    name = str(dtype).removeprefix("torch.")
    assembly, kind = getattr(three_bit_words, f"{name.upper()}_ASSEMBLY").value, getattr(tl, name)
    for high in (0, 0xFFFF, *(1 << bit for bit in range(16))):
        words, bits = (
            one << half | (one ^ 0xFFFF) << (16 - half) for one in (ALL_WORDS, np.full_like(ALL_WORDS, high))
        )
        for plane, register in enumerate(run(assembly, words, bits)):
            halves = (register >> half & 0xFFFF).astype(np.uint16).view(np.int16)
            code = ALL_WORDS >> 2 * plane & 3 | (high >> high_bit(plane) & 1) << 2
            value = torch.from_numpy(halves).view(dtype).float().numpy()
            np.testing.assert_array_equal(value, code + three_bit_offset(plane, kind))


def run(assembly: str, words: np.ndarray, bits: np.ndarray) -> list[np.ndarray]:
    """The eight outputs of PTX that is made of shifts and lop3 with a table."""
    registers = {"$8": words, "$9": bits}
    for line in assembly.strip("{}\n").split("\n")[1:]:
        name, target, *sources = re.findall(r"[\w.$]+", line)
        a, *others = (registers[each] if each in registers else np.uint32(int(each, 0)) for each in sources)
        match name, others:
            case "shl.b32", [count]:
                registers[target] = a << count
            case "shr.b32", [count]:
                registers[target] = a >> count
            case "lop3.b32", [b, c, table]:
                registers[target] = lop3(a, b, c, int(table))
            case _:
                raise AssertionError(f"an unknown instruction: {line}")
    return [registers[f"${plane}"] for plane in range(8)]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Each bit of the table is the result for one combination of bits of a, b and c."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            terms = [value if row >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


@triton.jit
def _unpack_kernel(words, codes, rows, columns, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    addresses = code_addresses(words, tl.minimum(row, rows - 1), columns, 3)
    for tile in range(tl.cdiv(columns, 256)):
        planes = load_planes(addresses, tile, DTYPE, ASM, 3)
        for plane in tl.static_range(8):
            column = tile * 256 + plane * 32 + tl.arange(0, 32)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            value = planes[plane].to(tl.float32) - three_bit_offset(plane, DTYPE)
            tl.store(codes + row[:, None] * columns + column[None, :], value, mask=inside)


@pytest.mark.skipif(not library.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("dtype", [tl.float16, tl.float32], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_kernel_reads_the_codes_that_were_packed(size: tuple[int, int], dtype: tl.dtype) -> None:
    check_kernel(size, "cuda" if torch.cuda.is_available() else "cpu", dtype, False)


@pytest.mark.gpu
@pytest.mark.skipif(library.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16], ids=str)
def test_a_gpu_reads_the_codes_that_were_packed(dtype: tl.dtype, asm: bool) -> None:
    check_kernel((130, 600), "cuda", dtype, asm)


def check_kernel(size: tuple[int, int], device: str, dtype: tl.dtype, asm: bool) -> None:
    expected = random_codes(*size).to(device)
    codes = torch.full(size, torch.nan, device=device)
    _unpack_kernel[(triton.cdiv(size[0], 32),)](pack_three_bits(expected), codes, *size, DTYPE=dtype, ASM=asm)
    assert torch.equal(codes, expected.float())
