"""4-bit weights times 8-bit activations on the integer tensor cores.

    w4a8:          y[m, n] = x_scale[m] · (scale[n] · Σ u[n, k] · x[m, k] - zero_scaled[n] · x_sum[m]) + bias[n]
    w4a8_grouped:  y[m, n] = x_scale[m] · scale[n] · Σ v[n, k] · x[m, k] + bias[n], v = group_scale · u + group_offset

x: int8 [tokens, inputs], with one x_scale (float32) and one x_sum (the sum of its row; int32 or float32) per token. u:
codes 0 … 15, which go into the product as they are; with one scale per channel, the zero point is taken off at the end,
by way of x_sum. With groups of inputs it would have to be taken off in each, so there the weight is quantized twice,
and v, int8, is made again from u, four at a time: everything in the product stays an integer.

`weight` and `groups` lie as `quant_kernels.byte_planes` says. If inputs are not a multiple of 128, x is copied.

Sums are int32 and exact, whatever the order, so splitting them changes nothing. Only the formulas above round: in
float32, then to the type of the result, float16, bfloat16 or float32. Triton's interpreter truncates to bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.byte_planes import BLOCK, GROUP, dequantize_progressive, unpack_bytes
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import sum_splits, workspace
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled

MAX_INPUTS = (2**31 - 1) // (15 * 128)
MAX_INPUTS_GROUPED = (2**31 - 1) // (128 * 128)
"""Beyond these a sum could leave int32."""


def w4a8_reference(
    x: Tensor, x_scale: Tensor, x_sum: Tensor, weight: Tensor, scale: Tensor, zero_scaled: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """In float64, where sums of integers are exact and the rest all but so."""
    total = x.double() @ unpack_bytes(weight, x.shape[1]).double().T
    y = x_scale.double()[:, None] * (scale.double() * total - zero_scaled.double() * x_sum.double()[:, None])
    return (y if bias is None else y + bias.double()).to(dtype)


def w4a8_grouped_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As above."""
    total = x.double() @ dequantize_progressive(weight, groups, x.shape[1]).double().T
    y = x_scale.double()[:, None] * scale.double() * total
    return (y if bias is None else y + bias.double()).to(dtype)


LOW = tl.constexpr("and.b32 $0, $1, 0x0F0F0F0F;")
HIGH = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }")
"""Four bytes at once → four codes."""
OFFSET_LOW = tl.constexpr("prmt.b32 $0, $1, 0, 0x1111;")
OFFSET_HIGH = tl.constexpr("prmt.b32 $0, $1, 0, 0x3333;")
"""A group's word → its offset in all four bytes."""
WIDEN = tl.constexpr("{ .reg .b32 t; mad.lo.u32 t, $1, $2, $6; xor.b32 $0, t, 0x80808080; }")
"""Four codes · scale + offset + 128, each 0 … 255 and so without a carry into the next; then - 128."""


@triton.jit
def _widen(codes, scale, offset):  # type: ignore[no-untyped-def]
    """codes: [rows, 64]; scale, offset: [rows]. All four codes take the scale of the first: they are neighbours in a
    row, as tensor cores want their operands, and as a test checks.
    """
    return tl.inline_asm_elementwise(
        WIDEN, "=r,r,r,r,r,r,r,r,r,r", [codes, scale[:, None], offset[:, None]], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _codes(bytes, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low and the high nibbles, int8 0 … 15."""
    if ASM:
        low = tl.inline_asm_elementwise(LOW, "=r,r", [bytes], dtype=tl.int8, is_pure=True, pack=4)
        high = tl.inline_asm_elementwise(HIGH, "=r,r", [bytes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        low = (bytes & 15).to(tl.int8)
        high = (bytes >> 4).to(tl.int8)
    return low, high


@triton.jit
def _widened(low, high, word, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The int8 codes of both groups of a block; word: int32 [rows]."""
    low_scale = word & 255
    high_scale = (word >> 16) & 255
    if ASM:
        low_offset = tl.inline_asm_elementwise(OFFSET_LOW, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        high_offset = tl.inline_asm_elementwise(OFFSET_HIGH, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
        low = _widen(low, low_scale, low_offset)
        high = _widen(high, high_scale, high_offset)
    else:
        low = (low * low_scale[:, None] + ((word >> 8) & 255)[:, None] - 128).to(tl.int8)
        high = (high * high_scale[:, None] + ((word >> 24) & 255)[:, None] - 128).to(tl.int8)
    return low, high


@triton.jit
def _w4a8_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, x_sum, weight, scale, zero_scaled, groups, bias, y, partials, counters, M, N, K,
    GROUPED: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, 8)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last one is read again: a mask would cost an instruction per load in the loop. Stores are masked.
    read_tokens = tl.minimum(tokens, M - 1)
    read_outputs = tl.minimum(outputs, N - 1)

    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    byte = tl.arange(0, 64)[None, :]
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + byte + first.to(tl.int64) * BLOCK_K
    weight_at = (
        weight + read_outputs.to(tl.int64)[:, None] * (K // 128 * 64) + byte + first.to(tl.int64) * (BLOCK_K // 2)
    )
    if GROUPED:
        group_at = groups + first.to(tl.int64) * (BLOCK_K // 128) * N + read_outputs
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(first, last):
        for block in tl.static_range(BLOCK_K // 128):
            x_low = tl.load(x_at + 128 * block)
            x_high = tl.load(x_at + 128 * block + 64)
            bytes = tl.load(weight_at + 64 * block, eviction_policy="evict_first")  # noqa: A001
            low, high = _codes(bytes, ASM)
            if GROUPED:
                low, high = _widened(low, high, tl.load(group_at), ASM)
                group_at += N
            if SWAP:
                total = tl.dot(low, x_low.T, total, out_dtype=tl.int32)
                total = tl.dot(high, x_high.T, total, out_dtype=tl.int32)
            else:
                total = tl.dot(x_low, low.T, total, out_dtype=tl.int32)
                total = tl.dot(x_high, high.T, total, out_dtype=tl.int32)
        x_at += BLOCK_K
        weight_at += BLOCK_K // 2

    if SWAP:
        total = total.T
    if SPLIT_K > 1:
        total, complete = sum_splits(total, partials, counters, tile, split, SPLIT_K)
        M = tl.where(complete, M, 0)
    result = total.to(tl.float32) * tl.load(scale + read_outputs)[None, :]
    if not GROUPED:
        sums = tl.load(x_sum + read_tokens).to(tl.float32)
        result -= tl.load(zero_scaled + read_outputs)[None, :] * sums[:, None]
    result *= tl.load(x_scale + read_tokens)[:, None]
    if BIAS:
        result += tl.load(bias + read_outputs).to(tl.float32)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (outputs < N)[None, :])


def w4a8(
    x: Tensor, x_scale: Tensor, x_sum: Tensor, weight: Tensor, scale: Tensor, zero_scaled: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One scale and zero point per channel. Raises ValueError where an argument is not as described above."""
    _check(x, x_scale, weight, scale, bias, dtype, MAX_INPUTS)
    expect("x_sum", x_sum, (torch.int32, torch.float32), [x.shape[0]], x.device)
    expect("zero_scaled", zero_scaled, (torch.float32,), [weight.shape[0]], x.device)
    return _launch(x, x_scale, x_sum, weight, scale, zero_scaled, None, bias, dtype)


def w4a8_grouped(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Groups of 64 inputs within a scale per channel. Raises ValueError where an argument is not as described above."""
    _check(x, x_scale, weight, scale, bias, dtype, MAX_INPUTS_GROUPED)
    expect("groups", groups, (torch.int32,), [triton.cdiv(x.shape[1], BLOCK), weight.shape[0]], x.device)
    return _launch(x, x_scale, None, weight, scale, None, groups, bias, dtype)


def _launch(
    x: Tensor, x_scale: Tensor, x_sum: Tensor | None, weight: Tensor, scale: Tensor, zero_scaled: Tensor | None,
    groups: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x = F.pad(x, (0, -x.shape[1] % BLOCK)) if x.shape[1] % BLOCK else x
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    y = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, 0 if groups is None else GROUP, x.device)
    block_k = config.block_k if inputs % config.block_k == 0 else BLOCK
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    partials = counters = None
    if config.split_k > 1:
        sums = tiles * config.split_k * config.block_m * config.block_n
        partials, counters = workspace(x.device, sums, tiles)
        partials = partials.view(torch.int32)
    _w4a8_kernel[tiles, config.split_k](
        x, x_scale, x_sum, weight, scale, zero_scaled, groups, bias, y, partials, counters, tokens, outputs, inputs,
        GROUPED=groups is not None, BIAS=bias is not None,
        ASM=library.ASSEMBLY,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, SPLIT_K=config.split_k, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW, SOME, MORE, MANY = (
    Config(16, 64, 256, num_warps=2, num_stages=3),
    Config(32, 64, 256, num_warps=2, num_stages=3),
    Config(64, 128, 256, num_warps=4, num_stages=3, swap=True),
    Config(128, 128, 256, num_warps=8, num_stages=3, swap=True),
)
"""For up to 16, 32 and 64 tokens, and more."""
PREFILL = Config(128, 256, 128, num_warps=8, num_stages=3, swap=True)
"""For more than 512 tokens on Hopper. An A100 has too few registers for it, and so have split sums."""


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: sums are split until each processor has eight warps."""
    found = tabled("w4a8", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    if tokens > 512 and hopper:
        return PREFILL
    config = next((few for few in (FEW, SOME, MORE) if tokens <= few.block_m), MANY)
    blocks = triton.cdiv(8 * processors, config.num_warps)
    return fitted(split_sums(config, tokens, outputs, inputs, blocks=blocks, least=1024))


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, most: int
) -> None:
    expect("x", x, (torch.int8,), [None, None], x.device)
    tokens, inputs = x.shape
    if not 1 <= inputs <= most:
        raise ValueError(
            f"x has {inputs} inputs: 1 to {most} are possible, beyond which sums overflow. Split the layer"
        )
    expect("weight", weight, (torch.uint8,), [None, triton.cdiv(inputs, BLOCK) * GROUP], x.device)
    expect("x_scale", x_scale, (torch.float32,), [tokens], x.device)
    expect("scale", scale, (torch.float32,), [weight.shape[0]], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [weight.shape[0]], x.device)
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: results are {', '.join(map(str, FLOATS))}")


def _fake(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


library.register(
    "w4a8(Tensor x, Tensor x_scale, Tensor x_sum, Tensor weight, Tensor scale, Tensor zero_scaled, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    launch=w4a8,
    reference=w4a8_reference,
    fake=lambda x, x_scale, x_sum, weight, scale, zero_scaled, bias, dtype: _fake(x, weight, dtype),
)
library.register(
    "w4a8_grouped(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor groups, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    launch=w4a8_grouped,
    reference=w4a8_grouped_reference,
    fake=lambda x, x_scale, weight, scale, groups, bias, dtype: _fake(x, weight, dtype),
)


RECORDED = {
    # (capability, grouped): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (80, False): (0.81, 0.98, 1.27, 2.37),
    (80, True): (1.53, 1.71, 2.03, 3.15),
    (90, False): (0.80, 0.98, 0.96, 1.45, 1.22),
    (90, True): (1.51, 1.68, 1.67, 2.19, 1.91),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums where it splits them."""
    pointers = {
        "x": "*i8", "x_scale": "*fp32", "x_sum": "*i32", "weight": "*u8", "scale": "*fp32", "zero_scaled": "*fp32",
        "groups": "*i32", "bias": "*bf16", "y": "*bf16", "partials": "*i32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (capability, grouped), recorded in RECORDED.items():
        for config, instructions in zip((FEW, SOME, MORE, MANY, PREFILL), recorded, strict=False):
            constants = {
                "GROUPED": grouped, "BIAS": True, "ASM": True, "SWAP": config.swap,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
                "SPLIT_K": 1 if config == PREFILL else 4,
            }  # fmt: skip
            variant = Variant(
                _w4a8_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * config.block_k,
            )  # fmt: skip
            name = f"w4a8{'_grouped' * grouped} {config.block_m}x{config.block_n}x{config.block_k}"
            opcode = "IGMMA" if capability == 90 and config.swap else "IMMA"
            representative = (capability, grouped, config) in ((90, False, FEW), (90, True, MORE), (80, False, MORE))
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
