"""Four-bit codes in 16-bit words, laid out so that a GPU turns two of them into floats with two instructions.

Contract: codes [rows, columns], each 0 … 15, become int16 words [rows / 64, columns / 128, 64, 32], rows and columns
rounded up and filled with zeros. A tile of 64 rows × 128 columns is 4 KiB in one piece. Word r of a row of a tile has
the codes of its columns r, 32 + r, 64 + r and 96 + r, the first in the lowest bits. So each nibble holds a *plane* of
32 consecutive columns: unpacking interleaves nothing, and a group of 32 columns is a plane of its own.

Kernels unpack words to the floats code + `code_offset`, which are exact: the code becomes mantissa bits of a power of
two, where it costs a mask and a shift, and of four planes one needs no shift. What is then left to do is to take off
offset + zero, from the weights, or from the products by way of sums of activations. It is inline assembly on two words
at a time, since compilers split them; it is elementwise, and therefore right however words are spread over threads.
Elsewhere than on NVIDIA the same floats come from plain arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 64
TILE_COLUMNS = 128
PLANES = 4
PLANE_COLUMNS = TILE_COLUMNS // PLANES
TILE_WORDS = tl.constexpr(TILE_ROWS * PLANE_COLUMNS)


def word_shape(rows: int, columns: int) -> list[int]:
    """The shape of the words of codes [rows, columns]."""
    return [triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS), TILE_ROWS, PLANE_COLUMNS]


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0 … 15 of any integer type, [rows, columns] → words. They are not checked; nothing is lost."""
    rows, columns = codes.shape
    row_tiles, column_tiles, *_ = word_shape(rows, columns)
    padded = F.pad(codes, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)).to(torch.int16)
    planes = padded.view(row_tiles, TILE_ROWS, column_tiles, PLANES, PLANE_COLUMNS).unbind(3)
    words = planes[0] | planes[1] << 4 | planes[2] << 8 | planes[3] << 12
    return words.transpose(1, 2).contiguous()


def unpack_words(words: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: uint8 [rows, columns]."""
    planes = torch.stack([(words >> 4 * plane).to(torch.uint8) & 15 for plane in range(PLANES)], dim=3)
    row_tiles, column_tiles, *_ = words.shape
    codes = planes.transpose(1, 2).reshape(row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return codes[:rows, :columns]


def _assembly(shifts: tuple[int, ...], mask: int, offset: int) -> str:
    """PTX: two words in operand 4 → operands 0 to 3, both halves of each `word << shift & mask | offset`."""
    lines = ["{", ".reg .b32 t;"]
    for plane, shift in enumerate(shifts):
        if shift:
            lines.append(f"{'shl.b32' if shift > 0 else 'shr.b32'} t, $4, {abs(shift)};")
        word = "t" if shift else "$4"
        lines.append(f"lop3.b32 ${plane}, {word}, {mask * 0x10001:#010x}, {offset * 0x10001:#010x}, 0xEA;")
    return "\n".join([*lines, "}"])


BFLOAT16_ASSEMBLY = tl.constexpr(_assembly((0, -4, -8, -12), mask=0x000F, offset=0x4300))
"""The lowest four of seven mantissa bits of 128."""
FLOAT16_ASSEMBLY = tl.constexpr(_assembly((4, 0, -4, -8), mask=0x00F0, offset=0x5400))
"""Four of ten mantissa bits of 64. Mask and offset are the same for all planes, so that they stay in registers."""


@triton.constexpr_function
def code_offset(dtype: tl.dtype) -> int:
    """What `unpack_planes` adds to codes in a type."""
    return 128 if dtype == tl.bfloat16 else 64


@triton.jit
def unpack_planes(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the four planes in `DTYPE`, each code + `code_offset(DTYPE)`. `ASM`: for NVIDIA."""
    if ASM and DTYPE == tl.bfloat16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif ASM:
        planes = tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32)
        planes = (
            ((wide & 15) + code_offset(DTYPE)).to(DTYPE),
            (((wide >> 4) & 15) + code_offset(DTYPE)).to(DTYPE),
            (((wide >> 8) & 15) + code_offset(DTYPE)).to(DTYPE),
            (((wide >> 12) & 15) + code_offset(DTYPE)).to(DTYPE),
        )
    return planes


@triton.jit
def word_offsets(rows, columns):  # type: ignore[no-untyped-def]
    """Where the words of `rows` [R] of codes with `columns` columns are in their first tile: int64 [R, 32].

    The next 128 columns are `TILE_WORDS` further.
    """
    rows = rows.to(tl.int64)
    return ((rows // 64 * tl.cdiv(columns, 128) * 64 + rows % 64) * 32)[:, None] + tl.arange(0, 32)[None, :]
