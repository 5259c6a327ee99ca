"""The inner step of kernels that attend to quantized keys and values: rows of queries, and some consecutive tokens.

Where a token has one scale, products are taken with the pieces of `kv_words`, codes plus an offset, and put right by
sums: logits are those times a scale, plus the sum of the query times a minimum; weights are multiplied with scales of
values before, and with minima apart. Nothing is done per code but to unpack it. What takes off the offsets sums what
was rounded, as it was rounded. Codes of values count from the middle of their range, with minima half a range higher,
so that what is rounded is no larger than the value. Where there are more scales, codes become values first.

What is multiplied is float16 even if queries are bfloat16: it has the range, codes cost less to unpack, and weights
have three more bits. To keep products of weights and scales from being subnormal, they are over the largest scale so
far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels.kv_words import (
    dequantize,
    load_pieces,
    num_pieces,
    piece_channel,
    piece_offset,
    piece_width,
    words_left,
)

LOWEST = tl.constexpr(-1e30)
"""Where there is no largest logit yet. That of what is not seen is -∞, and must not be subtracted."""
LEAST = tl.constexpr(2.0**-100)
"""Of the largest scale, so that its inverse is finite."""


@triton.jit
def load_queries(  # type: ignore[no-untyped-def]
    q, inside, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """The pieces [rows, words] of queries, q: addresses [rows]. Then [rows]: their sum, and what takes the offsets of
    codes off products."""
    word = tl.arange(0, piece_width(D, BITS, GROUPS))
    total = tl.zeros((q.shape[0],), tl.float32)
    shift = tl.zeros((q.shape[0],), tl.float32)
    pieces = ()
    for piece in tl.static_range(num_pieces(D, BITS, GROUPS)):
        channel = piece_channel(piece, D, BITS, GROUPS) + 2 * word
        mask = inside[:, None] & (word < words_left(piece, D, BITS, GROUPS))[None, :]
        pieces += (tl.load(q[:, None] + channel[None, :], mask=mask, other=0).to(DTYPE),)  # type: ignore[assignment]
        part = tl.sum(pieces[piece].to(tl.float32), 1)
        total += part
        shift -= part * piece_offset(piece, DTYPE, BITS, GROUPS)
    pieces += (total, shift)  # type: ignore[assignment]
    return pieces


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    q, k, scales, bias, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """[rows, tokens]; bias [tokens] is added. q: of `load_queries`."""
    SHAPE: tl.constexpr = (q[0].shape[0], bias.shape[0])
    PIECES: tl.constexpr = num_pieces(D, BITS, GROUPS)
    if GROUPS == 1:
        products = tl.broadcast_to(q[PIECES + 1][:, None], SHAPE)
        for piece in tl.static_range(PIECES):
            products = tl.dot(q[piece], k[piece].T, products)
        rest = tl.broadcast_to(bias[None, :], SHAPE)
        if BITS < 8:
            rest = q[PIECES][:, None] * scales[1].to(tl.float32)[None, :] + rest
        logits = products * scales[0].to(tl.float32)[None, :] + rest
    else:
        logits = tl.broadcast_to(bias[None, :], SHAPE)
        for piece in tl.static_range(PIECES):
            logits = tl.dot(q[piece], dequantize(k, scales, piece, DTYPE, D, BITS, GROUPS).T, logits)
    return logits


@triton.jit
def softmax(logits, most, total, factor):  # type: ignore[no-untyped-def]
    """Weights of logits [rows, tokens] · factor in powers of 2, and what to keep of sums so far; then the largest logit
    and the sum of weights, with these."""
    new = tl.maximum(most, tl.max(logits, 1) * factor)
    kept = tl.exp2(most - new)
    weights = tl.exp2(logits * factor - new[:, None])
    return weights, kept, new, total * kept + tl.sum(weights, 1)


@triton.jit
def capped(logits, factor, soft_cap):  # type: ignore[no-untyped-def]
    """soft_cap · tanh(x), where logits · factor are 2x in powers of 2."""
    return soft_cap - 2 * soft_cap / (1 + tl.exp2(logits * factor))


@triton.jit
def no_values(ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of values: of products, for each piece [rows, words]; where tokens have one scale, of weights times scales
    in 8 equal columns, and of weights times minima [rows]; the largest scale so far, which the former are over."""
    sums = ()
    for _ in tl.static_range(num_pieces(D, BITS, GROUPS)):
        sums += (tl.zeros((ROWS, piece_width(D, BITS, GROUPS)), tl.float32),)  # type: ignore[assignment]
    if GROUPS == 1:
        sums += (tl.zeros((ROWS, 8), tl.float32), tl.zeros((ROWS,), tl.float32), LEAST)  # type: ignore[assignment]
    return sums


@triton.jit
def _add_values(  # type: ignore[no-untyped-def]
    sums, kept, weights, v, scales, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """sums · kept [rows] + those of weights [rows, tokens]."""
    PIECES: tl.constexpr = num_pieces(D, BITS, GROUPS)
    added = ()
    if GROUPS == 1:
        scale = scales[0].to(tl.float32)
        largest = tl.maximum(sums[PIECES + 2], tl.max(scale, 0))
        inverse = 1 / largest
        scaled = (weights * (scale * inverse)[None, :]).to(DTYPE)
        kept_products = (kept * (sums[PIECES + 2] * inverse))[:, None]
        # Before the others: the last product decides for all how warps lie, which is to be along channels.
        ones = tl.full((weights.shape[1], 8), 1.0, DTYPE)
        totals = tl.dot(scaled, ones, sums[PIECES] * kept_products)
        minima = sums[PIECES + 1]
        if BITS < 8:
            middle = scales[1].to(tl.float32) + scale * (1 << (BITS - 1))
            minima = minima * kept + tl.sum(weights * middle[None, :], 1)
        for piece in tl.static_range(PIECES):
            added += (tl.dot(scaled, v[piece], sums[piece] * kept_products),)  # type: ignore[assignment]
        added += (totals, minima, largest)  # type: ignore[assignment]
    else:
        rounded = weights.to(DTYPE)
        for piece in tl.static_range(PIECES):
            value = dequantize(v, scales, piece, DTYPE, D, BITS, GROUPS)
            added += (tl.dot(rounded, value, sums[piece] * kept[:, None]),)  # type: ignore[assignment]
    return added


@triton.jit
def piece_values(  # type: ignore[no-untyped-def]
    sums, piece: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """What sums are of a piece: [rows, words]; of FP8 yet to be multiplied."""
    PIECES: tl.constexpr = num_pieces(D, BITS, GROUPS)
    result = sums[piece]
    if GROUPS == 1:
        offset = piece_offset(piece, DTYPE, BITS, GROUPS) + (0 if BITS == 8 else 1 << (BITS - 1))
        result -= (tl.max(sums[PIECES], 1) * offset)[:, None]
        result = result * sums[PIECES + 2] + sums[PIECES + 1][:, None]
    return result


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    most, total, sums, q, k_codes, k_scales, v_codes, v_scales, row, bias, visible, factor, soft_cap,
    DTYPE: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUPS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step: (most, total, sums) with the tokens from `row` on. Scales: of `kv_words.load_scales`. bias [tokens]: 0,
    or -∞ for tokens that no row sees; visible [rows, tokens]: which are seen, if it is `MASKED`."""
    STEP: tl.constexpr = bias.shape[0]
    k = load_pieces(k_codes, row, DTYPE, ASM, STEP, D, K_BITS, K_GROUPS)
    logits = _logits(q, k, k_scales, bias, DTYPE, D, K_BITS, K_GROUPS)
    if CAPPED:
        logits = capped(logits, factor, soft_cap) + bias[None, :]
        factor = 1.0
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    weights, kept, most, total = softmax(logits, most, total, factor)
    v = load_pieces(v_codes, row, DTYPE, ASM, STEP, D, V_BITS, V_GROUPS)
    return most, total, _add_values(sums, kept, weights, v, v_scales, DTYPE, D, V_BITS, V_GROUPS)


@triton.jit
def attend_to_slots(  # type: ignore[no-untyped-def]
    q, inside, k, v, start, end, length, num_sinks, oldest, newest, factor, soft_cap,
    DTYPE: tl.constexpr, D: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(most, total, values [rows, channels]) of slots from `start` to `end`, in full precision. q: addresses [rows]; k,
    v: of the head's first slot. oldest, newest: positions that rows see; `num_sinks` slots are before `length` others.
    """
    ROWS: tl.constexpr = q.shape[0]
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    channel = tl.arange(0, WIDTH)[None, :]
    queries = tl.load(q[:, None] + channel, mask=inside[:, None] & (channel < D), other=0).to(DTYPE)
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, WIDTH), tl.float32)
    while start < end:  # A loop that is pipelined would take more shared memory than that of quantized tokens.
        slot = start + tl.arange(0, STEP)
        there = (slot < end)[:, None] & (channel < D)
        keys = tl.load(k + slot[:, None] * D + channel, mask=there, other=0).to(DTYPE)
        logits = tl.dot(queries, keys.T)
        if CAPPED:
            logits = capped(logits, factor, soft_cap)
        position = tl.where(slot < num_sinks, slot, slot + length)
        visible = (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
        logits = tl.where(visible & (slot < end)[None, :], logits, float("-inf"))
        weights, kept, most, total = softmax(logits, most, total, 1.0 if CAPPED else factor)
        added = tl.load(v + slot[:, None] * D + channel, mask=there, other=0).to(DTYPE)
        values = tl.dot(weights.to(DTYPE), added, values * kept[:, None])
        start += STEP
    return most, total, values
