"""New keys or values into a quantized cache: quantized, packed and written where they belong, in one launch.

x: float16, bfloat16 or float32 [batch, kv_heads, tokens, D], finite; channels are contiguous, the rest may have any
strides, as a projection leaves it. The cache is one side as `kv_planes` has it, `Planes` of any `KVFormat`, changed in
place. Token i of sequence b goes to starts[b] + i, int32 [batch]; what would lie before 0 or beyond the room is left
out, so a sequence that starts far enough below 0 adds nothing. Where tokens share a scale, their number and the starts
are multiples of 32. No two tokens may have the same place.

Without a block_table, sequence b of the cache is that of x. With one, int32 [batch, most blocks of a sequence], it is
made of these blocks; those that tokens go to must exist. A table of one column picks sequences of a cache that is not
in blocks.

What is written are the bits of `kv_planes.quantize` on a CPU, with scales and minima in the type that the cache has,
on every device and in Triton's interpreter. So division is rounded correctly, codes are rounded as in `token_quant`,
and bfloat16 by integers, which is the same on a GPU, and which the interpreter would truncate. fp8 is that of
`fp8_quant`.

A program has 16 tokens, of whatever heads and sequences, or 32 that share scales. It has channels in their order, as
groups want them; the bytes then gather what they hold, from anywhere in the token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.fp8_quant import has_fp8, to_fp8
from quant_kernels.gate import Gate, Variant
from quant_kernels.kv_planes import TOKENS, KVFormat, Planes, check_tokens, format_of, quantize
from quant_kernels.kv_words import FP8, PER_CHANNEL, groups_of
from quant_kernels.token_quant import SHIFTER, SHIFTER_BITS

ROWS = 16
"""Tokens of a program, each of one head, where they do not share scales."""


def kv_append_reference(
    x: Tensor, cache_codes: Tensor, cache_scale: Tensor, cache_minimum: Tensor | None, starts: Tensor,
    block_table: Tensor | None = None,
) -> None:  # fmt: skip
    """`quantize`, and what it gives put where it belongs."""
    cache = Planes(cache_codes, cache_scale, cache_minimum)
    kv_format = _check(x, cache, starts, block_table)
    block_tokens = cache_codes.shape[2]
    room = block_tokens if block_table is None else block_table.shape[1] * block_tokens
    position = starts[:, None] + torch.arange(x.shape[2], device=x.device)
    batch, token = ((position >= 0) & (position < room)).nonzero(as_tuple=True)
    place = position[batch, token]
    sequence = batch if block_table is None else block_table[batch, place // block_tokens]
    place = place % block_tokens
    new = quantize(x, kv_format, cache_scale.dtype, cache_scale if kv_format.levels == "fp8" else None)
    cache_codes[sequence, :, place] = new.codes[batch, :, token]
    shared = TOKENS if kv_format.per == "channel" else 1
    if kv_format.levels == "int":
        cache_scale[sequence, :, place // shared] = new.scale[batch, :, token // shared]
    if cache_minimum is not None and new.minimum is not None:
        cache_minimum[sequence, :, place // shared] = new.minimum[batch, :, token // shared]


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32, finite → DTYPE, to the nearest, half to even."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(DTYPE)
    return rounded


@triton.constexpr_function
def _grouped(rows: int, width: int, groups: int) -> tuple[int, int, int]:
    """Rows of channels with an axis of what shares a scale: the second if it is per channel, else the last."""
    if groups == 0:
        return 1, rows, width
    return (rows, width // 32, 32) if groups > 1 else (rows, 1, width)


@triton.jit
def _kv_append_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, minimum, starts, block_table, rows, kv_heads, tokens, batch_stride, head_stride, token_stride,
    room, block_tokens,
    D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, PAGED: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """room: tokens of a sequence. GROUPS: scales of a token, or their kind. CAST: see `has_fp8`."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    token = row % tokens
    head = row // tokens % kv_heads
    batch = row // tokens // kv_heads
    position = tl.load(starts + batch, mask=inside, other=0) + token
    written = inside & (position >= 0) & (position < room)
    sequence = batch
    if PAGED:
        block = batch.to(tl.int64) * (room // block_tokens) + position // block_tokens
        sequence = tl.load(block_table + block, mask=written, other=0)
        position = position % block_tokens
    place = (sequence.to(tl.int64) * kv_heads + head) * block_tokens + position  # among the tokens of all heads

    channel = tl.arange(0, WIDTH)[None, :]
    at = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride
    # Past the end the last one is read again, which no minimum or maximum sees.
    read = at[:, None] + (channel if D == WIDTH else tl.minimum(channel, D - 1))
    value = tl.load(x + read, mask=inside[:, None], other=0).to(tl.float32)
    if GROUPS == FP8:
        divisor = tl.load(scale + head).to(tl.float32)
        divisor = tl.where(divisor == 0, float("inf"), divisor)
        packed = to_fp8(tl.div_rn(value, divisor[:, None]), CAST)
    else:
        DTYPE: tl.constexpr = scale.dtype.element_ty
        SHAPE: tl.constexpr = _grouped(ROWS, WIDTH, GROUPS)
        AXIS: tl.constexpr = 1 if GROUPS == PER_CHANNEL else 2
        if GROUPS == PER_CHANNEL:
            scale_at = (tl.min(place, 0) // ROWS * D + channel)[None]
            scale_written = (channel < tl.max(written.to(tl.int32), 0) * D)[None]
        else:
            group = tl.arange(0, SHAPE[1])[None, :, None]
            scale_at = (place * GROUPS)[:, None, None] + group
            scale_written = written[:, None, None] & (group < GROUPS)
        value = tl.reshape(value, SHAPE)
        if BITS == 8:
            divisor = _rounded(tl.div_rn(tl.max(tl.abs(value), AXIS, keep_dims=True), 127.0), DTYPE)
        else:
            low = tl.min(value, AXIS, keep_dims=True)
            spread = tl.max(value, AXIS, keep_dims=True) - low
            divisor = _rounded(tl.div_rn(spread, (1 << BITS) - 1.0), DTYPE)
            offset = _rounded(low, DTYPE)
            tl.store(minimum + scale_at, offset, mask=scale_written)
            value -= offset.to(tl.float32)
        tl.store(scale + scale_at, divisor, mask=scale_written)
        divisor = divisor.to(tl.float32)
        quotient = tl.div_rn(value, tl.broadcast_to(tl.where(divisor == 0, float("inf"), divisor), SHAPE))
        LEAST: tl.constexpr = -127.0 if BITS == 8 else 0.0
        MOST: tl.constexpr = 127.0 if BITS == 8 else (1 << BITS) - 1.0
        shifted = tl.minimum(tl.maximum(quotient, LEAST), MOST) + SHIFTER
        packed = tl.reshape(shifted.to(tl.int32, bitcast=True) - SHIFTER_BITS, (ROWS, WIDTH))

    BYTES: tl.constexpr = D * BITS // 8
    byte = tl.arange(0, triton.next_power_of_2(BYTES))[None, :]
    if BITS < 8:
        unpacked = packed
        packed = tl.zeros((ROWS, triton.next_power_of_2(BYTES)), tl.int32)
        for plane in tl.static_range(8 // BITS):
            index = tl.broadcast_to(tl.minimum(plane * BYTES + byte, D - 1), packed.shape)
            packed |= tl.gather(unpacked, index, 1) << (plane * BITS)
    tl.store(codes + place[:, None] * BYTES + byte, packed.to(tl.uint8), mask=written[:, None] & (byte < BYTES))


def kv_append(
    x: Tensor, cache_codes: Tensor, cache_scale: Tensor, cache_minimum: Tensor | None, starts: Tensor,
    block_table: Tensor | None = None,
) -> None:  # fmt: skip
    """Write into the cache. Raises ValueError where an argument is not as described above."""
    kv_format = _check(x, Planes(cache_codes, cache_scale, cache_minimum), starts, block_table)
    batch, kv_heads, tokens, head_dim = x.shape
    block_tokens, rows = cache_codes.shape[2], batch * kv_heads * tokens
    constants = _constants(kv_format, head_dim)
    if rows:
        _kv_append_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            x, cache_codes, cache_scale, cache_minimum, starts, block_table, rows, kv_heads, tokens, *x.stride()[:3],
            block_tokens if block_table is None else block_table.shape[1] * block_tokens, block_tokens,
            PAGED=block_table is not None, CAST=has_fp8(x.device), **constants, num_warps=4,
        )  # fmt: skip


def _constants(kv_format: KVFormat, head_dim: int) -> dict[str, int]:
    rows = TOKENS if kv_format.per == "channel" else ROWS
    return {"D": head_dim, "BITS": kv_format.bits, "GROUPS": groups_of(kv_format, head_dim), "ROWS": rows}


def _check(x: Tensor, cache: Planes, starts: Tensor, block_table: Tensor | None) -> KVFormat:
    """The format of the cache. Raises ValueError."""
    if x.ndim != 4 or x.dtype not in FLOATS or x.stride(3) != 1:
        raise ValueError(f"x is {x.dtype} of shape {[*x.shape]} and strides {x.stride()}, expected floats [batch, "
                         "kv_heads, tokens, D] with contiguous channels. Use .to() or .contiguous()")  # fmt: skip
    batch, kv_heads, tokens, head_dim = x.shape
    kv_format = format_of("cache", cache, head_dim)
    check_tokens(kv_format, tokens)
    sequences = None if block_table is not None else batch
    expect("cache_codes", cache.codes, (torch.uint8,), [sequences, kv_heads, None, None], x.device)
    if cache.minimum is not None and cache.minimum.dtype != cache.scale.dtype:
        raise ValueError(f"cache_minimum is {cache.minimum.dtype}, cache_scale {cache.scale.dtype}. Make them the same")
    expect("starts", starts, (torch.int32,), [batch], x.device)
    if block_table is not None:
        expect("block_table", block_table, (torch.int32,), [batch, None], x.device)
    return kv_format


library.register(
    "kv_append(Tensor x, Tensor(a!) cache_codes, Tensor(b!) cache_scale, Tensor(c!)? cache_minimum, Tensor starts, "
    "Tensor? block_table=None) -> ()",
    launch=kv_append,
    reference=kv_append_reference,
    fake=lambda x, cache_codes, cache_scale, cache_minimum, starts, block_table=None: None,
)


def gates() -> tuple[Gate, ...]:
    """Every kind of scale, into blocks."""
    made = []
    for capability in (80, 90):
        for name, kv_format, head_dim in (
            ("int8", KVFormat(8), 128),
            ("fp8", KVFormat(8, levels="fp8"), 256),
            ("int4 in groups", KVFormat(4, group_size=32), 128),
            ("int4 per channel", KVFormat(4, "channel"), 128),
            ("int2", KVFormat(2), 96),
        ):
            constants: dict[str, Any] = _constants(kv_format, head_dim) | {"PAGED": True, "CAST": capability == 90}
            pointers = {"x": "*bf16", "codes": "*u8", "scale": "*bf16", "starts": "*i32", "block_table": "*i32"}
            if kv_format.symmetric:
                constants["minimum"] = None
            else:
                pointers["minimum"] = "*bf16"
            numbers = ("rows", "kv_heads", "tokens", "batch_stride", "head_stride", "token_stride", "room",
                       "block_tokens")  # fmt: skip
            signature = pointers | dict.fromkeys(numbers, "i32")
            aligned = (*pointers, *(number for number in numbers if "stride" in number), "room", "block_tokens")
            variant = Variant(_kv_append_kernel, signature, constants, aligned, num_warps=4, num_stages=3)
            made.append(
                Gate(f"kv_append {name} {head_dim}", variant, capability, opcode="", representative="groups" in name)
            )
    return tuple(made)
