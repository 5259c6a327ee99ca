"""Packing two-bit codes loses nothing, and kernels read back from words exactly what went in."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant_kernels import library, two_bit_words
from quant_kernels.two_bit_words import (
    pack_two_bits,
    two_bit_offset,
    two_bit_offsets,
    two_bit_shape,
    unpack_two_bit_planes,
    unpack_two_bits,
)

SIZES = [(1, 1), (3, 17), (64, 256), (65, 257), (130, 600)]
ALL_WORDS = np.arange(1 << 16, dtype=np.uint32)


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("size", SIZES)
def test_codes_come_back_as_they_went_in(size: tuple[int, int], dtype: torch.dtype) -> None:
    codes = random_codes(*size).to(dtype)
    packed = pack_two_bits(codes)
    assert [*packed.shape] == two_bit_shape(*size)
    assert packed.dtype == torch.int16
    assert packed.is_contiguous()
    assert torch.equal(unpack_two_bits(packed, *size), codes.to(torch.uint8))


def test_a_word_has_one_code_of_each_plane_and_a_tile_is_in_one_piece() -> None:
    codes = random_codes(128, 512)
    flat = pack_two_bits(codes).flatten().to(torch.int32) & 0xFFFF
    row, column = 70, 256 + 5  # tile 1 of rows, tile 1 of columns
    word = int(flat[(1 * 2 + 1) * 64 * 32 + (row - 64) * 32 + 5])
    assert [word >> 2 * plane & 3 for plane in range(8)] == codes[row, column : column + 256 : 32].tolist()


def test_what_is_missing_of_a_tile_is_zero() -> None:
    packed = pack_two_bits(torch.full((1, 33), 3))
    assert int(packed[0, 0, 0, 0]) == 0xF
    assert int((packed != 0).sum()) == 32


@pytest.mark.parametrize(
    ("assembly", "mantissa_bits", "bias", "offsets"),
    [
        (two_bit_words.BFLOAT16_ASSEMBLY, 7, 127, (128, 32, 8, 128, 32, 8, 128, 32)),
        (two_bit_words.FLOAT16_ASSEMBLY, 10, 15, (16, 4, 64, 16, 4, 64, 16, 4)),
    ],
    ids=["bfloat16", "float16"],
)
@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
def test_the_assembly_turns_each_of_all_words_into_its_codes(
    assembly: tl.constexpr, mantissa_bits: int, bias: int, offsets: tuple[int, ...], half: int
) -> None:
    """Runs the very text, both words of a register at once: the other one is the complement."""
    register = ALL_WORDS << half | (ALL_WORDS ^ 0xFFFF) << (16 - half)
    for plane, bits in enumerate(run(assembly.value, register)):
        value = decode(bits >> half & 0xFFFF, mantissa_bits, bias)
        np.testing.assert_array_equal(value, (ALL_WORDS >> 2 * plane & 3) + offsets[plane])


def run(assembly: str, words: np.ndarray) -> list[np.ndarray]:
    """The eight outputs of PTX that is made of shl, shr and lop3 with a table."""
    registers = {"$8": words}
    for name, target, *operands in re.findall(r"(shl|shr|lop3)\.b32 (\S+), (\S+), (\w+)(?:, (\w+), (\w+))?;", assembly):
        source, second = registers[operands[0]], np.uint32(int(operands[1], 0))
        if name == "lop3":
            registers[target] = lop3(source, second, np.uint32(int(operands[2], 0)), int(operands[3], 0))
        else:
            registers[target] = source << second if name == "shl" else source >> second
    assert assembly.count(";") - 1 == len(re.findall(r"(?:shl|shr|lop3)\.b32", assembly)), "an unknown instruction"
    return [registers[f"${plane}"] for plane in range(8)]


def lop3(a: np.ndarray, b: np.uint32, c: np.uint32, table: int) -> np.ndarray:
    """Each bit of the table is the result for one combination of bits of a, b and c."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            terms = [value if row >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def decode(bits: np.ndarray, mantissa_bits: int, bias: int) -> np.ndarray:
    """The value of normal, positive floats of 16 bits."""
    mantissa = bits & (1 << mantissa_bits) - 1
    exponent = (bits >> mantissa_bits).astype(np.int64) - bias
    return (1 + mantissa / (1 << mantissa_bits)) * np.exp2(exponent)


@triton.jit
def _unpack_kernel(words, codes, rows, columns, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    read = tl.minimum(row, rows - 1)
    for tile in range(tl.cdiv(columns, 256)):
        planes = unpack_two_bit_planes(tl.load(words + two_bit_offsets(read, columns) + tile * 2048), DTYPE, ASM)
        for plane in tl.static_range(8):
            column = tile * 256 + plane * 32 + tl.arange(0, 32)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            value = planes[plane].to(tl.float32) - two_bit_offset(plane, DTYPE)
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
    _unpack_kernel[(triton.cdiv(size[0], 32),)](pack_two_bits(expected), codes, *size, DTYPE=dtype, ASM=asm)
    assert torch.equal(codes, expected.float())
