"""Attention of a few new tokens over a quantized KV cache, which is read as it is stored.

    y[b, h, i] = Σ p[t] · v[t] / Σ p[t],  p[t] = exp(softmax_scale · q[b, h, i] · k[t]), over the tokens t that i sees

q: float16 or bfloat16 [batch, heads, queries, D], up to 65504; float32 too in Triton's interpreter. heads is a multiple
of kv_heads, and as many consecutive ones share keys and values. The 1 to 8 queries are the newest tokens of their
sequence, in order; their own keys and values are in the cache already. A sequence b has, in order:

    num_sinks     slots in full precision
    lengths[b]    quantized tokens, keys and values in `Planes` as `kv_planes` has them, values with scales per token;
                  with room for a multiple of 32 tokens, or in blocks of that, if there is a block_table
    the rest      of the recent_lengths[b] slots in use of k_recent and v_recent, [batch, kv_heads, slots, D] in the
                  type of q; sinks are the first of them. There are quantized tokens only where sinks are in use

Lengths are int32 [batch], and are not checked. A query sees no token after itself, none before position first[b]
(int32 [batch]: there is padding on the left), and none but the `sliding_window` newest, itself included. Tokens that it
does not see are finite all the same; what lies past the lengths may be anything. softmax_scale is positive. With a
soft_cap, logits become soft_cap · tanh(logit / soft_cap). Where a query sees nothing, y is 0. All are contiguous.

The reference is `kv_reference`, which is also what runs on a CPU. Here too sums are float32, and rounded once, to the
type of q; `kv_dot` says how products are taken, and what they round: weights to float16, and keys and values where a
token has more than one scale, so that these must not be beyond 65504 either.

A program of the kernel is one warp, or two for more than 128 channels, with up to 16 queries of all heads that share
keys and values, and with a part of the tokens, of which it takes 32 at a time. What a sequence has of quantized tokens
that it sees is cut into parts of equal length; slots into parts of 128. Each part leaves its largest logit, the sum of
its weights and its values in a workspace, and a second kernel adds these up in their fixed order.

The launcher sees no lengths, only how much room there is, so that what it does is the same at every step and can be
captured in a CUDA graph. Programs of parts that turn out to be empty end at once.
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
from quant_kernels.kv_dot import LOWEST, attend, attend_to_slots, load_queries, no_values, piece_values
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
from quant_kernels.split_k import workspace
from quant_kernels.tuning import gpu_of

MOST_QUERIES = 8
ROWS, STEP = 16, 32
"""Queries of a program, those of each head; tokens of one of its steps."""
SHORTEST, MOST_SPLITS = 8, 128
"""Steps of a part at least, if there are as many; parts of a sequence at most."""
PART, SLOT_STEP = 128, 16
"""Slots of a part, and of a step."""
INTEGERS = (
    "sliding_window", "num_sinks", "kv_heads", "heads_per_kv", "queries", "tokens", "slots", "splits"
)  # fmt: skip


@triton.jit
def _quantized_part(  # type: ignore[no-untyped-def]
    q, inside, oldest, newest, first, last, begin, end, k_codes, k_scale, k_minimum, v_codes, v_scale,
    v_minimum, block_table, values, length, softmax_scale, soft_cap, num_sinks, batch, head, kv_heads, tokens,
    DTYPE: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUPS: tl.constexpr, LIMITED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    PAGED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of weights) [rows] of the tokens of steps from `begin` to `end`, which must be one at least.
    q, values: addresses [rows]. From token `first` to `last`, some rows see them."""
    ROWS: tl.constexpr = q.shape[0]
    q = load_queries(q, inside, DTYPE, D, K_BITS, K_GROUPS)
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = no_values(ROWS, D, V_BITS, V_GROUPS)
    factor = softmax_scale * piece_factor(K_GROUPS)
    if K_GROUPS == FP8:
        factor *= tl.load(k_scale + head % kv_heads).to(tl.float32)
    token = tl.arange(0, STEP)
    # Scales are read a step ahead: they do not come by way of the pipeline, and each step would wait for memory.
    row = row_of(begin, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
    next_k_scales = load_scales(k_scale, k_minimum, row, token < length - begin * STEP, ASM, D, K_BITS, K_GROUPS)
    next_v_scales = load_scales(v_scale, v_minimum, row, token < length - begin * STEP, ASM, D, V_BITS, V_GROUPS)
    for step in range(begin, end):
        row = row_of(step, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
        k_scales = next_k_scales
        v_scales = next_v_scales
        next_step = tl.minimum(step + 1, end - 1)
        next_row = row_of(next_step, block_table, batch, head, kv_heads, tokens, STEP, PAGED)
        stored = token < length - next_step * STEP
        next_k_scales = load_scales(k_scale, k_minimum, next_row, stored, ASM, D, K_BITS, K_GROUPS)
        next_v_scales = load_scales(v_scale, v_minimum, next_row, stored, ASM, D, V_BITS, V_GROUPS)
        seen = token < last - step * STEP
        if LIMITED:
            seen = seen & (token >= first - step * STEP)
        bias = tl.where(seen, 0.0, float("-inf"))
        position = num_sinks + step * STEP + token
        visible = (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
        most, total, sums = attend(
            most, total, sums, q, k_codes, k_scales, v_codes, v_scales, row, bias, visible, factor, soft_cap,
            DTYPE, ASM, D, K_BITS, K_GROUPS, V_BITS, V_GROUPS, CAPPED, MASKED,
        )  # fmt: skip
    word = tl.arange(0, piece_width(D, V_BITS, V_GROUPS))
    for piece in tl.static_range(num_pieces(D, V_BITS, V_GROUPS)):
        value = piece_values(sums, piece, DTYPE, D, V_BITS, V_GROUPS)
        if V_GROUPS == FP8:
            value *= tl.load(v_scale + head % kv_heads).to(tl.float32) * piece_factor(V_GROUPS)
        channel = piece_channel(piece, D, V_BITS, V_GROUPS) + 2 * word
        mask = (inside & (total > 0))[:, None] & (word < words_left(piece, D, V_BITS, V_GROUPS))[None, :]
        tl.store(values[:, None] + channel[None, :], value, mask=mask)
    return most, total


@triton.jit
def _kv_decode_kernel(  # type: ignore[no-untyped-def]
    q, k_codes, k_scale, k_minimum, v_codes, v_scale, v_minimum, lengths, k_recent, v_recent, recent_lengths,
    block_table, first, values, norms, softmax_scale, soft_cap, sliding_window, num_sinks, kv_heads, heads_per_kv,
    queries, tokens, slots, splits,
    D: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    RECENT: tl.constexpr, PAGED: tl.constexpr, FIRST: tl.constexpr, SLIDING: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    SHORTEST: tl.constexpr, PART: tl.constexpr, SLOT_STEP: tl.constexpr,
):  # fmt: skip
    """A part of the tokens of one head: one of `splits` of the quantized ones, and after these PART slots.

    softmax_scale: for powers of 2 instead of e; where logits are CAPPED, that of 2x / soft_cap, and soft_cap for powers
    of 2. tokens: room for a sequence. K_GROUPS, V_GROUPS: scales of a token, or their kind. PAGED: tokens of a block,
    0: not in blocks. MASKED: rows see different tokens."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else q.dtype.element_ty
    HALF: tl.constexpr = tl.float32 if INTERP else tl.float16
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = heads_per_kv * queries
    head = tile // tl.cdiv(rows, ROWS)
    batch = head // kv_heads
    row = tile % tl.cdiv(rows, ROWS) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    q += (head.to(tl.int64) * rows + row) * D
    place = (tile.to(tl.int64) * tl.num_programs(1) + part) * ROWS + tl.arange(0, ROWS)
    values += place * D
    most = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    length = tl.load(lengths + batch)
    recent = tl.load(recent_lengths + batch) if RECENT else 0
    padding = tl.load(first + batch) if FIRST else 0
    # Positions that a row sees.
    newest = length + recent - queries + row % queries
    oldest = tl.zeros_like(newest) + padding
    all_oldest = padding
    if SLIDING:
        all_oldest = tl.maximum(length + recent - queries - (sliding_window - 1), padding)
        oldest = tl.maximum(newest - (sliding_window - 1), padding)
    if part < splits:
        # Quantized tokens that some row sees.
        first_token = tl.maximum(all_oldest - num_sinks, 0)
        last_token = tl.minimum(length + recent - num_sinks, length)
        begin = first_token // STEP
        end = tl.cdiv(tl.maximum(last_token, 0), STEP)
        steps = tl.maximum(tl.cdiv(end - begin, splits), SHORTEST)
        begin += part * steps
        end = tl.minimum(begin + steps, end)
        if begin < end:
            most, total = _quantized_part(
                q, inside, oldest, newest, first_token, last_token, begin, end, k_codes, k_scale, k_minimum, v_codes,
                v_scale, v_minimum, block_table, values, length, softmax_scale, soft_cap, num_sinks, batch, head,
                kv_heads, tokens,
                HALF, ASM, D, K_BITS, K_GROUPS, V_BITS, V_GROUPS, SLIDING or FIRST, CAPPED, MASKED, PAGED, STEP,
            )  # fmt: skip
    elif RECENT:
        start = (part - splits) * PART
        slots_before = head.to(tl.int64) * slots * D
        most, total, value = attend_to_slots(
            q, inside, k_recent + slots_before, v_recent + slots_before, start, tl.minimum(start + PART, recent),
            length, num_sinks, oldest, newest, softmax_scale, soft_cap, DTYPE, D, CAPPED, SLOT_STEP,
        )  # fmt: skip
        channel = tl.arange(0, triton.next_power_of_2(D))
        tl.store(
            values[:, None] + channel[None, :], value, mask=(inside & (total > 0))[:, None] & (channel < D)[None, :]
        )
    tl.store(norms + 2 * place, most)
    tl.store(norms + 2 * place + 1, total)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    values, norms, y, rows, parts, D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of y: parts weighted with their largest logits, in order, BLOCK at a time. PARTS: `parts` or more."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    row = tl.program_id(0)
    tile = row // rows * tl.cdiv(rows, ROWS) + row % rows // ROWS
    first = tile.to(tl.int64) * parts * ROWS + row % rows % ROWS
    every = tl.arange(0, PARTS)
    most = tl.max(tl.load(norms + 2 * (first + every * ROWS), mask=every < parts, other=LOWEST), 0)
    channel = tl.arange(0, WIDTH)
    total = 0.0
    result = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        place = first + part * ROWS
        weight = tl.exp2(tl.load(norms + 2 * place, mask=part < parts, other=LOWEST) - most)
        part_total = tl.load(norms + 2 * place + 1, mask=part < parts, other=0)
        mask = (part_total > 0)[:, None] & (channel < D)[None, :]
        value = tl.load(values + place[:, None] * D + channel[None, :], mask=mask, other=0)
        total += tl.sum(weight * part_total, 0)
        result += tl.sum(weight[:, None] * value, 0)
    result /= tl.where(total > 0, total, 1.0)
    tl.store(y + row.to(tl.int64) * D + channel, result.to(y.dtype.element_ty), mask=channel < D)


def kv_decode(
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
    if queries > MOST_QUERIES:
        raise ValueError(f"q has {queries} queries of a sequence, at most {MOST_QUERIES} can be. Pass fewer at a "
                         "time, or attend to a prompt before it is quantized")  # fmt: skip
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    kv_heads, block_tokens = k_codes.shape[1:3]
    tokens = block_tokens if block_table is None else block_table.shape[1] * block_tokens
    slots = 0 if k_recent is None else k_recent.shape[2]
    rows = heads // kv_heads * queries
    tiles = batch * kv_heads * triton.cdiv(rows, ROWS)
    splits = num_splits(tiles, tokens if sliding_window is None else min(tokens, sliding_window + queries), q.device)
    parts = splits + triton.cdiv(slots, PART)
    buffer, _ = workspace(q.device, tiles * parts * ROWS * (head_dim + 2), 1)
    norms = buffer[tiles * parts * ROWS * head_dim :]
    scale = softmax_scale * log2(e) * (1 if soft_cap is None else 2 / soft_cap)
    _kv_decode_kernel[tiles, parts](
        q, *keys, *values, lengths, k_recent, v_recent, recent_lengths, block_table, first, buffer, norms,
        scale, (soft_cap or 0.0) * log2(e), sliding_window or 0, num_sinks, kv_heads, heads // kv_heads, queries,
        tokens, slots, splits,
        D=head_dim, K_BITS=k_format.bits, K_GROUPS=groups_of(k_format, head_dim), V_BITS=v_format.bits,
        V_GROUPS=groups_of(v_format, head_dim), RECENT=slots > 0, PAGED=0 if block_table is None else block_tokens,
        FIRST=first is not None, SLIDING=sliding_window is not None, CAPPED=soft_cap is not None,
        MASKED=queries > 1, ASM=library.ASSEMBLY, INTERP=library.INTERPRETED, ROWS=ROWS, STEP=STEP, SHORTEST=SHORTEST,
        PART=PART, SLOT_STEP=SLOT_STEP,
        num_warps=num_warps(head_dim), num_stages=3,
    )  # fmt: skip
    _merge_kernel[(batch * heads * queries,)](
        buffer, norms, y, rows, parts,
        D=head_dim, ROWS=ROWS, PARTS=triton.next_power_of_2(parts), BLOCK=min(triton.next_power_of_2(parts), 16),
        num_warps=4,
    )  # fmt: skip
    return y


def num_splits(tiles: int, tokens: int, device: torch.device) -> int:
    """As many parts of quantized tokens as give each processor eight programs, if there are tokens enough."""
    _, processors = gpu_of(device)
    return max(1, min(triton.cdiv(8 * processors, tiles), tokens // (SHORTEST * STEP), MOST_SPLITS))


def num_warps(head_dim: int) -> int:
    return 1 if head_dim <= 128 else 2


library.register(
    "kv_decode(Tensor q, Tensor k_codes, Tensor k_scale, Tensor? k_minimum, Tensor v_codes, Tensor v_scale, "
    "Tensor? v_minimum, Tensor lengths, float softmax_scale, Tensor? k_recent=None, Tensor? v_recent=None, "
    "Tensor? recent_lengths=None, Tensor? block_table=None, Tensor? first=None, int num_sinks=0, "
    "int? sliding_window=None, float? soft_cap=None) -> Tensor",
    launch=kv_decode,
    reference=kv_decode_reference,
    fake=lambda q, *_, **__: torch.empty_like(q),
)


SCHEMES = {
    "kv8": (KVFormat(8), KVFormat(8)),
    "fp8": (KVFormat(8, levels="fp8"), KVFormat(8, levels="fp8")),
    "k8v4": (KVFormat(8), KVFormat(4, group_size=32)),
    "kv4": (KVFormat(4, "channel"), KVFormat(4, group_size=32)),
    "kv4-rotated": (KVFormat(4), KVFormat(4, group_size=32)),
    "kv2": (KVFormat(2, "channel"), KVFormat(2, group_size=32)),
    "kv2-rotated": (KVFormat(2), KVFormat(2, group_size=32)),
    "4 bits, one scale": (KVFormat(4), KVFormat(4)),
}
"""Keys and values of the caches that are held to what was recorded."""
LAUNCHES: dict[str, dict[str, Any]] = {
    "": {},
    "in blocks": {"PAGED": 64},
    "masked": {"SLIDING": True, "CAPPED": True, "MASKED": True},
}
RECORDED: dict[tuple[int, str, int, str], float] = {
    # (capability, scheme, channels, launch): instructions per number of keys and values
    (90, "kv8", 128, ""): 2.38,
    (90, "fp8", 128, ""): 3.02,
    (90, "k8v4", 128, ""): 2.77,
    (90, "kv4", 128, ""): 3.3,
    (90, "kv4-rotated", 128, ""): 2.82,
    (90, "4 bits, one scale", 128, ""): 2.54,
    (90, "kv2", 128, ""): 3.3,
    (90, "kv2-rotated", 128, ""): 2.68,
    (90, "kv8", 64, "in blocks"): 3.63,
    (90, "kv8", 128, "masked"): 3.32,
    (90, "kv4", 256, ""): 4.31,
    (80, "kv8", 128, ""): 2.42,
    (80, "kv4", 128, ""): 3.29,
}


def gates() -> tuple[Gate, ...]:
    """Scales, queries and slots in bfloat16; slots where a scheme has a window."""
    floats, integers = dict.fromkeys(("softmax_scale", "soft_cap"), "fp32"), dict.fromkeys(INTEGERS, "i32")
    pointers = dict.fromkeys(("q", "k_scale", "k_minimum", "v_scale", "v_minimum", "k_recent", "v_recent"), "*bf16")
    pointers |= dict.fromkeys(("k_codes", "v_codes"), "*u8") | dict.fromkeys(("values", "norms"), "*fp32")
    pointers |= dict.fromkeys(("lengths", "recent_lengths", "block_table", "first"), "*i32")
    made = []
    for (capability, scheme, head_dim, launch), instructions in RECORDED.items():
        keys, values = SCHEMES[scheme]
        constants = {
            "D": head_dim, "K_BITS": keys.bits, "K_GROUPS": groups_of(keys, head_dim), "V_BITS": values.bits,
            "V_GROUPS": groups_of(values, head_dim), "RECENT": values.bits < 8, "PAGED": 0, "FIRST": False,
            "SLIDING": False, "CAPPED": False, "MASKED": False, "ASM": True, "INTERP": False, "ROWS": ROWS,
            "STEP": STEP, "SHORTEST": SHORTEST, "PART": PART, "SLOT_STEP": SLOT_STEP, **LAUNCHES[launch],
        }  # fmt: skip
        variant = Variant(
            _kv_decode_kernel, pointers | floats | integers, constants, (*pointers, "tokens"), num_warps(head_dim),
            num_stages=3, weights=2 * STEP * head_dim,
        )  # fmt: skip
        name = f"kv_decode {scheme} {head_dim} {launch}".strip()
        representative = (capability, head_dim, launch) == (90, 128, "") and scheme == "kv4"
        made.append(Gate(name, variant, capability, "HMMA", instructions, representative))
    for capability in (80, 90):
        signature = {"values": "*fp32", "norms": "*fp32", "y": "*bf16", "rows": "i32", "parts": "i32"}
        constants = {"D": 128, "ROWS": ROWS, "PARTS": MOST_SPLITS, "BLOCK": 16}
        variant = Variant(_merge_kernel, signature, constants, ("values", "norms", "y"), num_warps=4, num_stages=3)
        made.append(Gate("kv_decode merge", variant, capability, ""))
    return tuple(made)
