"""Two-bit codes in 16-bit words, laid out so that a GPU turns 16 of them into floats with ten instructions.

Contract: codes [rows, columns], each 0 … 3, become int16 words [rows / 64, columns / 256, 64, 32], rows and columns
rounded up and filled with zeros. A tile of 64 rows × 256 columns is 4 KiB in one piece. Word r of a row of a tile has
the codes of its columns r, 32 + r, … 224 + r, the first in the lowest bits: eight *planes* of 32 consecutive columns,
and otherwise as `quant_kernels.words` has four.

Kernels unpack words to floats code + offset, which are exact: the code becomes mantissa bits of a power of two. At
which of the mantissa's bits is free, if the power is chosen so that the last bit of the code is worth 1. So three
planes share one shift, and differ in mask and offset: 128, 32 and 8 in bfloat16, 64, 16 and 4 in float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.words import PLANE_COLUMNS, TILE_ROWS, word_offsets

TILE_COLUMNS = 256
PLANES = 8


def two_bit_shape(rows: int, columns: int) -> list[int]:
    """The shape of the words of codes [rows, columns]."""
    return [triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS), TILE_ROWS, PLANE_COLUMNS]


def pack_two_bits(codes: Tensor) -> Tensor:
    """Codes 0 … 3 of any integer type, [rows, columns] → words. They are not checked; nothing is lost."""
    rows, columns = codes.shape
    row_tiles, column_tiles, *_ = two_bit_shape(rows, columns)
    padded = F.pad(codes, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)).to(torch.int16)
    planes = padded.view(row_tiles, TILE_ROWS, column_tiles, PLANES, PLANE_COLUMNS)
    words = torch.zeros_like(planes[:, :, :, 0])
    for plane in range(PLANES):
        words |= planes[:, :, :, plane] << 2 * plane
    return words.transpose(1, 2).contiguous()


def unpack_two_bits(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_two_bits`: uint8 [rows, columns]."""
    planes = torch.stack([(words >> 2 * plane).to(torch.uint8) & 3 for plane in range(PLANES)], dim=3)
    row_tiles, column_tiles, *_ = words.shape
    codes = planes.transpose(1, 2).reshape(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return codes[:rows, :columns]


def _assembly(lowest: int, lead: int, powers: tuple[int, int, int]) -> str:
    """PTX: two words in operand 8 → operands 0 to 7, both halves of each `word << shift & mask | power`.

    Plane p goes to the mantissa bits from `lowest` + 2 · ((p + lead) mod 3) on.
    """
    lines, shifted = ["{", ".reg .b32 t;"], 0
    for plane in range(PLANES):
        position = (plane + lead) % 3
        shift = lowest + 2 * position - 2 * plane
        if shift and shift != shifted:
            lines.append(f"{'shl.b32' if shift > 0 else 'shr.b32'} t, $8, {abs(shift)};")
        shifted = shift
        mask, power = (3 << lowest + 2 * position) * 0x10001, powers[position] * 0x10001
        lines.append(f"lop3.b32 ${plane}, {'t' if shift else '$8'}, {mask:#010x}, {power:#010x}, 0xEA;")
    return "\n".join([*lines, "}"])


BFLOAT16_ASSEMBLY = tl.constexpr(_assembly(lowest=0, lead=0, powers=(0x4300, 0x4200, 0x4100)))
"""Into bits 0, 2 and 4 of seven."""
FLOAT16_ASSEMBLY = tl.constexpr(_assembly(lowest=4, lead=1, powers=(0x5400, 0x4C00, 0x4400)))
"""Into bits 4, 6 and 8 of ten: offsets should be small, since products with code + offset are summed."""
CONSTRAINTS = tl.constexpr("=&r," * PLANES + "r")


@triton.constexpr_function
def two_bit_offset(plane: int, dtype: tl.dtype) -> int:
    """What `unpack_two_bit_planes` adds to the codes of a plane in a type."""
    return 128 >> 2 * (plane % 3) if dtype == tl.bfloat16 else 64 >> 2 * ((plane + 1) % 3)


@triton.jit
def _plain(wide, plane: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return (((wide >> (2 * plane)) & 3) + two_bit_offset(plane, DTYPE)).to(DTYPE)


@triton.jit
def unpack_two_bit_planes(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the eight planes in `DTYPE`, each code + its `two_bit_offset`. `ASM`: for NVIDIA."""
    if ASM and DTYPE == tl.bfloat16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY,
            CONSTRAINTS,
            [words],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    elif ASM:
        planes = tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY,
            CONSTRAINTS,
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32)
        planes = (
            _plain(wide, 0, DTYPE), _plain(wide, 1, DTYPE), _plain(wide, 2, DTYPE), _plain(wide, 3, DTYPE),
            _plain(wide, 4, DTYPE), _plain(wide, 5, DTYPE), _plain(wide, 6, DTYPE), _plain(wide, 7, DTYPE),
        )  # fmt: skip
    return planes


@triton.jit
def two_bit_offsets(rows, columns):  # type: ignore[no-untyped-def]
    """Where the words of `rows` [R] of codes with `columns` columns are in their first tile: int64 [R, 32]."""
    return word_offsets(rows, tl.cdiv(columns, 2))
