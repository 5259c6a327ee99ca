"""8-bit weights times 16-bit activations on the tensor cores: y = x · weightᵀ + bias.

    y[m, n] = Σ (c[n, k] - zero[g, n]) · scale[g, n] · x[m, k] + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. c: codes -128 … 127, of 5 bits or more, in
`weight`, int8 [outputs, inputs rounded up to 128], with zeros past the end. A row is in one piece; of every 64 inputs,
input r and input 32 + r are neighbours. scale: [groups, outputs] of any float type, in groups of 32, 64, a multiple of
128, or all inputs; 16-bit scales are less to read. zero: likewise, and need not be whole; without one it is 0. All
contiguous. Sums are float32 and rounded once, to the type of x.

Converting to bfloat16 is what costs. Its mantissa has 7 bits, too few to set a code into that of a power of two. But
the lower seven bits m and the sign bit t of a code, which is m - 128t, make two floats: 128 + m with m as the mantissa,
and 128 · (1 + t) with t as the lowest bit of the exponent. The code is their difference, exactly. In float16 it is
1152 + code less 1152. Either is inline assembly on two words of 16 bits, hence the neighbours: a word's low and high
byte belong to two *planes* of 32 consecutive inputs, and threads get bytes where tensor cores want the floats they
become. (Single bytes in their own order have to be moved between lanes of registers first: 3.7 instructions per weight
instead of 2.8, and 6.3 instead of 3.5 with weights as the left operand.) It is elementwise, and therefore right however
words are spread over threads. Elsewhere than on NVIDIA the compiler converts.

One kernel in two forms. For few tokens, where there are fewer products than weights, products with codes are summed
over a group, then shifted and scaled, in float32: nothing is done per weight but to convert it. The shift takes the sum
of the group's activations, which tensor cores give almost for nothing as a product with ones. For many tokens (`swap`)
weights are shifted and scaled, and are the left operand, which Hopper takes from registers. A zero is taken off before
scaling, exactly if whole, so that a weight is rounded once, to the type of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect, group_size_of
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled

PLANE = 32
"""Consecutive inputs whose codes are the low, or the high, bytes of words."""
STEP = 128
"""Inputs of one round of the loop."""


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`weight`, `scale` and `zero` of signed codes [outputs, inputs], scale and zero_point [outputs, groups].

    Scales keep their type, and so do zero points that are floats; integers take that of the scale. None stands for 0.
    """
    padded = F.pad(codes.to(torch.int8), (0, -codes.shape[1] % STEP))
    weight = padded.view(codes.shape[0], padded.shape[1] // (2 * PLANE), 2, PLANE).transpose(2, 3).reshape(padded.shape)
    zero = None
    if zero_point is not None:
        zero = (zero_point if zero_point.is_floating_point() else zero_point.to(scale.dtype)).T.contiguous()
    return weight, scale.T.contiguous(), zero


def unpack(weight: Tensor, inputs: int) -> Tensor:
    """The codes: int8 [outputs, inputs]."""
    outputs, padded = weight.shape
    return weight.view(outputs, padded // (2 * PLANE), PLANE, 2).transpose(2, 3).reshape(outputs, padded)[:, :inputs]


def w8a16_reference(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded once at the end."""
    (groups, outputs), inputs = scale.shape, x.shape[1]
    shifted = unpack(weight, inputs).float().view(outputs, groups, -1)
    if zero is not None:
        shifted = shifted - zero.float().T.unsqueeze(2)
    dequantized = (shifted * scale.float().T.unsqueeze(2)).view(outputs, inputs)
    return F.linear(x.float(), dequantized, None if bias is None else bias.float()).to(x.dtype)


BFLOAT16_ASSEMBLY = tl.constexpr("""{
.reg .b32 high, plus, minus, one;
mov.b32 one, 0x3F803F80;
shr.b32 high, $2, 8;
lop3.b32 plus, $2, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 minus, $2, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, plus, one, minus;
lop3.b32 plus, high, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 minus, high, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $1, plus, one, minus;
}""")
"""Two words in operand 2 → their low bytes and their high bytes as floats. 128 + m and -128 · (1 + t) are both
`byte & mask | power`; an A100 adds them only as a multiply-add, by 1."""
FLOAT16_ASSEMBLY = tl.constexpr("""{
.reg .b32 high, plus, minus;
mov.b32 minus, 0xE480E480;
shr.b32 high, $2, 8;
lop3.b32 plus, $2, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 $0, plus, minus;
lop3.b32 plus, high, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 $1, plus, minus;
}""")
"""`byte & mask ^ power` is 1024 + (code + 128), in ten bits of mantissa."""


@triton.jit
def _planes(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the codes in their low and in their high bytes, in `DTYPE`, which holds them exactly."""
    if ASM and DTYPE == tl.bfloat16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif ASM:
        planes = tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        wide = words.to(tl.int32)
        planes = (((wide << 24) >> 24).to(DTYPE), (wide >> 8).to(DTYPE))
    return planes


@triton.jit
def _dequantize(plane, s, z, DTYPE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes [outputs, 32] → code - zero, times the scale if `SCALE`. s, z: float32 [outputs]."""
    if ZERO:
        whole = tl.floor(z + 0.5)
        shifted = plane - whole.to(DTYPE)[:, None]
        if SCALE:
            weight = tl.fma(shifted, s.to(DTYPE)[:, None], ((whole - z) * s).to(DTYPE)[:, None])
        else:
            weight = shifted + (whole - z).to(DTYPE)[:, None]
    elif SCALE:
        weight = plane * s.to(DTYPE)[:, None]
    else:
        weight = plane
    return weight


@triton.jit
def _w8a16_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, zero, bias, y, partials, counters, M, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. EVEN_K: K is a multiple of 128. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
    PLANES: tl.constexpr = GROUP // 32 if GROUP == 32 or GROUP == 64 else 4  # of a step, that share a scale
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
    words_at = (
        weight.to(tl.pointer_type(tl.int16)) + read_outputs.to(tl.int64)[:, None] * (tl.cdiv(K, 128) * 64) + column
    )
    # A group's scales and zeros are read while the one before is summed: they do not come by way of the pipeline, and
    # each round would wait for memory.
    group = tl.cast(first * 128 // GROUP if GROUP > 0 else 0, tl.int64)
    next_s = tl.load(scale + group * N + read_outputs)
    next_z = tl.load(zero + group * N + read_outputs) if ZERO else next_s
    s = next_s.to(tl.float32)
    z = next_z.to(tl.float32)
    # As many columns of ones as outputs put each sum where its product is. ptxas sees that they are all the same.
    ones = tl.full((32, BLOCK_N), 1.0, DTYPE)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        for plane in tl.static_range(4):
            start = step * 128 + plane * 32
            if plane % 2 == 0:
                words = tl.load(words_at + (step * 64 + plane * 16), eviction_policy="evict_first")
                planes = _planes(words, DTYPE, ASM)
            if GROUP > 0 and plane % PLANES == 0:
                s = next_s.to(tl.float32)
                group = tl.minimum((start + PLANES * 32) // GROUP, K // GROUP - 1).to(tl.int64)
                next_s = tl.load(scale + group * N + read_outputs)
                if ZERO:
                    z = next_z.to(tl.float32)
                    next_z = tl.load(zero + group * N + read_outputs)
                sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if EVEN_K:
                a = tl.load(x_at + start).to(DTYPE)
            else:
                a = tl.load(x_at + start, mask=column < K - start, other=0).to(DTYPE)
            if SWAP:
                total = tl.dot(_dequantize(planes[plane % 2], s, z, DTYPE, GROUP > 0, ZERO), a.T, total)
            else:
                products = tl.dot(a, planes[plane % 2].T, products)
                if ZERO:
                    sums = tl.dot(a, ones, sums)
                if GROUP > 0 and plane % PLANES == PLANES - 1:
                    if ZERO:
                        products -= z[None, :] * sums
                    total += s[None, :] * products

    if GROUP == 0 and not SWAP:
        total = products
        if ZERO:
            total -= z[None, :] * sums
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


def w8a16(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    group_size = _check(x, weight, scale, zero, bias)
    (tokens, inputs), outputs = x.shape, scale.shape[1]
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, group_size, x.device)
    tiles, steps = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n), triton.cdiv(inputs, STEP)
    split_k, partials, counters = share(config, tiles, steps, x.device)
    _w8a16_kernel[tiles, split_k](
        x, weight, scale, zero, bias, y, partials, counters, tokens, outputs, inputs,
        GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None, EVEN_K=inputs % STEP == 0,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW = Config(16, 64, num_warps=2)
FEW_GROUPS_OF_32 = Config(16, 64, num_warps=2, swap=True)
"""Groups of 32 are as many as planes: it takes fewer instructions to scale weights."""
SOME = Config(32, 128, num_warps=4, swap=True)
MORE = Config(64, 128, num_warps=4, num_stages=3, swap=True)
MANY = Config(128, 128, num_warps=4, num_stages=2, swap=True)
"""So that a processor holds two blocks: one converts while the other multiplies."""
MANY_AMPERE = Config(128, 128, num_warps=8, num_stages=2, swap=True)
"""Where activations too have to go through registers. Three stages would not fit all GPUs of the generation."""
PREFILL = Config(128, 256, num_warps=8, num_stages=3, swap=True)


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: four blocks per processor where splitting sums can give them."""
    found = tabled("w8a16", device, outputs, inputs, group_size, tokens)
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
    config = split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=512, per_token=8)
    return fitted(config)


def _check(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> int:
    """The group size, 0 for all inputs. Raises ValueError."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    expect("scale", scale, FLOATS, [None, None], x.device)
    (groups, outputs), inputs = scale.shape, x.shape[1]
    group_size = group_size_of(scale, inputs)
    expect("weight", weight, (torch.int8,), [outputs, triton.cdiv(inputs, STEP) * STEP], x.device)
    if zero is not None:
        expect("zero", zero, FLOATS, [groups, outputs], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [outputs], x.device)
    return group_size


library.register(
    "w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? zero=None, Tensor? bias=None) -> Tensor",
    launch=w8a16,
    reference=w8a16_reference,
    fake=lambda x, weight, scale, zero=None, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)


RECORDED: dict[tuple[int, str, int, bool], tuple[float, ...]] = {
    # (capability, type, group size, zero): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (90, "bf16", 128, False): (2.8, 3.46, 3.52, 3.51, 3.62),
    (90, "bf16", 64, False): (3.09, 3.59, 3.62, 3.63, 3.75),
    (90, "bf16", 32, False): (3.66, 4.04, 4.08, 3.96, 4.05),
    (90, "bf16", 0, False): (2.59, 2.83, 2.88, 2.92, 3.0),
    (90, "bf16", 128, True): (3.15, 4.13, 4.18, 4.19, 4.28),
    (90, "bf16", 64, True): (3.62, 4.62, 4.68, 4.61, 4.75),
    (90, "bf16", 32, True): (5.4, 5.67, 5.68, 5.55, 5.77),
    (90, "bf16", 0, True): (2.81, 3.83, 3.9, 3.92, 4.01),
    (90, "fp16", 128, False): (2.3, 2.95, 3.02, 3.0, 3.12),
    (80, "bf16", 128, False): (2.8, 3.55, 4.17, 6.75),
    (80, "bf16", 64, False): (3.07, 3.67, 4.29, 6.91),
    (80, "bf16", 32, False): (3.55, 3.91, 4.52, 7.44),
    (80, "bf16", 0, False): (2.54, 2.89, 3.51, 5.59),
    (80, "bf16", 128, True): (3.44, 4.23, 4.84, 7.62),
    (80, "bf16", 64, True): (4.04, 4.66, 5.29, 8.16),
    (80, "bf16", 32, True): (5.23, 5.54, 6.2, 9.44),
    (80, "bf16", 0, True): (2.8, 3.85, 4.51, 6.59),
    (80, "fp16", 128, False): (2.29, 3.05, 3.7, 6.23),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, with scales and zeros of the type of activations."""
    made = []
    for (capability, dtype, group_size, zero), recorded in RECORDED.items():
        pointers = {
            "x": f"*{dtype}", "weight": "*i8", "scale": f"*{dtype}", "zero": f"*{dtype}", "bias": f"*{dtype}",
            "y": f"*{dtype}", "partials": "*fp32", "counters": "*i32",
        }  # fmt: skip
        few = FEW_GROUPS_OF_32 if group_size == 32 else FEW
        shipped = (few, SOME, MORE, MANY, PREFILL) if capability == 90 else (few, SOME, MORE, MANY_AMPERE)
        for config, instructions in zip(shipped, recorded, strict=True):
            constants = {
                "GROUP": group_size, "ZERO": zero, "BIAS": True, "EVEN_K": True, "ASM": True, "INTERP": False,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config != PREFILL,
                "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _w8a16_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * STEP,
            )  # fmt: skip
            name = f"w8a16{'_zero' * zero} {dtype} g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            representative = (dtype, group_size, zero) == ("bf16", 128, False) and config in (FEW, MANY)
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
