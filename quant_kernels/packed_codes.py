"""Codes of 2, 3 or 4 bits as the words that kernels read: what `two_bit_words`, `three_bit_words` and `words` share.

Contract: codes [rows, columns], each 0 … 2^bits - 1, become tiles of int16 words [rows / 64, columns / C, any, 32], C
being `tile_columns`: a tile is in one piece, and consists of planes of 32 consecutive columns. Signed codes are stored
with 2^(bits - 1) added.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.three_bit_words import (
    THREE_BIT_TILE_WORDS,
    pack_three_bits,
    three_bit_offset,
    three_bit_offsets,
    three_bit_shape,
    unpack_three_bit_planes,
    unpack_three_bits,
)
from quant_kernels.two_bit_words import (
    pack_two_bits,
    two_bit_offset,
    two_bit_offsets,
    two_bit_shape,
    unpack_two_bit_planes,
    unpack_two_bits,
)
from quant_kernels.words import (
    TILE_WORDS,
    code_offset,
    pack_words,
    unpack_planes,
    unpack_words,
    word_offsets,
    word_shape,
)

BITS = (2, 3, 4)


def code_shape(rows: int, columns: int, bits: int) -> list[int]:
    """The shape of the words of codes [rows, columns]."""
    return {2: two_bit_shape, 3: three_bit_shape, 4: word_shape}[bits](rows, columns)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of any integer type, [rows, columns] → words. They are not checked; nothing is lost."""
    return {2: pack_two_bits, 3: pack_three_bits, 4: pack_words}[bits](codes)


def unpack_codes(words: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [rows, columns]."""
    return {2: unpack_two_bits, 3: unpack_three_bits, 4: unpack_words}[bits](words, rows, columns)


@triton.constexpr_function
def tile_columns(bits: int) -> int:
    """Columns of a tile."""
    return 128 if bits == 4 else 256


@triton.constexpr_function
def plane_offset(plane: int, dtype: tl.dtype, bits: int) -> int:
    """What `load_planes` adds to the codes of a plane in a type."""
    if bits == 3:
        return three_bit_offset(plane, dtype)
    return two_bit_offset(plane, dtype) if bits == 2 else code_offset(dtype)


@triton.jit
def code_addresses(words, rows, columns, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What `load_planes` wants: addresses in the first tile of `rows` [R] of codes with `columns` columns."""
    if BITS == 3:
        low, high = three_bit_offsets(rows, columns)
    else:
        low = two_bit_offsets(rows, columns) if BITS == 2 else word_offsets(rows, columns)
        high = low
    return words + low, words + high


@triton.jit
def load_planes(addresses, tile, DTYPE: tl.constexpr, ASM: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The planes [R, 32] of one of the tiles of some rows, each code + its `plane_offset`. `ASM`: for NVIDIA."""
    if BITS == 3:
        low = tl.load(addresses[0] + tile * THREE_BIT_TILE_WORDS, eviction_policy="evict_first")
        high = tl.load(addresses[1] + tile * THREE_BIT_TILE_WORDS, eviction_policy="evict_first")
        planes = unpack_three_bit_planes(low, high, DTYPE, ASM)
    else:
        low = tl.load(addresses[0] + tile * TILE_WORDS, eviction_policy="evict_first")
        planes = unpack_two_bit_planes(low, DTYPE, ASM) if BITS == 2 else unpack_planes(low, DTYPE, ASM)
    return planes
