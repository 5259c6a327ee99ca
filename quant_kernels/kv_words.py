"""Codes of keys and values as kernels take them: the bytes of `kv_planes` two at a time, unpacked to floats.

A word is two neighbouring bytes of a token. In each it has one code of every plane, so it becomes 16 / bits floats, and
a run of words of some tokens becomes as many *pieces* [tokens, words], each of every second channel of a part of a
plane. No code is moved: it is queries that are read, and results that are written, in the order of pieces, once. A run
is all words of a token, but at least 16, as tensor cores want it; what pieces are too wide by is 0. Where groups of
channels share a scale, runs are no longer than that either: then a piece mostly has one scale per token, and threads
find those of two tokens, which they multiply at once, side by side.

Floats are code + `piece_offset`, exactly, and float16 on a GPU: codes become mantissa bits of a power of two. Where a
token has one scale, sums in float32 take offsets off again, and any power will do: bytes get 1152, and of two codes of
4 bits the lower one gets 1024 and the upper one 64, with no shift. Where there are more scales, codes become values in
float16, scale · (code + offset) + (minimum - scale · offset), and rounding the latter costs up to offset / 2048 of a
step. Offsets are 64 at most there, those of weights (`words`, `two_bit_words`), as they are of 2 bits in any case.

Of FP8 it is the values: sign, exponent and mantissa move to where float16 has them, and the exponent, then off by 8, is
put right at the end (`piece_factor`). The two codes of NaN, which nothing is quantized to, count as ±480.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.kv_planes import KVFormat
from quant_kernels.two_bit_words import two_bit_offset, unpack_two_bit_planes
from quant_kernels.words import code_offset, unpack_planes

PER_CHANNEL = tl.constexpr(0)
FP8 = tl.constexpr(-1)
"""In the place of the number of groups of a token: other kinds of scales."""

BYTE_ASSEMBLY = tl.constexpr("""{
.reg .b32 high;
shr.b32 high, $2, 8;
lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
lop3.b32 $1, high, 0x00FF00FF, 0x64806480, 0x6A;
}""")
"""Two words in operand 2 → their low and their high bytes, code + 1152: `byte & mask ^ power`, which also turns the
sign bit, so that it counts up."""
FOUR_BIT_ASSEMBLY = tl.constexpr("""{
.reg .b32 high;
shr.b32 high, $4, 8;
lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, $4, 0x00F000F0, 0x54005400, 0xEA;
lop3.b32 $2, high, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $3, high, 0x00F000F0, 0x54005400, 0xEA;
}""")
"""Two words in operand 4 → their four planes, code + 1024 and code + 64 in turn: `word & mask | power`."""
FP8_ASSEMBLY = tl.constexpr("""{
.reg .b32 t, sign;
shl.b32 t, $2, 8;
and.b32 sign, t, 0x80008000;
shl.b32 t, $2, 7;
lop3.b32 $0, t, 0x3F803F80, sign, 0xEA;
and.b32 sign, $2, 0x80008000;
shr.b32 t, $2, 1;
lop3.b32 $1, t, 0x3F803F80, sign, 0xEA;
}""")
"""Two words in operand 2 → the values of their low and their high bytes / 256."""


def groups_of(format: KVFormat, head_dim: int) -> int:
    """Scales of a token, or what stands for other kinds."""
    if format.levels == "fp8":
        return FP8.value
    return PER_CHANNEL.value if format.per == "channel" else head_dim // (format.group_size or head_dim)


@triton.constexpr_function
def num_words(head_dim: int, bits: int) -> int:
    """Of a token."""
    return head_dim * bits // 16


@triton.constexpr_function
def piece_width(head_dim: int, bits: int, groups: int) -> int:
    """Words of a piece, those past the end included. More than 16 rows of queries where there are two warps: these
    share words only if products are wider than high, and else do the same."""
    if groups > 1:
        return 16 if head_dim <= 128 else 32
    return max(16, triton.next_power_of_2(num_words(head_dim, bits)))


@triton.constexpr_function
def num_runs(head_dim: int, bits: int, groups: int) -> int:
    """Of words, each unpacked by itself."""
    return triton.cdiv(num_words(head_dim, bits), piece_width(head_dim, bits, groups))


@triton.constexpr_function
def num_pieces(head_dim: int, bits: int, groups: int) -> int:
    """Those of the first run come first."""
    return num_runs(head_dim, bits, groups) * 16 // bits


@triton.constexpr_function
def words_left(piece: int, head_dim: int, bits: int, groups: int) -> int:
    """Words of a piece and of what comes after its run; of a piece that is too wide, fewer than it has."""
    return num_words(head_dim, bits) - piece // (16 // bits) * piece_width(head_dim, bits, groups)


@triton.constexpr_function
def piece_channel(piece: int, head_dim: int, bits: int, groups: int) -> int:
    """The channel of the first word of a piece; that of the next is 2 further."""
    run, byte, plane = piece // (16 // bits), piece // (8 // bits) % 2, piece % (8 // bits)
    return plane * (head_dim * bits // 8) + 2 * piece_width(head_dim, bits, groups) * run + byte


@triton.constexpr_function
def num_scales(head_dim: int, bits: int, groups: int) -> int:
    """Of what `load_scales` returns of more than one scale of a token: how many are before the minima."""
    return num_pieces(head_dim, bits, groups) // (1 if groups == 0 else 2)


@triton.constexpr_function
def scale_place(piece: int, bits: int, groups: int) -> int:
    """Which of them is of a piece. Both bytes of a word are of the same groups."""
    return piece if groups == 0 else piece // (16 // bits) * (8 // bits) + piece % (8 // bits)


@triton.constexpr_function
def group_words(head_dim: int, bits: int) -> int:
    """Consecutive words that are sure to be of one group of 32 channels in each plane."""
    channels = head_dim * bits // 8
    return min(channels & -channels, 32) // 2


@triton.constexpr_function
def piece_offset(piece: int, dtype: tl.dtype, bits: int, groups: int) -> int:
    """What `unpack` adds to the codes of a piece."""
    if bits == 8:
        return 0 if groups == -1 else 1152
    if bits == 4:
        return 1024 if groups == 1 and piece % 2 == 0 else code_offset(dtype)
    return two_bit_offset(piece % 8, dtype)


@triton.constexpr_function
def piece_factor(groups: int) -> int:
    """What has yet to multiply what `unpack` returns."""
    return 256 if groups == -1 else 1


@triton.jit
def unpack(words, DTYPE: tl.constexpr, ASM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the 16 / BITS pieces they have, in `DTYPE`. `ASM`: for NVIDIA."""
    if BITS == 4 and GROUPS != 1:
        pieces = unpack_planes(words, DTYPE, ASM)
    elif BITS == 2:
        pieces = unpack_two_bit_planes(words, DTYPE, ASM)
    elif BITS == 4 and ASM:
        pieces = tl.inline_asm_elementwise(
            FOUR_BIT_ASSEMBLY, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
    elif ASM:
        pieces = tl.inline_asm_elementwise(
            FP8_ASSEMBLY if GROUPS == FP8 else BYTE_ASSEMBLY,
            "=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32)
        if BITS == 4:
            pieces = (
                ((wide & 15) + 1024).to(DTYPE), (((wide >> 4) & 15) + 64).to(DTYPE),
                (((wide >> 8) & 15) + 1024).to(DTYPE), (((wide >> 12) & 15) + 64).to(DTYPE),
            )  # fmt: skip
        elif GROUPS == FP8:
            pieces = (_fp8(wide).to(DTYPE), _fp8(wide >> 8).to(DTYPE))
        else:
            pieces = ((((wide << 24) >> 24) + 1152).to(DTYPE), ((wide >> 8) + 1152).to(DTYPE))
    return pieces


@triton.jit
def _fp8(byte):  # type: ignore[no-untyped-def]
    """The value / 256 of the lowest byte: its bits where float32 has them, and 2¹¹² for the exponent."""
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0


@triton.jit
def load_pieces(  # type: ignore[no-untyped-def]
    codes, row, DTYPE: tl.constexpr, ASM: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The pieces of STEP consecutive tokens. row: of the first, among the tokens of all heads, int64."""
    WORDS: tl.constexpr = num_words(D, BITS)
    WIDTH: tl.constexpr = piece_width(D, BITS, GROUPS)
    token = tl.arange(0, STEP)[:, None]
    pieces = ()
    for run in tl.static_range(num_runs(D, BITS, GROUPS)):
        word = run * WIDTH + tl.arange(0, WIDTH)[None, :]
        at = codes.to(tl.pointer_type(tl.int16)) + row * WORDS + (token * WORDS + word)
        if WORDS % WIDTH == 0:
            words = tl.load(at, eviction_policy="evict_first")
        else:
            words = tl.load(at, mask=(token >= 0) & (word < WORDS), other=0)
        pieces += unpack(words, DTYPE, ASM, BITS, GROUPS)
    return pieces


@triton.jit
def load_scales(  # type: ignore[no-untyped-def]
    scale, minimum, row, stored, ASM: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """Scales of tokens as above, then their minima if they have any; nothing of FP8. Of one group [tokens]; of more,
    see `_load_groups`; per channel, for each piece [words]. stored [tokens]: whether there are such; others have 0."""
    loaded = ()
    if GROUPS == PER_CHANNEL:
        word = tl.arange(0, piece_width(D, BITS, GROUPS))
        inside = word < num_words(D, BITS)
        for piece in tl.static_range(num_pieces(D, BITS, GROUPS)):
            at = row // 32 * D + (piece_channel(piece, D, BITS, GROUPS) + 2 * word)
            loaded += (_fixed(tl.load(scale + at, mask=inside, other=0), ASM),)  # type: ignore[assignment]
        for piece in tl.static_range(num_pieces(D, BITS, GROUPS)):
            at = row // 32 * D + (piece_channel(piece, D, BITS, GROUPS) + 2 * word)
            loaded += (_fixed(tl.load(minimum + at, mask=inside, other=0), ASM),)  # type: ignore[assignment]
    elif GROUPS == 1:
        token = tl.arange(0, stored.shape[0])
        loaded += (_fixed(tl.load(scale + row + token, mask=stored, other=0), ASM),)  # type: ignore[assignment]
        if BITS < 8:
            loaded += (_fixed(tl.load(minimum + row + token, mask=stored, other=0), ASM),)  # type: ignore[assignment]
    elif GROUPS > 1:
        loaded += _load_groups(scale, row, stored, D, BITS, GROUPS)
        loaded += _load_groups(minimum, row, stored, D, BITS, GROUPS)
    return loaded


@triton.jit
def _load_groups(numbers, row, stored, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of groups: for each run of words and each plane [tokens, groups of 32 channels that it may have]."""
    SHARED: tl.constexpr = group_words(D, BITS)
    part = tl.arange(0, piece_width(D, BITS, GROUPS) // SHARED)[None, :]
    at = (row + tl.arange(0, stored.shape[0])[:, None]) * GROUPS
    loaded = ()
    for first in tl.static_range(0, num_pieces(D, BITS, GROUPS), 16 // BITS):
        for piece in tl.static_range(first, first + 8 // BITS):
            inside = stored[:, None] & (part * SHARED < words_left(piece, D, BITS, GROUPS))
            group = (piece_channel(piece, D, BITS, GROUPS) + part * (2 * SHARED)) // 32
            loaded += (tl.load(numbers + at + group, mask=inside, other=0),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _fixed(numbers, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same numbers. When there are fewer than threads, the compiler has each thread load all that it needs, one by
    one, unless they went through what must not be done twice."""
    if ASM:
        PACK: tl.constexpr = 32 // numbers.dtype.primitive_bitwidth
        numbers = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [numbers], dtype=numbers.dtype, is_pure=False, pack=PACK
        )
    return numbers


@triton.jit
def _spread(numbers, shape: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers [tokens, runs] of runs of words → of each word, [tokens, words]."""
    RUNS: tl.constexpr = numbers.shape[1]
    return tl.broadcast_to(numbers[:, :, None], (shape[0], RUNS, shape[1] // RUNS)).reshape(shape)


@triton.jit
def dequantize(  # type: ignore[no-untyped-def]
    pieces, scales, piece: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """The values of one piece [tokens, words], in `DTYPE`; of FP8 yet to be multiplied. scales: of `load_scales`, which
    must be more than one of a token."""
    value = pieces[piece]
    if GROUPS != FP8:
        scale = scales[scale_place(piece, BITS, GROUPS)].to(tl.float32)
        minimum = scales[num_scales(D, BITS, GROUPS) + scale_place(piece, BITS, GROUPS)].to(tl.float32)
        minimum -= scale * piece_offset(piece, DTYPE, BITS, GROUPS)
        if GROUPS == PER_CHANNEL:
            scale = tl.broadcast_to(scale.to(DTYPE)[None, :], value.shape)
            minimum = tl.broadcast_to(minimum.to(DTYPE)[None, :], value.shape)
        else:
            scale = _spread(scale.to(DTYPE), value.shape)
            minimum = _spread(minimum.to(DTYPE), value.shape)
        value = tl.fma(value, scale, minimum)
    return value


@triton.jit
def row_of(step, block_table, batch, head, kv_heads, tokens, STEP: tl.constexpr, PAGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the tokens of a step begin, among those of all heads of the cache, int64. head: of all sequences' heads.
    tokens: room for a sequence."""
    first = step * STEP
    if PAGED > 0:
        block = tl.load(block_table + batch.to(tl.int64) * (tokens // PAGED) + first // PAGED)
        row = (block.to(tl.int64) * kv_heads + head % kv_heads) * PAGED + first % PAGED
    else:
        row = head.to(tl.int64) * tokens + first
    return row
