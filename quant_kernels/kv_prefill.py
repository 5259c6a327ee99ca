"""Attention of many new tokens over a quantized KV cache, which is read as it is stored.

Everything is as in `kv_decode`, arguments and result, but that there may be any number of queries, and that it is
made for more than a few. Those of a sequence are its newest tokens, in order, a prompt or a part of one, and their
keys and values are in the cache already.

A program has 64 rows, which are consecutive queries of all heads that share keys and values, and goes through what
these see, 64 tokens at a time, or 32 where scales per channel, the size of blocks or registers ask for it. Tiles that
all rows see need no mask, and come first; then those at both edges, of which there are few; then slots. What no row
sees is not read. Programs with most to do start first. Nothing is split, so there is one order of sums.

Codes are unpacked and multiplied as `kv_dot` has it, but by more warps. Slots are loaded as pairs of channels, so that
they fall into the same pieces of values.
"""

from __future__ import annotations

from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant
from quant_kernels.kv_dot import LOWEST, attend, capped, load_queries, no_values, piece_values, softmax
from quant_kernels.kv_planes import KVFormat, Planes
from quant_kernels.kv_reference import check_cache, kv_decode_reference
from quant_kernels.kv_words import (
    FP8,
    groups_of,
    load_scales,
    num_pieces,
    piece_channel,
    piece_factor,
    piece_width,
    row_of,
    words_left,
)
from quant_kernels.tuning import gpu_of


@triton.jit
def _attend_to_tiles(  # type: ignore[no-untyped-def]
    most, total, sums, q, oldest, newest, count, left, begin, rest, k_codes, k_scale, k_minimum, v_codes, v_scale,
    v_minimum, block_table, length, factor, soft_cap, num_sinks, batch, head, kv_heads, tokens,
    DTYPE: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUPS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """(most, total, sums) with `count` tiles of quantized tokens, one at least. Tile i is begin + i where i < left,
    else rest + i. Unless `MASKED`, all rows see them."""
    token = tl.arange(0, STEP)
    tile = tl.where(left > 0, begin, rest)
    row = row_of(tile, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
    next_k_scales = load_scales(k_scale, k_minimum, row, token < length - tile * STEP, ASM, D, K_BITS, K_GROUPS)
    next_v_scales = load_scales(v_scale, v_minimum, row, token < length - tile * STEP, ASM, D, V_BITS, V_GROUPS)
    for i in range(count):
        tile = tl.where(i < left, begin, rest) + i
        row = row_of(tile, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
        k_scales = next_k_scales
        v_scales = next_v_scales
        # They do not come by way of the pipeline, and each tile would wait for memory.
        following = tl.minimum(i + 1, count - 1)
        next_tile = tl.where(following < left, begin, rest) + following
        next_row = row_of(next_tile, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
        stored = token < length - next_tile * STEP
        next_k_scales = load_scales(k_scale, k_minimum, next_row, stored, ASM, D, K_BITS, K_GROUPS)
        next_v_scales = load_scales(v_scale, v_minimum, next_row, stored, ASM, D, V_BITS, V_GROUPS)
        # Of tokens: also of those that are not stored, where the newest are in slots.
        position = num_sinks + tile * STEP + token
        visible = (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
        visible = visible & (token < length - tile * STEP)[None, :]
        most, total, sums = attend(
            most, total, sums, q, k_codes, k_scales, v_codes, v_scales, row, tl.zeros((STEP,), tl.float32), visible,
            factor, soft_cap,
            DTYPE, ASM, D, K_BITS, K_GROUPS, V_BITS, V_GROUPS, CAPPED, MASKED,
        )  # fmt: skip
    return most, total, sums


@triton.jit
def _load_pairs(  # type: ignore[no-untyped-def]
    slots, slot, there, DTYPE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """Slots in the pieces of codes of so many bits, each [slots, words]."""
    word = tl.arange(0, piece_width(D, BITS, GROUPS))[None, :]
    TYPE: tl.constexpr = slots.dtype.element_ty
    pieces = ()
    for first in tl.static_range(0, num_pieces(D, BITS, GROUPS), 16 // BITS):
        low = ()
        high = ()
        for piece in tl.static_range(first, first + 8 // BITS):
            mask = there[:, None] & (word < words_left(piece, D, BITS, GROUPS))
            at = slot[:, None] * D + (piece_channel(piece, D, BITS, GROUPS) + 2 * word)
            if TYPE.primitive_bitwidth == 16:
                pairs = tl.load(slots.to(tl.pointer_type(tl.int32)) + at // 2, mask=mask, other=0)
                low += (pairs.to(tl.int16).to(TYPE, bitcast=True).to(DTYPE),)  # type: ignore[assignment]
                high += ((pairs >> 16).to(tl.int16).to(TYPE, bitcast=True).to(DTYPE),)  # type: ignore[assignment]
            else:
                low += (tl.load(slots + at, mask=mask, other=0),)  # type: ignore[assignment]
                high += (tl.load(slots + at + 1, mask=mask, other=0),)  # type: ignore[assignment]
        pieces += low + high
    return pieces


@triton.jit
def _kv_prefill_kernel(  # type: ignore[no-untyped-def]
    q, k_codes, k_scale, k_minimum, v_codes, v_scale, v_minimum, lengths, k_recent, v_recent, recent_lengths,
    block_table, first, y, softmax_scale, soft_cap, sliding_window, num_sinks, kv_heads, heads_per_kv, queries, tokens,
    slots,
    D: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    RECENT: tl.constexpr, PAGED: tl.constexpr, FIRST: tl.constexpr, SLIDING: tl.constexpr, CAPPED: tl.constexpr,
    ASM: tl.constexpr, INTERP: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SLOT_STEP: tl.constexpr,
):  # fmt: skip
    """softmax_scale, soft_cap, tokens and constants are those of `kv_decode`."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else q.dtype.element_ty
    HALF: tl.constexpr = tl.float32 if INTERP else tl.float16
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    head = tl.program_id(0)
    batch = head // kv_heads
    rows = heads_per_kv * queries
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    place = (row % heads_per_kv * queries + row // heads_per_kv) * D
    q += head.to(tl.int64) * rows * D
    y += head.to(tl.int64) * rows * D
    length = tl.load(lengths + batch)
    recent = tl.load(recent_lengths + batch) if RECENT else 0
    padding = tl.load(first + batch) if FIRST else 0
    # Positions that rows see.
    newest = length + recent - queries + row // heads_per_kv
    least_newest = length + recent - queries + first_row // heads_per_kv
    most_newest = length + recent - queries + (tl.minimum(first_row + ROWS, rows) - 1) // heads_per_kv
    oldest = tl.zeros_like(newest) + padding
    least_oldest = padding
    most_oldest = padding
    if SLIDING:
        oldest = tl.maximum(newest - (sliding_window - 1), padding)
        least_oldest = tl.maximum(least_newest - (sliding_window - 1), padding)
        most_oldest = tl.maximum(most_newest - (sliding_window - 1), padding)

    # Tiles of quantized tokens that some row sees, and among these, that all rows see.
    begin = tl.maximum(least_oldest - num_sinks, 0) // STEP
    end = tl.cdiv(tl.maximum(tl.minimum(most_newest + 1 - num_sinks, length), 0), STEP)
    whole_begin = tl.maximum(tl.cdiv(tl.maximum(most_oldest - num_sinks, 0), STEP), begin)
    whole_end = tl.maximum(tl.minimum(least_newest + 1 - num_sinks, length), 0) // STEP
    whole_begin = tl.minimum(whole_begin, end)
    whole_end = tl.maximum(whole_end, whole_begin)
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = no_values(ROWS, D, V_BITS, V_GROUPS)
    if begin < end:
        pieces = load_queries(q + place, inside, HALF, D, K_BITS, K_GROUPS)
        factor = softmax_scale * piece_factor(K_GROUPS)
        if K_GROUPS == FP8:
            factor *= tl.load(k_scale + head % kv_heads).to(tl.float32)
        if whole_begin < whole_end:
            most, total, sums = _attend_to_tiles(
                most, total, sums, pieces, oldest, newest, whole_end - whole_begin, 0, 0, whole_begin, k_codes, k_scale,
                k_minimum, v_codes, v_scale, v_minimum, block_table, length, factor, soft_cap, num_sinks, batch, head,
                kv_heads, tokens, HALF, ASM, D, K_BITS, K_GROUPS, V_BITS, V_GROUPS, CAPPED, False, PAGED, STEP,
            )  # fmt: skip
        left = whole_begin - begin
        edges = end - begin - (whole_end - whole_begin)
        if edges > 0:
            most, total, sums = _attend_to_tiles(
                most, total, sums, pieces, oldest, newest, edges, left, begin, whole_end - left, k_codes, k_scale,
                k_minimum, v_codes, v_scale, v_minimum, block_table, length, factor, soft_cap, num_sinks, batch, head,
                kv_heads, tokens, HALF, ASM, D, K_BITS, K_GROUPS, V_BITS, V_GROUPS, CAPPED, True, PAGED, STEP,
            )  # fmt: skip
    values = ()
    for piece in tl.static_range(num_pieces(D, V_BITS, V_GROUPS)):
        value = piece_values(sums, piece, HALF, D, V_BITS, V_GROUPS)
        if V_GROUPS == FP8:
            value *= tl.load(v_scale + head % kv_heads).to(tl.float32) * piece_factor(V_GROUPS)
        values += (value,)  # type: ignore[assignment]

    if RECENT:
        k_recent += head.to(tl.int64) * slots * D
        v_recent += head.to(tl.int64) * slots * D
        channel = tl.arange(0, WIDTH)[None, :]
        exact = tl.load(q + (place[:, None] + channel), mask=inside[:, None] & (channel < D), other=0).to(DTYPE)
        start = tl.where(least_oldest < num_sinks, 0, tl.maximum(least_oldest - length, 0)) // SLOT_STEP * SLOT_STEP
        stop = tl.maximum(most_newest + 1 - length, tl.minimum(most_newest + 1, num_sinks))
        stop = tl.minimum(stop, recent)
        for slot_start in range(start, stop, SLOT_STEP):
            slot = slot_start + tl.arange(0, SLOT_STEP)
            there = slot < stop
            there_at = slot[:, None] * D + channel
            keys = tl.load(k_recent + there_at, mask=there[:, None] & (channel < D), other=0).to(DTYPE)
            logits = tl.dot(exact, keys.T)
            if CAPPED:
                logits = capped(logits, softmax_scale, soft_cap)
            position = tl.where(slot < num_sinks, slot, slot + length)
            visible = (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
            logits = tl.where(visible & there[None, :], logits, float("-inf"))
            weights, kept, most, total = softmax(logits, most, total, 1.0 if CAPPED else softmax_scale)
            added = _load_pairs(v_recent, slot, there, DTYPE, D, V_BITS, V_GROUPS)
            new_values = ()
            for piece in tl.static_range(num_pieces(D, V_BITS, V_GROUPS)):
                new_values += (tl.dot(weights.to(DTYPE), added[piece], values[piece] * kept[:, None]),)  # type: ignore[assignment]
            values = new_values

    # The largest logit alone has a weight of 1, if there is one.
    inverse = 1 / tl.maximum(total, 1.0)
    word = tl.arange(0, piece_width(D, V_BITS, V_GROUPS))[None, :]
    for piece in tl.static_range(num_pieces(D, V_BITS, V_GROUPS)):
        at = place[:, None] + (piece_channel(piece, D, V_BITS, V_GROUPS) + 2 * word)
        mask = inside[:, None] & (word < words_left(piece, D, V_BITS, V_GROUPS))
        tl.store(y + at, (values[piece] * inverse[:, None]).to(y.dtype.element_ty), mask=mask)


def kv_prefill(
    q: Tensor, k_codes: Tensor, k_scale: Tensor, k_minimum: Tensor | None, v_codes: Tensor, v_scale: Tensor,
    v_minimum: Tensor | None, lengths: Tensor, softmax_scale: float, k_recent: Tensor | None = None,
    v_recent: Tensor | None = None, recent_lengths: Tensor | None = None, block_table: Tensor | None = None,
    first: Tensor | None = None, num_sinks: int = 0, sliding_window: int | None = None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """[batch, heads, queries, D]. Raises ValueError where an argument is not as described above."""
    keys, values = Planes(k_codes, k_scale, k_minimum), Planes(v_codes, v_scale, v_minimum)
    k_format, v_format = check_cache(q, keys, values, lengths, k_recent, v_recent, recent_lengths, block_table, first)
    expect("q", q, FLOATS if library.INTERPRETED else FLOATS[:2], q.shape, q.device)
    batch, heads, queries, head_dim = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    kv_heads, block_tokens = k_codes.shape[1:3]
    slots = 0 if k_recent is None else k_recent.shape[2]
    rows = queries * heads // kv_heads
    if rows * head_dim >= 1 << 31:
        raise ValueError(f"q has shape {[*q.shape]}: 2³¹ numbers or more for each of {kv_heads} heads of keys. Give "
                         "fewer queries at a time")  # fmt: skip
    hopper, _ = gpu_of(q.device)
    blocks = _blocks(head_dim, block_tokens, k_format, hopper)
    scale = softmax_scale * log2(e) * (1 if soft_cap is None else 2 / soft_cap)
    _kv_prefill_kernel[batch * kv_heads, triton.cdiv(rows, blocks["ROWS"])](
        q, *keys, *values, lengths, k_recent, v_recent, recent_lengths, block_table, first, y, scale,
        (soft_cap or 0.0) * log2(e), sliding_window or 0, num_sinks, kv_heads, heads // kv_heads, queries,
        block_tokens if block_table is None else block_table.shape[1] * block_tokens, slots,
        D=head_dim, K_BITS=k_format.bits, K_GROUPS=groups_of(k_format, head_dim), V_BITS=v_format.bits,
        V_GROUPS=groups_of(v_format, head_dim), RECENT=slots > 0, PAGED=0 if block_table is None else block_tokens,
        FIRST=first is not None, SLIDING=sliding_window is not None, CAPPED=soft_cap is not None,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED, **blocks,
    )  # fmt: skip
    return y


def _blocks(head_dim: int, block_tokens: int, k_format: KVFormat, hopper: bool) -> dict[str, int]:
    """How a kernel is launched. Tiles of 64 tokens leave too few registers but on Hopper, whose products take one
    operand from shared memory."""
    step = 64 if hopper and k_format.per == "token" and block_tokens % 64 == 0 else 32
    return {"ROWS": 64, "STEP": step, "SLOT_STEP": 32, "num_warps": 4 if head_dim <= 128 else 8, "num_stages": 2}


library.register(
    "kv_prefill(Tensor q, Tensor k_codes, Tensor k_scale, Tensor? k_minimum, Tensor v_codes, Tensor v_scale, "
    "Tensor? v_minimum, Tensor lengths, float softmax_scale, Tensor? k_recent=None, Tensor? v_recent=None, "
    "Tensor? recent_lengths=None, Tensor? block_table=None, Tensor? first=None, int num_sinks=0, "
    "int? sliding_window=None, float? soft_cap=None) -> Tensor",
    launch=kv_prefill,
    reference=kv_decode_reference,
    fake=lambda q, *_, **__: torch.empty_like(q),
)


def gates() -> tuple[Gate, ...]:
    """In blocks, with a window that slides; slots where values have few bits."""
    made = []
    for capability in (80, 90):
        for name, keys, values in (
            ("kv8", KVFormat(8), KVFormat(8)),
            ("kv4", KVFormat(4, "channel"), KVFormat(4, group_size=32)),
        ):
            blocks: dict[str, Any] = _blocks(128, 64, keys, capability == 90)
            options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
            constants = {
                "D": 128, "K_BITS": keys.bits, "K_GROUPS": groups_of(keys, 128), "V_BITS": values.bits,
                "V_GROUPS": groups_of(values, 128), "RECENT": values.bits < 8, "PAGED": 64, "FIRST": False,
                "SLIDING": True, "CAPPED": False, "ASM": True, "INTERP": False, **blocks,
            }  # fmt: skip
            floats = ("q", "k_scale", "k_minimum", "v_scale", "v_minimum", "k_recent", "v_recent", "y")
            pointers = dict.fromkeys(floats, "*bf16") | dict.fromkeys(("k_codes", "v_codes"), "*u8")
            pointers |= dict.fromkeys(("lengths", "recent_lengths", "block_table", "first"), "*i32")
            numbers = ("sliding_window", "num_sinks", "kv_heads", "heads_per_kv", "queries", "tokens", "slots")
            signature = pointers | {"softmax_scale": "fp32", "soft_cap": "fp32"} | dict.fromkeys(numbers, "i32")
            variant = Variant(_kv_prefill_kernel, signature, constants, (*pointers, "tokens"), **options)
            opcode = "HGMMA" if capability == 90 else "HMMA"
            representative = (capability, name) in ((80, "kv8"), (90, "kv4"))
            made.append(Gate(f"kv_prefill {name} 128", variant, capability, opcode, representative=representative))
    return tuple(made)
