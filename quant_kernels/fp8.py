"""float8_e4m3fn weights times activations of the same type, or of 16 bits.

`fp8`: y[m, n] = x_scale[m] · scale[n] · Σ x[m, k] · weight[n, k] + bias[n]

x: float8_e4m3fn [tokens, inputs]; x_scale: float32 [tokens], or [1] for all. weight: float8_e4m3fn [outputs, inputs];
scale: float32 [outputs], or [1]. Or both are scaled in groups, as DeepSeek-V3 has it (arXiv 2412.19437): x_scale
[tokens, ceil(inputs / 128)] and scale [ceil(outputs / 128), ceil(inputs / 128)], a scale for 128 × 128 weights, applied
to the sum over each 128 inputs. All contiguous; inputs should be a multiple of 16. Needs NVIDIA from Ada on.

Hopper's tensor cores keep about 14 bits of a sum of such products. So they add up 128 inputs at most, and these sums
are added in float32. Their instructions for it have 64 rows, and with fewer Triton quietly multiplies in float16: for
few tokens the weights are the rows (`swap`).

`w8a16_fp8`: y[m, n] = scale[n] · Σ x[m, k] · weight[n, k] + bias[n], anywhere

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. scale: as above. The weight comes as
words, int16 [outputs, ceil(inputs / 128) · 64] by `pack_words`: word i of each 64 has the codes of inputs i and 64 + i
of 128, past the end zeros; the bits of one stand where bfloat16 has them, those of the other a shift by 4 away. So
masks and shifts unpack them, of two words at a time, and subnormals come out right too. The exponent is then off by
120, which a product puts right, or in float16 by 8, which is left to the end. Sums are float32.

The codes 0x7f and 0xff are NaN. In `fp8` they make their results NaN; `pack_words` refuses them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.fp8_quant import GROUP, has_fp8
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled

FP8 = torch.float8_e4m3fn


def pack_words(weight: Tensor) -> Tensor:
    """The words of a weight, float8_e4m3fn [outputs, inputs]. Raises ValueError where it has NaN."""
    code = weight.view(torch.uint8)
    if bool((code & 127 == 127).any()):
        raise ValueError("weight has codes 0x7f or 0xff, which are NaN. Quantize it with saturation")
    halves = F.pad(code, (0, -code.shape[1] % GROUP)).view(len(code), -1, 2, 64).to(torch.int16)
    low, high = halves.unbind(2)
    words = (low & 0x80) << 8 | (low & 0x7F) << 4 | (high & 0x80) << 4 | (high & 0x70) << 8 | high & 0x0F
    return words.reshape(len(code), -1)


def unpack_words(words: Tensor, inputs: int) -> Tensor:
    """The inverse of `pack_words`."""
    low = words >> 8 & 0x80 | words >> 4 & 0x7F
    high = words >> 4 & 0x80 | words >> 8 & 0x70 | words & 0x0F
    code = torch.stack([half.view(len(words), -1, 64) for half in (low, high)], dim=2).view(len(words), -1)
    return code[:, :inputs].to(torch.uint8).view(FP8)


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """In float64; scale: of all, of rows, or of columns in groups of 128, for one row or 128."""
    if scale.ndim == 2:
        (rows, columns), group_rows = codes.shape, 1 if len(scale) == len(codes) else GROUP
        scale = scale.repeat_interleave(group_rows, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]
    return codes.double() * scale.double().view(len(scale), -1)


def fp8_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """In float64."""
    return F.linear(_scaled(x, x_scale), _scaled(weight, scale), None if bias is None else bias.double()).to(dtype)


def w8a16_fp8_reference(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64."""
    weight = _scaled(unpack_words(words, x.shape[1]), scale)
    return F.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)


Bits = tuple[tuple[int, int], ...]
"""A shift to the left and a mask of 16 bits each."""


def _assembly(low: Bits, high: Bits, finish: str) -> str:
    """PTX: two words in operand 2 → operands 0 and 1, `finish` of the bits `low` and `high` take from them."""
    lines = ["{", ".reg .b32 t, v, scale, zero;", "mov.b32 scale, 0x7B807B80;", "mov.b32 zero, 0x80008000;"]
    for operand, bits in enumerate((low, high)):
        for index, (shift, mask) in enumerate(bits):
            word = "t" if shift else "$2"
            if shift:
                lines.append(f"{'shl' if shift > 0 else 'shr'}.b32 t, $2, {abs(shift)};")
            name, rest = ("lop3.b32", ", v, 0xEA") if index else ("and.b32", "")  # 0xEA: word & mask | v
            lines.append(f"{name} v, {word}, {mask * 0x10001:#010x}{rest};")
        lines.append(finish.format(operand))
    return "\n".join([*lines, "}"])


BFLOAT16_ASSEMBLY = tl.constexpr(
    _assembly(((0, 0x87F0),), ((4, 0x80F0), (-4, 0x0700)), "fma.rn.bf16x2 ${}, v, scale, zero;")
)
"""The value, by a product with 2¹²⁰; adding -0 changes nothing."""
FLOAT16_ASSEMBLY = tl.constexpr(
    _assembly(((3, 0x3F80), (0, 0x8000)), ((7, 0x0780), (-1, 0x3800), (4, 0x8000)), "mov.b32 ${}, v;")
)
"""The value / 256."""


@triton.jit
def unpack_halves(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the values of their low and their high codes, over 256 if `ASM` (for NVIDIA) and float16."""
    if ASM and DTYPE == tl.bfloat16:  # noqa: SIM300
        halves = tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif ASM:
        halves = tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        wide = words.to(tl.int32)
        low = (wide & 0x87F0) << 16
        high = (((wide << 4) & 0x80F0) | ((wide >> 4) & 0x0700)) << 16
        factor = 1329227995784915872903807060280344576.0  # 2¹²⁰
        halves = (
            (low.to(tl.float32, bitcast=True) * factor).to(DTYPE),
            (high.to(tl.float32, bitcast=True) * factor).to(DTYPE),
        )
    return halves


@triton.jit
def _load(at, column, left, DTYPE: tl.constexpr, POLICY: tl.constexpr, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is at columns 0 … `left`, in `DTYPE`. Triton's interpreter takes NaN of float8_e4m3fn for 480."""
    if EVEN_K:
        loaded = tl.load(at, eviction_policy=POLICY)
    else:
        loaded = tl.load(at, mask=column < left, other=0.0, eviction_policy=POLICY)
    value = loaded.to(DTYPE)
    if DTYPE == tl.float32 and loaded.dtype == tl.float8e4nv:  # noqa: SIM300
        value = tl.where(tl.abs(value) == 480.0, float("nan"), value)
    return value


@triton.jit
def _fp8_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, bias, y, partials, counters, M, N, K,
    WORDS: tl.constexpr, GROUPED: tl.constexpr, X_STRIDE: tl.constexpr, STRIDE: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """WORDS: `w8a16_fp8`. X_STRIDE, STRIDE: from one scale to the next, 1, or 0 where there is but one. EVEN_K: K is a
    multiple of 128. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
    WIDTH: tl.constexpr = 64 if WORDS else 128
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, 8)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last one is read again: a mask would cost an instruction per load in the loop. Stores are masked.
    read_tokens = tl.minimum(tokens, M - 1)
    read_outputs = tl.minimum(outputs, N - 1)

    groups = tl.cdiv(K, 128)
    splits = tl.num_programs(1)
    steps = tl.cdiv(groups, splits)
    first = split * steps
    last = tl.minimum(first + steps, groups)
    tl.assume(first < last)  # the launcher sees to it
    column = tl.arange(0, WIDTH)[None, :]
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + column
    weight_at = weight + read_outputs.to(tl.int64)[:, None] * (groups * 64 if WORDS else K) + column
    if GROUPED:
        tl.static_assert(BLOCK_N <= 128)
        scale_at = scale + (tile_n * BLOCK_N // 128).to(tl.int64) * groups  # the same for all these outputs
        if not WORDS:
            x_scale_at = x_scale + read_tokens.to(tl.int64) * groups
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        start = step * 128
        a = _load(x_at + start, column, K - start, DTYPE, "", EVEN_K)
        if WORDS:
            words = tl.load(weight_at + step * 64, eviction_policy="evict_first")
            w, w_high = unpack_halves(words, DTYPE, ASM)
            a_high = _load(x_at + start + 64, column, K - start - 64, DTYPE, "", EVEN_K)
            product = tl.zeros_like(total) if GROUPED else total
            product = tl.dot(w, a.T, product) if SWAP else tl.dot(a, w.T, product)
            product = tl.dot(w_high, a_high.T, product) if SWAP else tl.dot(a_high, w_high.T, product)
            if GROUPED:
                total += product * tl.load(scale_at + step)
            else:
                total = product
        else:
            w = _load(weight_at + start, column, K - start, DTYPE, "evict_first", EVEN_K)
            if GROUPED:
                s = tl.load(x_scale_at + step) * tl.load(scale_at + step)
                total += tl.dot(w, a.T) * s[None, :] if SWAP else tl.dot(a, w.T) * s[:, None]
            elif SWAP:
                total = tl.dot(w, a.T, total, max_num_imprecise_acc=128)
            else:
                total = tl.dot(a, w.T, total, max_num_imprecise_acc=128)

    if SWAP:
        total = total.T
    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        M = tl.where(complete, M, 0)
    if WORDS and ASM and DTYPE == tl.float16:  # noqa: SIM300
        total *= 256.0
    if not GROUPED:
        total *= tl.load(scale + read_outputs * STRIDE)[None, :]
        if not WORDS:
            total *= tl.load(x_scale + read_tokens * X_STRIDE)[:, None]
    if BIAS:
        total += tl.load(bias + read_outputs).to(tl.float32)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (outputs < N)[None, :])


def fp8(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    expect("x", x, (FP8,), [None, None], x.device)
    (tokens, inputs), device = x.shape, x.device
    if not library.INTERPRETED and device.type == "cuda" and not has_fp8(device):
        raise ValueError(f"x is on {device}, which cannot multiply {FP8}. Keep x in 16 bits and use w8a16_fp8")
    expect("weight", weight, (FP8,), [None, inputs], device)
    grouped = _check(x, weight, scale, bias)
    expect("x_scale", x_scale, (torch.float32,), [tokens, triton.cdiv(inputs, GROUP)] if grouped
           else [1 if x_scale.shape == (1,) else tokens], device)  # fmt: skip
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: results are {', '.join(map(str, FLOATS))}")
    return _launch(x, x_scale, weight, scale, bias, dtype)


def w8a16_fp8(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    expect("words", words, (torch.int16,), [None, triton.cdiv(x.shape[1], GROUP) * 64], x.device)
    _check(x, words, scale, bias)
    return _launch(x, None, words, scale, bias, x.dtype)


def _launch(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (tokens, inputs), outputs, words = x.shape, weight.shape[0], x_scale is None
    y = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, words, scale.ndim == 2, x.device)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    steps = triton.cdiv(inputs, GROUP)
    split_k, partials, counters = share(config, tiles, steps, x.device)
    _fp8_kernel[tiles, split_k](
        x, x_scale, weight, scale, bias, y, partials, counters, tokens, outputs, inputs,
        WORDS=words, GROUPED=scale.ndim == 2, X_STRIDE=int(x_scale is not None and x_scale.numel() > 1),
        STRIDE=int(scale.numel() > 1), BIAS=bias is not None, EVEN_K=inputs % GROUP == 0,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW, SOME, MORE, MANY = (
    Config(16, 128, num_warps=4, swap=True),
    Config(32, 128, num_warps=4, swap=True),
    Config(64, 128, num_warps=4),
    Config(128, 128, num_warps=8, num_stages=3),
)
"""Of `fp8`, for up to 16, 32 and 64 tokens, and more."""
PREFILL = Config(128, 256, num_warps=8, swap=True)
"""For more than 512 tokens on Hopper. It has no registers left to split sums, or to scale those of groups."""
FEW_16, SOME_16, MORE_16, MANY_16 = (
    Config(16, 64, num_warps=2),
    Config(32, 128, num_warps=4, swap=True),
    Config(64, 128, num_warps=4, num_stages=3, swap=True),
    Config(128, 128, num_warps=8, num_stages=3, swap=True),
)
"""Of `w8a16_fp8`."""


def configuration(tokens: int, outputs: int, inputs: int, words: bool, grouped: bool, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: sums are split until each processor has eight warps.

    words: of `w8a16_fp8`.
    """
    found = tabled("w8a16_fp8" if words else "fp8", device, outputs, inputs, GROUP * grouped, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    if tokens > 512 and hopper and not words and not grouped:
        return PREFILL
    *few, many = (FEW_16, SOME_16, MORE_16, MANY_16) if words else (FEW, SOME, MORE, MANY)
    config = next((each for each in few if tokens <= each.block_m), many)
    if tokens <= 512:
        blocks = triton.cdiv(8 * processors, config.num_warps)
        config = split_sums(config, tokens, outputs, inputs, blocks=blocks, least=1024)
    return fitted(config)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether scales are of groups. Raises ValueError."""
    inputs, outputs = x.shape[1], weight.shape[0]
    if not inputs:
        raise ValueError(f"x has shape {[*x.shape]}, which leaves rows without values. They need one or more")
    grouped = scale.ndim == 2
    of_groups = [triton.cdiv(outputs, GROUP), triton.cdiv(inputs, GROUP)]
    of_rows = [1 if scale.shape == (1,) else outputs]
    expect("scale", scale, (torch.float32,), of_groups if grouped else of_rows, x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [outputs], x.device)
    return grouped


library.register(
    "fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    launch=fp8,
    reference=fp8_reference,
    fake=lambda x, x_scale, weight, scale, bias, dtype: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype),
)
library.register(
    "w8a16_fp8(Tensor x, Tensor words, Tensor scale, Tensor? bias=None) -> Tensor",
    launch=w8a16_fp8,
    reference=w8a16_fp8_reference,
    fake=lambda x, words, scale, bias=None: x.new_empty(x.shape[0], words.shape[0]),
)


RECORDED: dict[tuple[int, str, bool], tuple[float, ...]] = {
    # (capability, activations, grouped): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (90, "fp8e4nv", False): (1.05, 1.2, 1.26, 2.34, 1.96),
    (90, "fp8e4nv", True): (1.1, 1.52, 1.37, 2.59),
    (90, "bf16", False): (2.52, 2.65, 2.71, 3.45),
    (90, "bf16", True): (2.73, 2.98, 3.27, 4.55),
    (90, "fp16", False): (3.02, 3.24, 3.47, 3.95),
    (80, "bf16", False): (2.55, 2.88, 3.66, 5.67),
    (80, "bf16", True): (2.72, 3.16, 4.2, 6.88),
    (80, "fp16", False): (3.05, 3.38, 4.16, 6.17),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias."""
    made = []
    for (capability, activations, grouped), recorded in RECORDED.items():
        words = activations != "fp8e4nv"
        pointers = {
            "x": f"*{activations}", "x_scale": "*fp32", "weight": "*i16" if words else f"*{activations}",
            "scale": "*fp32", "bias": "*bf16", "y": f"*{activations}" if words else "*bf16",
            "partials": "*fp32", "counters": "*i32",
        }  # fmt: skip
        shipped = (FEW_16, SOME_16, MORE_16, MANY_16) if words else (FEW, SOME, MORE, MANY, PREFILL)
        for config, instructions in zip(shipped, recorded, strict=False):
            constants = {
                "WORDS": words, "GROUPED": grouped, "X_STRIDE": 1, "STRIDE": 1, "BIAS": True, "EVEN_K": True,
                "ASM": True, "INTERP": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                "SPLIT": config != PREFILL, "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _fp8_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * GROUP,
            )  # fmt: skip
            operator = f"w8a16_fp8 {activations}" if words else "fp8"
            name = f"{operator}{' grouped' * grouped} {config.block_m}x{config.block_n}"
            wide = "HGMMA" if words and config != FEW_16 else "HMMA" if words else "QGMMA"
            opcode = wide if capability == 90 else "HMMA"
            representative = capability == 90 and (config == FEW or (activations, config) == ("bf16", MORE_16))
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
