"""4-bit weights times 16-bit activations on the tensor cores: y = x · weightᵀ + bias.

    y[m, n] = Σ (u[n, k] - zero[g, n]) · scale[g, n] · x[m, k] + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. u: codes 0 … 15 of the weight [outputs,
inputs], in `words` as `quant_kernels.words` lays them out. scale: [groups, outputs] of any float type, in groups of 32,
64, a multiple of 128, or all inputs; 16-bit scales are less to read. zero: likewise, and need not be whole;
without one it is 8, the middle. All contiguous. Sums are float32 and rounded once, to the type of x.

The loop is `quant_kernels.packed_dot`, in both of its forms: for few tokens sums of a group are shifted and scaled, for
many each weight is, and becomes the left operand (`swap`).
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
from quant_kernels.packed_dot import packed_dot
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled
from quant_kernels.words import SIGNED_ZERO, pack_words, unpack_words, word_offsets, word_shape


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
def _w4a16_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, y, partials, counters, M, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. EVEN_K: K is a multiple of 128. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
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
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + tl.arange(0, 32)[None, :]
    words_at = words + word_offsets(read_outputs, K)
    total = packed_dot(
        x_at, words_at, scale + read_outputs, zero + read_outputs if ZERO else zero, first, last, N, K,
        4, GROUP, ZERO, EVEN_K, ASM, DTYPE, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip
    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        M = tl.where(complete, M, 0)
    if SWAP:
        total = total.T
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
    split_k, partials, counters = share(config, tiles, steps, x.device)
    _w4a16_kernel[tiles, split_k](
        x, words, scale, zero, bias, y, partials, counters, tokens, outputs, inputs,
        GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None, EVEN_K=inputs % 128 == 0,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW = Config(16, 64, num_warps=2)
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
    if tokens > 512 and hopper:
        return PREFILL
    many = MANY if hopper else MANY_AMPERE
    config = next((few for few in (FEW, SOME, MORE) if tokens <= few.block_m), many)
    return fitted(split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=512))


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
    group_size = group_size_of(scale, inputs)
    expect("words", words, (torch.int16,), word_shape(outputs, inputs), device)
    if zero is not None:
        expect("zero", zero, FLOATS, [groups, outputs], device)
    return group_size


library.register(
    "w4a16(Tensor x, Tensor words, Tensor scale, Tensor? zero=None, Tensor? bias=None) -> Tensor",
    launch=w4a16,
    reference=w4a16_reference,
    fake=lambda x, words, scale, zero=None, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)


RECORDED: dict[tuple[int, int, bool], tuple[float, ...]] = {
    # (capability, group size, zero): instructions per weight of FEW, SOME, MORE, MANY and PREFILL
    (90, 128, False): (1.93, 2.94, 2.87, 3.0, 3.12),
    (90, 64, False): (2.22, 2.98, 3.01, 3.2, 3.12),
    (90, 32, False): (2.83, 3.16, 3.18, 3.52, 3.28),
    (90, 0, False): (1.68, 2.3, 2.34, 2.41, 2.48),
    (90, 128, True): (2.21, 3.3, 3.23, 3.36, 3.46),
    (90, 64, True): (2.85, 3.69, 3.77, 3.86, 3.84),
    (90, 32, True): (4.38, 4.61, 4.68, 4.77, 4.68),
    (90, 0, True): (1.71, 2.84, 2.86, 3.01, 2.95),
    (80, 128, False): (1.84, 2.99, 3.7, 5.89),
    (80, 64, False): (2.23, 3.08, 3.86, 6.02),
    (80, 32, False): (2.81, 3.22, 3.95, 6.33),
    (80, 0, False): (1.66, 2.41, 3.13, 5.14),
    (80, 128, True): (2.24, 3.35, 4.06, 6.16),
    (80, 64, True): (2.93, 3.79, 4.51, 6.69),
    (80, 32, True): (4.3, 4.63, 5.29, 7.69),
    (80, 0, True): (1.66, 2.9, 3.64, 5.7),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, for bfloat16 with scales and zeros of 16 bits."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*bf16", "zero": "*bf16", "bias": "*bf16", "y": "*bf16",
        "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (capability, group_size, zero), recorded in RECORDED.items():
        shipped = (FEW, SOME, MORE, MANY, PREFILL) if capability == 90 else (FEW, SOME, MORE, MANY_AMPERE)
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
            representative = group_size == 128 and not zero and config in (FEW, MANY)
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
