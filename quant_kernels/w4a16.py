"""4-bit weights times 16-bit activations on the tensor cores: y = x · weightᵀ + bias.

    y[m, n] = Σ (u[n, k] - zero[g, n]) · scale[g, n] · x[m, k] + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. u: codes 0 … 15 of the weight [outputs,
inputs], in `words` as `quant_kernels.words` lays them out. scale: [groups, outputs] of any float type, in groups of 32,
64, a multiple of 128, or all inputs; 16-bit scales are less to read. zero: likewise, and need not be whole;
without one it is 8, the middle. All contiguous. Sums are float32 and rounded once, to the type of x.

One kernel in two forms. For few tokens, where there are fewer products than weights, products with code + offset are
summed over a group, then shifted and scaled, in float32: nothing is done per weight but to unpack it. The shift takes
the sum of the group's activations, which tensor cores give almost for nothing as a product with a few columns of ones.
For many tokens (`swap`) weights are shifted and scaled, and are the left operand, which Hopper takes from registers.
offset + zero is taken off before scaling, exactly if whole, so that a weight is rounded once, to the type of x. One
multiply-add would have (16 + zero) · scale rounded to 8 bits, by up to 0.05 steps the same way for a whole group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import sum_splits, workspace
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled
from quant_kernels.words import (
    SIGNED_ZERO,
    TILE_WORDS,
    code_offset,
    pack_words,
    unpack_planes,
    unpack_words,
    word_offsets,
    word_shape,
)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`words`, `scale` and `zero` of signed codes -8 … 7 [outputs, inputs], scale and zero_point [outputs, groups].

    Scales keep their type, zeros take it; zero_point is signed too and of any type, None for 0.
    """
    zero = None if zero_point is None else (zero_point.to(scale.dtype) + SIGNED_ZERO).T.contiguous()
    return pack_words(codes + SIGNED_ZERO), scale.T.contiguous(), zero


def w4a16_reference(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded once at the end."""
    (groups, outputs), inputs = scale.shape, x.shape[1]
    codes = unpack_words(words, outputs, inputs).float().view(outputs, groups, -1)
    shifted = codes - (SIGNED_ZERO if zero is None else zero.float().T.unsqueeze(2))
    weight = (shifted * scale.float().T.unsqueeze(2)).view(outputs, inputs)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@triton.jit
def dequantize_plane(plane, s, z, DTYPE: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """plane, code + OFFSET [outputs, 32] → code - zero, times the scale if `SCALE`. s, z: float32 [outputs]."""
    if ZERO:
        whole = tl.floor(z + 0.5)
        shifted = plane - (whole + OFFSET).to(DTYPE)[:, None]
        if SCALE:
            weight = tl.fma(shifted, s.to(DTYPE)[:, None], ((whole - z) * s).to(DTYPE)[:, None])
        else:
            weight = shifted + (whole - z).to(DTYPE)[:, None]
    else:
        weight = plane - (OFFSET + 8)
        if SCALE:
            weight = weight * s.to(DTYPE)[:, None]
    return weight


@triton.jit
def _w4a16_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, y, partials, counters, M, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. EVEN_K: K is a multiple of 128. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
    OFFSET: tl.constexpr = code_offset(DTYPE)
    PLANES: tl.constexpr = GROUP // 32 if GROUP == 32 or GROUP == 64 else 4  # of a tile, that share a scale
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
    s = tl.load(scale + read_outputs).to(tl.float32)
    z = tl.load(zero + read_outputs).to(tl.float32) if ZERO else tl.full((BLOCK_N,), 8.0, tl.float32)
    # Of columns of ones, twice as many as tokens: Triton lays warps along the longer side of the first product it sees,
    # and all products must have them along the outputs.
    ones = tl.full((32, 2 * BLOCK_M), 0.5 / BLOCK_M, DTYPE)
    sums = tl.zeros((BLOCK_M, 2 * BLOCK_M), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        planes = unpack_planes(tl.load(words_at + step * TILE_WORDS, eviction_policy="evict_first"), DTYPE, ASM)
        for plane in tl.static_range(4):
            start = step * 128 + plane * 32
            if GROUP > 0 and plane % PLANES == 0:
                group = step // (GROUP // 128) if GROUP >= 128 else step * (4 // PLANES) + plane // PLANES
                if not EVEN_K:
                    group = tl.minimum(group, K // GROUP - 1)
                s = tl.load(scale + group.to(tl.int64) * N + read_outputs).to(tl.float32)
                if ZERO:
                    z = tl.load(zero + group.to(tl.int64) * N + read_outputs).to(tl.float32)
                sums = tl.zeros((BLOCK_M, 2 * BLOCK_M), tl.float32)
                products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if EVEN_K:
                a = tl.load(x_at + start).to(DTYPE)
            else:
                a = tl.load(x_at + start, mask=column < K - start, other=0).to(DTYPE)
            if SWAP:
                weight = dequantize_plane(planes[plane], s, z, DTYPE, OFFSET, GROUP > 0, ZERO)
                total = tl.dot(weight, a.T, total)
            else:
                products = tl.dot(a, planes[plane].T, products)
                sums = tl.dot(a, ones, sums)
                if GROUP > 0 and plane % PLANES == PLANES - 1:
                    total += s[None, :] * (products - (z[None, :] + OFFSET) * tl.sum(sums, 1)[:, None])

    if GROUP == 0 and not SWAP:
        total = products - (z[None, :] + OFFSET) * tl.sum(sums, 1)[:, None]
    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        M = tl.where(complete, M, 0)
    if SWAP:
        total = total.T
    if GROUP == 0:
        total *= s[None, :]
    if BIAS:
        total += tl.load(bias + read_outputs).to(tl.float32)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (outputs < N)[None, :])


def w4a16(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    group_size = _check(x, words, scale, zero, bias)
    (tokens, inputs), outputs = x.shape, scale.shape[1]
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, group_size, x.device)
    tiles, steps = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n), triton.cdiv(inputs, 128)
    split_k = triton.cdiv(steps, triton.cdiv(steps, config.split_k))  # so that no split is empty
    partials, counters = x, x
    if split_k > 1:
        partials, counters = workspace(x.device, tiles * split_k * config.block_m * config.block_n, tiles)
    _w4a16_kernel[tiles, split_k](
        x, words, scale, zero, bias, y, partials, counters, tokens, outputs, inputs,
        GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None, EVEN_K=inputs % 128 == 0,
        ASM=not library.INTERPRETED and torch.version.hip is None, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW = Config(16, 64, num_warps=2)
FEW_GROUPS_OF_32 = Config(16, 64, num_warps=2, swap=True)
"""Groups of 32 are as many as planes: it takes fewer instructions to scale weights."""
SOME = Config(32, 128, num_warps=4, swap=True)
MORE = Config(64, 128, num_warps=4, num_stages=3, swap=True)
MANY = Config(128, 128, num_warps=4, num_stages=3, swap=True)
MANY_AMPERE = Config(128, 128, num_warps=8, num_stages=3, swap=True)
"""Where activations too have to go through registers."""
PREFILL = Config(128, 256, num_warps=8, num_stages=3, swap=True)


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: four blocks per processor where splitting sums can give them."""
    found = tabled("w4a16", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    if tokens <= 16:
        config = FEW_GROUPS_OF_32 if group_size == 32 else FEW
    elif tokens <= 64:
        config = SOME if tokens <= 32 else MORE
    else:
        config = (PREFILL if tokens > 512 else MANY) if hopper else MANY_AMPERE
    if config == PREFILL:
        return config
    config = split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=512)
    return fitted(config)


def _check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> int:
    """The group size, 0 for all inputs. Raises ValueError."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    group_size = check_weight(words, scale, zero, x.shape[1], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [scale.shape[1]], x.device)
    return group_size


def check_weight(words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, device: torch.device) -> int:
    """The group size of a weight, 0 for all inputs. Raises ValueError."""
    expect("scale", scale, FLOATS, [None, None], device)
    groups, outputs = scale.shape
    if not groups or not inputs or inputs % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide the {inputs} inputs of x. Pad the weight")
    group_size = inputs // groups
    if groups > 1 and group_size not in (32, 64) and group_size % 128:
        raise ValueError(f"scale has groups of {group_size} inputs: 32, 64, multiples of 128 or all {inputs} can be. "
                         "Repeat scales to make groups smaller")  # fmt: skip
    expect("words", words, (torch.int16,), word_shape(outputs, inputs), device)
    if zero is not None:
        expect("zero", zero, FLOATS, [groups, outputs], device)
    return group_size if groups > 1 else 0


library.register(
    "w4a16(Tensor x, Tensor words, Tensor scale, Tensor? zero=None, Tensor? bias=None) -> Tensor",
    launch=w4a16,
    reference=w4a16_reference,
    fake=lambda x, words, scale, zero=None, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)


RECORDED: dict[tuple[int, int, bool], tuple[float, ...]] = {
    # (capability, group size, zero): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (90, 128, False): (2.12, 2.94, 2.87, 3.0, 3.12),
    (90, 64, False): (2.82, 3.03, 3.05, 3.24, 3.17),
    (90, 32, False): (2.96, 3.3, 3.32, 3.48, 3.33),
    (90, 0, False): (1.73, 2.3, 2.34, 2.45, 2.48),
    (90, 128, True): (2.23, 3.3, 3.23, 3.36, 3.46),
    (90, 64, True): (3.19, 3.72, 3.8, 3.89, 3.88),
    (90, 32, True): (4.43, 4.69, 4.77, 4.86, 4.8),
    (90, 0, True): (1.73, 2.84, 2.85, 2.98, 2.95),
    (80, 128, False): (2.2, 2.99, 3.7, 5.89),
    (80, 64, False): (2.87, 3.13, 3.91, 6.14),
    (80, 32, False): (2.98, 3.3, 4.12, 6.56),
    (80, 0, False): (1.75, 2.41, 3.13, 5.19),
    (80, 128, True): (2.32, 3.35, 4.06, 6.16),
    (80, 64, True): (3.18, 3.82, 4.52, 6.88),
    (80, 32, True): (4.45, 4.73, 5.42, 8.12),
    (80, 0, True): (1.76, 2.9, 3.64, 5.69),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, for bfloat16 with scales and zeros of 16 bits."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*bf16", "zero": "*bf16", "bias": "*bf16", "y": "*bf16",
        "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (capability, group_size, zero), recorded in RECORDED.items():
        few = FEW_GROUPS_OF_32 if group_size == 32 else FEW
        shipped = (few, SOME, MORE, MANY, PREFILL) if capability == 90 else (few, SOME, MORE, MANY_AMPERE)
        for config, instructions in zip(shipped, recorded, strict=True):
            constants = {
                "GROUP": group_size, "ZERO": zero, "BIAS": True, "EVEN_K": True, "ASM": True, "INTERP": False,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config != PREFILL,
                "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _w4a16_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * 128,
            )  # fmt: skip
            name = f"w4a16{'_zero' * zero} g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            representative = group_size == 128 and not zero and config in (FEW, MORE, MANY)
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
