"""The inner loop of kernels that multiply 16-bit activations with packed weights: a block of y = x · weightᵀ.

Weights are words of `quant_kernels.packed_codes`. In one round a tile of words is unpacked to planes of 32 inputs,
floats code + offset, and each plane is multiplied with the activations it belongs to.

Two forms. For few tokens, where there are fewer products than weights, products with code + offset are summed over a
group, shifted and scaled in float32: nothing is done per weight but to unpack it. The shift, (offset + zero) times the
sum of the group's activations, is itself a product, with a few equal columns. Products start from it, so where zero is
the middle it takes no arithmetic of its own. For many tokens (`SWAP`) weights are shifted and scaled before they are
multiplied, and are the left operand, which Hopper takes from registers. offset + zero is taken off before scaling,
exactly if whole, so that a weight is rounded once. One multiply-add would have (offset + zero) · scale rounded to 8
bits, by up to 0.3 steps the same way for a whole group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.packed_codes import code_addresses, load_planes, plane_offset, tile_columns


@triton.jit
def dequantize_plane(plane, s, z, DTYPE: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """plane, code + OFFSET [outputs, 32] → code - zero, times the scale if `SCALE`. s, z: float32 [outputs]. Without
    `ZERO` the zero is part of OFFSET."""
    if ZERO:
        whole = tl.floor(z + 0.5)
        shifted = plane - (whole + OFFSET).to(DTYPE)[:, None]
        if SCALE:
            weight = tl.fma(shifted, s.to(DTYPE)[:, None], ((whole - z) * s).to(DTYPE)[:, None])
        else:
            weight = shifted + (whole - z).to(DTYPE)[:, None]
    else:
        weight = plane - OFFSET
        if SCALE:
            weight = weight * s.to(DTYPE)[:, None]
    return weight


@triton.jit
def packed_dot(  # type: ignore[no-untyped-def]
    x_at, words, outputs, scale, zero, first, last, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N], or transposed if `SWAP`: float32 sums over the tiles of words from `first` up to `last`, of
    which there must be one at least.

    x_at: addresses [BLOCK_M, 32] of the activations of the first 32 inputs. words, scale, zero: addresses of the whole
    weight's. outputs [BLOCK_N]: which of its N. zero is not read unless `ZERO`. GROUP: inputs that share a scale, 0:
    all. EVEN_K: K is a multiple of the inputs of a tile. DTYPE: of what is multiplied.
    """
    TILE: tl.constexpr = tile_columns(BITS)
    PLANES: tl.constexpr = TILE // 32
    MIDDLE: tl.constexpr = 0 if ZERO else 1 << (BITS - 1)
    SHARING: tl.constexpr = PLANES if GROUP % TILE == 0 else (4 if GROUP % 128 == 0 else GROUP // 32)  # planes, a scale
    # Whether the tiles of a group, or the groups of a tile, are whole.
    NESTED: tl.constexpr = EVEN_K and GROUP > 0 and (GROUP % TILE == 0 or TILE % GROUP == 0)
    COLUMNS: tl.constexpr = BLOCK_N // 4  # of a shift: eight, the fewest, for each of the warps of `BLOCK_N`
    # Whether products start from their shift; else it is added to them, as one multiply-add.
    START: tl.constexpr = not (ZERO and BITS == 4)
    # Could the loop be skipped, its sums would have a second origin, and ptxas would wait for each wide instruction
    # before it issues the next.
    tl.assume(first < last)
    column = tl.arange(0, 32)[None, :]
    words_at = code_addresses(words, outputs, K, BITS)
    scale += outputs
    if ZERO:
        zero += outputs
    s = tl.load(scale).to(tl.float32)
    z = tl.load(zero).to(tl.float32) if ZERO else s
    sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    shifts = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        planes = load_planes(words_at, step, DTYPE, ASM, BITS)
        if NESTED:
            tile_group = step // (GROUP // TILE) if GROUP % TILE == 0 else step * (TILE // GROUP)
            scale_row = tl.cast(tile_group, tl.int64) * N
        for part in tl.static_range(0, PLANES, SHARING):
            if GROUP > 0:
                if NESTED:
                    row = scale_row + (part * 32 // GROUP) * N
                else:
                    row = tl.cast(tl.minimum((step * TILE + part * 32) // GROUP, K // GROUP - 1), tl.int64) * N
                s = tl.load(scale + row).to(tl.float32)
                if ZERO:
                    z = tl.load(zero + row).to(tl.float32)
                sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
                shifts = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
            activations = ()
            for plane in tl.static_range(part, part + SHARING):
                start = step * TILE + plane * 32
                if EVEN_K:
                    a = tl.load(x_at + start).to(DTYPE)
                else:
                    a = tl.load(x_at + start, mask=column < K - start, other=0).to(DTYPE)
                if SWAP:
                    weight = dequantize_plane(
                        planes[plane], s, z, DTYPE, plane_offset(plane, DTYPE, BITS) + MIDDLE, GROUP > 0, ZERO
                    )
                    total = tl.dot(weight, a.T, total)
                else:
                    activations += (a,)  # type: ignore[assignment]
                    if ZERO:
                        sums = tl.dot(a, tl.full((32, COLUMNS), -1.0, DTYPE), sums)
                    if BITS < 4 or not ZERO:
                        offset = plane_offset(plane, DTYPE, BITS) + MIDDLE
                        shifts = tl.dot(a, tl.full((32, COLUMNS), -offset, DTYPE), shifts)
            if not SWAP:
                if GROUP > 0 and START:
                    products = _shift(sums, shifts, z, DTYPE, BITS, ZERO, BLOCK_N)
                elif GROUP > 0:
                    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                # After the shifts: the last dot decides for all how warps lie, which is to be along the outputs.
                for plane in tl.static_range(part, part + SHARING):
                    products = tl.dot(activations[plane - part], planes[plane].T, products)
                if GROUP > 0 and not START:
                    products += _shift(sums, shifts, z, DTYPE, BITS, ZERO, BLOCK_N)
                if GROUP > 0:
                    total += s[None, :] * products
    if GROUP == 0:
        if SWAP:
            total *= s[:, None]
        else:
            total = s[None, :] * (products + _shift(sums, shifts, z, DTYPE, BITS, ZERO, BLOCK_N))
    return total


@triton.jit
def _shift(  # type: ignore[no-untyped-def]
    sums, shifts, z, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What products with code + offset of a group lack to be those with code - zero: [tokens, outputs]."""
    if not ZERO:
        shift = _spread(shifts, BLOCK_N)
    elif BITS == 4:
        shift = (z + plane_offset(0, DTYPE, BITS))[None, :] * _spread(sums, BLOCK_N)
    else:
        shift = z[None, :] * _spread(sums, BLOCK_N) + _spread(shifts, BLOCK_N)
    return shift


@triton.jit
def _spread(sums, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Equal columns → as many as `BLOCK_N`, of which each thread already has what it needs."""
    ROWS: tl.constexpr = sums.shape[0]
    COLUMNS: tl.constexpr = sums.shape[1]
    return tl.broadcast_to(sums[:, None, :], (ROWS, BLOCK_N // COLUMNS, COLUMNS)).reshape(ROWS, BLOCK_N)
