"""Weights of 2, 3 or 4 bits times 16-bit activations on the tensor cores: y = x · weightᵀ + bias.

    y[m, n] = Σ (u[n, k] - zero[g, n]) · scale[g, n] · x[m, k] + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. u: codes 0 … 2^bits - 1 of the weight
[outputs, inputs], in `words` as `quant_kernels.packed_codes` lays them out. scale: [groups, outputs] of any float type,
in groups of 32, 64, a multiple of 128, or all inputs; 16-bit scales are less to read, and in small groups a good part
of it. zero: likewise, and need not be whole; without one it is 2^(bits - 1), the middle. All contiguous. Sums are
float32 and rounded once, to the type of x.

The loop is `quant_kernels.packed_dot`, in both of its forms: for few tokens sums of a group are shifted and scaled, for
many each weight is, and becomes the left operand (`swap`). A weight that takes half as long to read leaves time for
half as many instructions, which is why what is done per weight is little more than to unpack it.
"""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.dequantize_words import check_weight, dequantize_words_reference
from quant_kernels.gate import Gate, Variant
from quant_kernels.packed_codes import pack_codes, tile_columns
from quant_kernels.packed_dot import packed_dot
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`words`, `scale` and `zero` of signed codes [outputs, inputs], scale and zero_point [outputs, groups].

    Scales keep their type, zeros take it; zero_point is signed too and of any type, None for 0.
    """
    middle = 1 << bits - 1
    zero = None if zero_point is None else (zero_point.to(scale.dtype) + middle).T.contiguous()
    return pack_codes(codes + middle, bits), scale.T.contiguous(), zero


def wna16_reference(
    x: Tensor, words: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded once at the end."""
    weight = dequantize_words_reference(words, scale, zero, x.shape[1], bits, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@triton.jit
def _wna16_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, y, partials, counters, M, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. EVEN_K: K is a multiple of the columns of a tile. INTERP: compute in
    float32."""
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
    tiles_k = tl.cdiv(K, tile_columns(BITS))
    steps = tl.cdiv(tiles_k, splits)
    first = split * steps
    last = tl.minimum(first + steps, tiles_k)
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + tl.arange(0, 32)[None, :]
    total = packed_dot(
        x_at, words, read_outputs, scale, zero, first, last, N, K,
        BITS, GROUP, ZERO, EVEN_K, ASM, DTYPE, BLOCK_M, BLOCK_N, SWAP,
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


def wna16(
    x: Tensor, words: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    group_size = check_weight(words, scale, zero, x.shape[1], bits, x.device)
    (tokens, inputs), outputs = x.shape, scale.shape[1]
    if bias is not None:
        expect("bias", bias, FLOATS, [outputs], x.device)
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, group_size, bits, x.device)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    split_k, partials, counters = share(config, tiles, triton.cdiv(inputs, tile_columns(bits)), x.device)
    _wna16_kernel[tiles, split_k](
        x, words, scale, zero, bias, y, partials, counters, tokens, outputs, inputs,
        BITS=bits, GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None,
        EVEN_K=inputs % tile_columns(bits) == 0, ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


library.register(
    "wna16(Tensor x, Tensor words, Tensor scale, int bits, Tensor? zero=None, Tensor? bias=None) -> Tensor",
    launch=wna16,
    reference=wna16_reference,
    fake=lambda x, words, scale, bits, zero=None, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)


SHIPPED: dict[tuple[int, bool], dict[float, Config]] = {
    # (columns of a tile, on Hopper): up to so many tokens, a configuration
    (128, True): {
        16: Config(16, 64, num_warps=2),
        32: Config(32, 128, swap=True),
        64: Config(64, 128, num_stages=3, swap=True),
        512: Config(128, 128, num_stages=3, swap=True),
        inf: Config(128, 256, num_warps=8, num_stages=3, swap=True),
    },
    (128, False): {
        16: Config(16, 64, num_warps=2),
        32: Config(32, 128, swap=True),
        64: Config(64, 128, num_stages=3, swap=True),
        inf: Config(128, 128, num_warps=8, num_stages=3, swap=True),
    },
    (256, True): {
        16: Config(16, 64, num_warps=2, num_stages=3),
        32: Config(32, 128, num_stages=3, swap=True),
        64: Config(64, 128, num_stages=2, swap=True),
        inf: Config(128, 128, num_warps=8, num_stages=2, swap=True),
    },
    (256, False): {
        16: Config(16, 64, num_warps=2, num_stages=3),
        32: Config(32, 128, num_stages=3, swap=True),
        inf: Config(64, 128, num_warps=8, num_stages=2, swap=True),
    },
}
"""Eight warps where activations too have to go through registers. There 64 tokens are for more, too, because an AMD GPU
has no room for 256 inputs of more. Of the rest, larger blocks would spill."""


def shipped(bits: int, hopper: bool) -> dict[float, Config]:
    """Up to so many tokens, a configuration."""
    return SHIPPED[tile_columns(bits), hopper]


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, bits: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: four blocks per processor where splitting sums can give them, if
    there are registers left to."""
    found = tabled(f"w{bits}a16", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    config = next(config for most, config in shipped(bits, hopper).items() if tokens <= most)
    if config.block_n > 128:
        return config
    least, per_token = 2048 // bits, 64 // bits
    return fitted(split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=least, per_token=per_token))


RECORDED: dict[tuple[int, int, int, bool], tuple[float, ...]] = {
    # (bits, capability, group size, zero): instructions per weight of what is shipped, in its order
    (4, 90, 128, False): (1.93, 2.94, 2.87, 3.0, 3.12),
    (4, 90, 64, False): (2.22, 2.98, 3.01, 3.2, 3.12),
    (4, 90, 32, False): (2.83, 3.16, 3.18, 3.52, 3.28),
    (4, 90, 0, False): (1.68, 2.3, 2.34, 2.41, 2.48),
    (4, 90, 128, True): (2.21, 3.3, 3.23, 3.36, 3.46),
    (4, 90, 64, True): (2.85, 3.69, 3.77, 3.86, 3.84),
    (4, 90, 32, True): (4.38, 4.61, 4.68, 4.77, 4.68),
    (4, 90, 0, True): (1.71, 2.84, 2.86, 3.01, 2.95),
    (4, 80, 128, False): (1.84, 2.99, 3.7, 5.89),
    (4, 80, 64, False): (2.23, 3.08, 3.86, 6.02),
    (4, 80, 32, False): (2.81, 3.22, 3.95, 6.33),
    (4, 80, 0, False): (1.66, 2.41, 3.13, 5.14),
    (4, 80, 128, True): (2.24, 3.35, 4.06, 6.16),
    (4, 80, 64, True): (2.93, 3.79, 4.51, 6.69),
    (4, 80, 32, True): (4.3, 4.63, 5.29, 7.69),
    (4, 80, 0, True): (1.66, 2.9, 3.64, 5.7),
    (3, 90, 128, False): (2.06, 3.02, 3.05, 3.95),
    (3, 90, 64, False): (2.35, 3.11, 3.15, 4.12),
    (3, 90, 32, False): (2.98, 3.3, 3.36, 4.41),
    (3, 90, 0, False): (1.88, 2.4, 2.41, 3.23),
    (3, 90, 128, True): (2.49, 3.35, 3.43, 4.31),
    (3, 90, 64, True): (2.99, 3.78, 3.85, 4.77),
    (3, 90, 32, True): (4.45, 4.7, 4.83, 5.77),
    (3, 90, 0, True): (2.06, 2.88, 3.02, 3.73),
    (3, 80, 128, False): (2.07, 3.16, 4.22),
    (3, 80, 64, False): (2.38, 3.23, 4.42),
    (3, 80, 32, False): (3.0, 3.34, 4.73),
    (3, 80, 0, False): (1.91, 2.55, 3.53),
    (3, 80, 128, True): (2.58, 3.56, 4.6),
    (3, 80, 64, True): (2.99, 3.94, 5.05),
    (3, 80, 32, True): (4.34, 4.75, 6.05),
    (3, 80, 0, True): (2.11, 3.07, 4.03),
    (2, 90, 128, False): (1.59, 2.49, 2.5, 3.41),
    (2, 90, 64, False): (1.92, 2.59, 2.61, 3.51),
    (2, 90, 32, False): (2.48, 2.78, 2.81, 3.82),
    (2, 90, 0, False): (1.36, 1.89, 1.86, 2.66),
    (2, 90, 128, True): (1.95, 2.88, 2.94, 3.79),
    (2, 90, 64, True): (2.62, 3.34, 3.44, 4.29),
    (2, 90, 32, True): (3.86, 4.18, 4.23, 5.2),
    (2, 90, 0, True): (1.45, 2.34, 2.4, 3.2),
    (2, 80, 128, False): (1.52, 2.64, 3.66),
    (2, 80, 64, False): (1.8, 2.7, 3.88),
    (2, 80, 32, False): (2.48, 2.81, 4.19),
    (2, 80, 0, False): (1.34, 2.03, 2.98),
    (2, 80, 128, True): (1.94, 3.07, 4.09),
    (2, 80, 64, True): (2.51, 3.5, 4.59),
    (2, 80, 32, True): (3.84, 4.25, 5.5),
    (2, 80, 0, True): (1.49, 2.53, 3.47),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, for bfloat16 with scales and zeros of 16 bits."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*bf16", "zero": "*bf16", "bias": "*bf16", "y": "*bf16",
        "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (bits, capability, group_size, zero), recorded in RECORDED.items():
        for config, instructions in zip(shipped(bits, capability == 90).values(), recorded, strict=True):
            constants = {
                "BITS": bits, "GROUP": group_size, "ZERO": zero, "BIAS": True, "EVEN_K": True, "ASM": True,
                "INTERP": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config.block_n <= 128,
                "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _wna16_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * tile_columns(bits),
            )  # fmt: skip
            name = f"w{bits}a16{'_zero' * zero} g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            sizes = (16, 64) if capability == 90 else (16,) if bits == 3 else (64,)
            representative = group_size == 128 and not zero and config.block_m in sizes
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
