"""Three-bit codes as two-bit words and a plane of high bits: three bits a code, and nothing more.

Contract: codes [rows, columns], each 0 … 7, become int16 words [rows / 64, columns / 256, 96, 32], rows and columns
rounded up and filled with zeros. A tile of 64 rows × 256 columns is 6 KiB in one piece. Its first 64 × 32 words are the
low two bits, as `quant_kernels.two_bit_words` lays them out. The other 32 × 32 are 64 × 16, each with the high bits of
two words, of an even column and the next one: bit `high_bit` of a plane is that of the first, two places lower is that
of the second.

Kernels unpack words to floats code + offset, which are exact. High bits, those of odd columns shifted by two places,
are just above the low bits in planes 0, 2, 4 and 6, and in planes 1, 3, 5 and 7 once both are shifted. So one
instruction puts four together, and each nibble is a code. Two nibbles at a time are in reach of a mantissa of seven
bits, where they are given offsets of 128 and 8. Sixteen codes take 14 instructions in bfloat16, and two more to part
the high bits; in float16 20, since there each is shifted to the highest bits, for an offset of 8.

High bits of odd columns are shifted before the assembly, which therefore is elementwise, and right however words are
spread over threads. They are read 16 at a time, for Triton would lay out activations for operands of 8 bits otherwise,
and read them in twice as many pieces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.two_bit_words import PLANES, TILE_COLUMNS, pack_two_bits, two_bit_shape, unpack_two_bits
from quant_kernels.words import PLANE_COLUMNS, TILE_ROWS

THREE_BIT_TILE_WORDS = tl.constexpr(96 * 32)


def three_bit_shape(rows: int, columns: int) -> list[int]:
    """The shape of the words of codes [rows, columns]."""
    row_tiles, column_tiles, tile_rows, words = two_bit_shape(rows, columns)
    return [row_tiles, column_tiles, tile_rows + TILE_ROWS // 2, words]


def pack_three_bits(codes: Tensor) -> Tensor:
    """Codes 0 … 7 of any integer type, [rows, columns] → words. They are not checked; nothing is lost."""
    rows, columns = codes.shape
    low = pack_two_bits(codes & 3)
    bits = F.pad(codes >> 2, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)).to(torch.int16)
    even, odd = bits.view(low.shape[0], TILE_ROWS, low.shape[1], PLANES, PLANE_COLUMNS // 2, 2).unbind(-1)
    high = torch.zeros_like(even[:, :, :, 0])
    for plane in range(PLANES):
        high |= even[:, :, :, plane] << high_bit(plane) | odd[:, :, :, plane] << high_bit(plane) - 2
    return torch.cat((low, high.transpose(1, 2).reshape(*low.shape[:2], TILE_ROWS // 2, PLANE_COLUMNS)), dim=2)


def unpack_three_bits(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_three_bits`: uint8 [rows, columns]."""
    row_tiles, column_tiles, *_ = words.shape
    low = unpack_two_bits(words[:, :, :TILE_ROWS], rows, columns)
    pairs = words[:, :, TILE_ROWS:].reshape(row_tiles, column_tiles, TILE_ROWS, PLANE_COLUMNS // 2)
    high = torch.stack((pairs, pairs << 2), dim=-1).flatten(3)
    planes = torch.stack([(high >> high_bit(plane) & 1).to(torch.uint8) for plane in range(PLANES)], dim=3)
    bits = planes.transpose(1, 2).reshape(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return low | bits[:rows, :columns] << 2


@triton.constexpr_function
def high_bit(plane: int) -> int:
    """Where the high bit of a plane is, of an even word."""
    return 2 * plane + 2 - plane % 2


@triton.constexpr_function
def three_bit_offset(plane: int, dtype: tl.dtype) -> int:
    """What `unpack_three_bit_planes` adds to the codes of a plane in a type."""
    return 128 if dtype == tl.bfloat16 and plane // 2 % 2 == 0 else 8


def _assembly(places: tuple[int, int, int, int], powers: dict[int, int]) -> str:
    """PTX: two words in operand 8 and their high bits in operand 9 → operands 0 to 7.

    Of each half, nibble n of the even planes, and of the odd ones, goes to the mantissa bits from places[n] on.
    """
    lines = ["{", ".reg .b32 nibbles, t, u;"]
    for odd in (0, 1):
        lines += ["shr.b32 t, $8, 2;", "shr.b32 u, $9, 1;"] if odd else []
        lines.append(f"lop3.b32 nibbles, {'t, u' if odd else '$8, $9'}, 0x33333333, 0xE4;")
        shifted = 0
        for nibble, place in enumerate(places):
            shift = place - 4 * nibble
            if shift != shifted:
                lines.append(f"{'shl.b32' if shift > 0 else 'shr.b32'} t, nibbles, {abs(shift)};")
            shifted = shift
            source, mask, power = "t" if shift else "nibbles", (7 << place) * 0x10001, powers[place] * 0x10001
            lines.append(f"lop3.b32 ${2 * nibble + odd}, {source}, {mask:#010x}, {power:#010x}, 0xEA;")
    return "\n".join([*lines, "}"])


BFLOAT16_ASSEMBLY = tl.constexpr(_assembly((0, 4, 0, 4), {0: 0x4300, 4: 0x4100}))
FLOAT16_ASSEMBLY = tl.constexpr(_assembly((7, 7, 7, 7), {7: 0x4800}))
CONSTRAINTS = tl.constexpr("=&r," * PLANES + "r,r")


@triton.jit
def _plain(low, high, plane: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    code = ((low >> (2 * plane)) & 3) | (((high >> high_bit(plane)) & 1) << 2)
    return (code + three_bit_offset(plane, DTYPE)).to(DTYPE)


@triton.jit
def unpack_three_bit_planes(words, pairs, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [R, 32] and their high bits [R, 16] → the eight planes in `DTYPE`, each code + its `three_bit_offset`.
    `ASM`: for NVIDIA."""
    high = tl.join(pairs, pairs << 2).reshape(words.shape)
    if ASM and DTYPE == tl.bfloat16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY,
            CONSTRAINTS,
            [words, high],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    elif ASM:
        planes = tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY,
            CONSTRAINTS,
            [words, high],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        a, b = words.to(tl.int32), high.to(tl.int32)
        planes = (
            _plain(a, b, 0, DTYPE), _plain(a, b, 1, DTYPE), _plain(a, b, 2, DTYPE), _plain(a, b, 3, DTYPE),
            _plain(a, b, 4, DTYPE), _plain(a, b, 5, DTYPE), _plain(a, b, 6, DTYPE), _plain(a, b, 7, DTYPE),
        )  # fmt: skip
    return planes


@triton.jit
def three_bit_offsets(rows, columns):  # type: ignore[no-untyped-def]
    """Where the words of `rows` [R] of codes with `columns` columns are in their first tile, int64 [R, 32], and where
    their high bits, [R, 16]. The next 256 columns are `THREE_BIT_TILE_WORDS` further."""
    rows = rows.to(tl.int64)
    tile = rows // 64 * tl.cdiv(columns, 256) * THREE_BIT_TILE_WORDS
    low = tile + rows % 64 * 32
    high = tile + 64 * 32 + rows % 64 * 16
    return low[:, None] + tl.arange(0, 32)[None, :], high[:, None] + tl.arange(0, 16)[None, :]
