"""4-bit float weights times 16-bit activations, on tensor cores that know no 4-bit floats: y = x · weightᵀ + bias.

    y[m, n] = Σ value(u[n, k]) · s[g, n] · x[m, k] / global_scale + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. u, the weight's e2m1 codes in `words`, s,
bytes of `scale`, and `global_scale` are NVFP4, in groups of 16, or MXFP4, in groups of 32, as `quant_kernels.fp4_words`
packs them; how many rows scale has tells which. bias: any float. All contiguous, any number of inputs. Sums are float32
and rounded once, to the type of x.

Each weight is scaled before it is multiplied: one instruction for two, without a rounding, as scales have few bits. To
scale sums instead, as `quant_kernels.wna16` does, would save nothing: bfloat16 codes come in as subnormal numbers, and
need a multiplication anyway. Weights are the left operand (`swap`), which Hopper takes from registers; for few tokens
either order takes as many instructions.

`dequantize_fp4` makes the plain weight [outputs, inputs], for products with so many tokens that a library's is worth
the detour: float16 or bfloat16, rounded once from float32. A block makes one tile of 64 outputs and 128 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.fp4_words import (
    MXFP4_FACTOR,
    NVFP4_FACTOR,
    NVFP4_GROUP,
    dequantize,
    group_size_of,
    unpack_codes,
    unpack_scales,
)
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled
from quant_kernels.words import TILE_COLUMNS, TILE_ROWS, TILE_WORDS, word_offsets, word_shape


def w4a16_fp4_reference(
    x: Tensor, words: Tensor, scale: Tensor, global_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded once at the end."""
    weight = dequantize(words, scale, global_scale, x.shape[1])
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@triton.jit
def _w4a16_fp4_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, global_scale, bias, y, partials, counters, M, N, K,
    NVFP4: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """EVEN_K: K is a multiple of 128. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
    HALVES: tl.constexpr = 2 if NVFP4 else 1  # of a plane, that have scales of their own
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, 8)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last one is read again: a mask would cost an instruction per load in the loop. Stores are masked.
    read_tokens = tl.minimum(tokens, M - 1)
    read_outputs = tl.minimum(outputs, N - 1)

    splits = tl.num_programs(1)
    steps = tl.cdiv(tl.cdiv(K, 128), splits)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, 128))
    # The launcher sees to it. Could the loop be skipped, its sums would have a second origin, and ptxas would wait for
    # each wide instruction before it issues the next.
    tl.assume(first < last)
    column = tl.arange(0, 32)[None, :]
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + column
    words_at = words + word_offsets(read_outputs, K)
    half = tl.arange(0, HALVES)[None, :]
    scale_at = scale + (first.to(tl.int64) * HALVES + half) * N + read_outputs[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        planes = unpack_codes(tl.load(words_at + step * TILE_WORDS, eviction_policy="evict_first"), DTYPE, ASM)
        scales = unpack_scales(tl.load(scale_at), NVFP4, DTYPE, ASM)
        scale_at += HALVES * N
        for plane in tl.static_range(4):
            start = step * 128 + plane * 32
            if EVEN_K:
                a = tl.load(x_at + start).to(DTYPE)
            else:
                a = tl.load(x_at + start, mask=column < K - start, other=0).to(DTYPE)
            # Repeated, not selected by column: so compilers see which thread needs which, and move nothing.
            s = tl.broadcast_to(scales[plane][:, :, None], (BLOCK_N, HALVES, 32 // HALVES))
            weight = planes[plane] * tl.reshape(s, (BLOCK_N, 32))
            if SWAP:
                total = tl.dot(weight, a.T, total)
            else:
                total = tl.dot(a, weight.T, total)

    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        M = tl.where(complete, M, 0)
    if SWAP:
        total = total.T
    total *= tl.div_rn(NVFP4_FACTOR if NVFP4 else MXFP4_FACTOR, tl.load(global_scale))
    if BIAS:
        total += tl.load(bias + read_outputs).to(tl.float32)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (outputs < N)[None, :])


def w4a16_fp4(x: Tensor, words: Tensor, scale: Tensor, global_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    group_size = _check(x, words, scale, global_scale, bias)
    (tokens, inputs), outputs = x.shape, scale.shape[1]
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, group_size, x.device)
    tiles, steps = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n), triton.cdiv(inputs, 128)
    split_k, partials, counters = share(config, tiles, steps, x.device)
    _w4a16_fp4_kernel[tiles, split_k](
        x, words, scale, global_scale, bias, y, partials, counters, tokens, outputs, inputs,
        NVFP4=group_size == NVFP4_GROUP, BIAS=bias is not None, EVEN_K=inputs % 128 == 0,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def dequantize_fp4_reference(
    words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int, dtype: torch.dtype
) -> Tensor:
    """In float64, then float32, rounded once more."""
    return dequantize(words, scale, global_scale, inputs).to(dtype)


@triton.jit
def _dequantize_fp4_kernel(  # type: ignore[no-untyped-def]
    words, scale, global_scale, weight, N, K,
    NVFP4: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else weight.dtype.element_ty
    HALVES: tl.constexpr = 2 if NVFP4 else 1
    tiles_k = tl.cdiv(K, 128)
    step = tl.program_id(0) % tiles_k
    rows = tl.program_id(0) // tiles_k * 64 + tl.arange(0, 64)
    read_rows = tl.minimum(rows, N - 1)
    half = tl.arange(0, HALVES)[None, :]
    planes = unpack_codes(tl.load(words + word_offsets(rows, K) + step * TILE_WORDS), DTYPE, ASM)
    scale_at = scale + (step.to(tl.int64) * HALVES + half) * N + read_rows[:, None]
    scales = unpack_scales(tl.load(scale_at), NVFP4, DTYPE, ASM)
    factor = tl.div_rn(NVFP4_FACTOR if NVFP4 else MXFP4_FACTOR, tl.load(global_scale))
    for plane in tl.static_range(4):
        inputs = step * 128 + plane * 32 + tl.arange(0, 32)
        s = tl.reshape(tl.broadcast_to(scales[plane][:, :, None], (64, HALVES, 32 // HALVES)), (64, 32))
        value = (planes[plane] * s).to(tl.float32) * factor
        weight_at = weight + rows.to(tl.int64)[:, None] * K + inputs[None, :]
        tl.store(weight_at, value.to(weight.dtype.element_ty), mask=(rows < N)[:, None] & (inputs < K)[None, :])


def dequantize_fp4(words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs]. Raises ValueError where an argument is not as described above."""
    group_size = _check_weight(words, scale, global_scale, inputs, words.device)
    if dtype not in FLOATS or (dtype == torch.float32 and not library.INTERPRETED):
        raise ValueError(f"dtype={dtype}: weights are made in torch.float16 or torch.bfloat16")
    weight = torch.empty(scale.shape[1], inputs, dtype=dtype, device=words.device)
    _dequantize_fp4_kernel[(triton.cdiv(len(weight), TILE_ROWS) * triton.cdiv(inputs, TILE_COLUMNS),)](
        words, scale, global_scale, weight, *weight.shape,
        NVFP4=group_size == NVFP4_GROUP, ASM=library.ASSEMBLY, INTERP=library.INTERPRETED, num_warps=4,
    )  # fmt: skip
    return weight


FEW = Config(16, 64, num_warps=2, swap=True)
SOME = Config(32, 128, num_warps=4, swap=True)
MORE = Config(64, 128, num_warps=4, num_stages=3, swap=True)
MANY = Config(128, 128, num_warps=4, num_stages=3, swap=True)
MANY_AMPERE = Config(128, 128, num_warps=8, num_stages=3, swap=True)
"""Where activations too have to go through registers."""
PREFILL = Config(128, 256, num_warps=8, num_stages=3, swap=True)


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: four blocks per processor where splitting sums can give them."""
    found = tabled("w4a16_fp4", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    if tokens > 512 and hopper:
        return PREFILL
    most_tokens = MANY if hopper else MANY_AMPERE
    config = next((few for few in (FEW, SOME, MORE) if tokens <= few.block_m), most_tokens)
    config = split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=512)
    return fitted(config)


def _check(x: Tensor, words: Tensor, scale: Tensor, global_scale: Tensor, bias: Tensor | None) -> int:
    """The group size. Raises ValueError."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    group_size = _check_weight(words, scale, global_scale, x.shape[1], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [scale.shape[1]], x.device)
    return group_size


def _check_weight(words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int, device: torch.device) -> int:
    """The group size. Raises ValueError."""
    expect("scale", scale, (torch.int32,), [None, None], device)
    group_size = group_size_of(scale, inputs)
    expect("words", words, (torch.int16,), word_shape(scale.shape[1], inputs), device)
    expect("global_scale", global_scale, (torch.float32,), [1], device)
    return group_size


library.register(
    "w4a16_fp4(Tensor x, Tensor words, Tensor scale, Tensor global_scale, Tensor? bias=None) -> Tensor",
    launch=w4a16_fp4,
    reference=w4a16_fp4_reference,
    fake=lambda x, words, scale, global_scale, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)
library.register(
    "dequantize_fp4(Tensor words, Tensor scale, Tensor global_scale, int inputs, ScalarType dtype) -> Tensor",
    launch=dequantize_fp4,
    reference=dequantize_fp4_reference,
    fake=lambda words, scale, global_scale, inputs, dtype: words.new_empty(scale.shape[1], inputs, dtype=dtype),
)


RECORDED: dict[tuple[int, int], tuple[float, ...]] = {
    # (capability, group size): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (90, 16): (3.36, 3.63, 3.62, 3.76, 3.84),
    (90, 32): (2.89, 3.15, 3.2, 3.29, 3.3),
    (80, 16): (3.38, 3.69, 4.43, 6.34),
    (80, 32): (2.9, 3.25, 3.99, 5.98),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, and the dequantizing kernels, for bfloat16."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*i32", "global_scale": "*fp32", "bias": "*bf16", "y": "*bf16",
        "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (capability, group_size), recorded in RECORDED.items():
        shipped = (FEW, SOME, MORE, MANY, PREFILL) if capability == 90 else (FEW, SOME, MORE, MANY_AMPERE)
        for config, instructions in zip(shipped, recorded, strict=True):
            constants = {
                "NVFP4": group_size == NVFP4_GROUP, "BIAS": True, "EVEN_K": True, "ASM": True, "INTERP": False,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config != PREFILL, "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _w4a16_fp4_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * 128,
            )  # fmt: skip
            name = f"w4a16_fp4 g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            representative = (capability, group_size, config) in ((90, 16, FEW), (90, 32, MORE), (80, 16, FEW))
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    plain = {"words": "*i16", "scale": "*i32", "global_scale": "*fp32", "weight": "*bf16"}
    for capability, group_size in RECORDED:
        constants = {"NVFP4": group_size == NVFP4_GROUP, "ASM": True, "INTERP": False}
        variant = Variant(
            _dequantize_fp4_kernel, plain | {"N": "i32", "K": "i32"}, constants, (*plain, "N", "K"),
            num_warps=4, num_stages=3,
        )  # fmt: skip
        made.append(Gate(f"dequantize_fp4 g{group_size}", variant, capability, ""))
    return tuple(made)
