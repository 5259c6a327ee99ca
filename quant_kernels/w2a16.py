"""2-bit weights times 16-bit activations on the tensor cores: y = x · weightᵀ + bias.

    y[m, n] = Σ (u[n, k] - zero[g, n]) · scale[g, n] · x[m, k] + bias[n], g = k // group size

x: float16 or bfloat16 [tokens, inputs]; float32 too in Triton's interpreter. u: codes 0 … 3 of the weight [outputs,
inputs], a quarter of a byte each, in `words` as `quant_kernels.two_bit_words` lays them out. scale: [groups, outputs]
of any float type, in groups of 32, 64, a multiple of 128, or all inputs; 16-bit scales are less to read, and in small
groups a good part of it. zero: likewise, and need not be whole; without one it is 2. All contiguous. Sums are float32
and rounded once, to the type of x.

The loop is `quant_kernels.packed_dot`, in both of its forms. A weight that takes half as long to read leaves time for
half as many instructions, which is why three planes share a shift, and why nothing else is done per weight.
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
from quant_kernels.two_bit_words import (
    SIGNED_ZERO,
    TILE_COLUMNS,
    pack_two_bits,
    two_bit_offsets,
    two_bit_shape,
    unpack_two_bits,
)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`words`, `scale` and `zero` of signed codes -2 … 1 [outputs, inputs], scale and zero_point [outputs, groups].

    Scales keep their type, zeros take it; zero_point is signed too and of any type, None for 0.
    """
    zero = None if zero_point is None else (zero_point.to(scale.dtype) + SIGNED_ZERO).T.contiguous()
    return pack_two_bits(codes + SIGNED_ZERO), scale.T.contiguous(), zero


def w2a16_reference(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded once at the end."""
    (groups, outputs), inputs = scale.shape, x.shape[1]
    codes = unpack_two_bits(words, outputs, inputs).float().view(outputs, groups, -1)
    shifted = codes - (SIGNED_ZERO if zero is None else zero.float().T.unsqueeze(2))
    weight = (shifted * scale.float().T.unsqueeze(2)).view(outputs, inputs)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


@triton.jit
def _w2a16_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, y, partials, counters, M, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. EVEN_K: K is a multiple of 256. INTERP: compute in float32."""
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
    steps = tl.cdiv(tl.cdiv(K, 256), splits)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, 256))
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + tl.arange(0, 32)[None, :]
    words_at = words + two_bit_offsets(read_outputs, K)
    total = packed_dot(
        x_at, words_at, scale + read_outputs, zero + read_outputs if ZERO else zero, first, last, N, K,
        2, GROUP, ZERO, EVEN_K, ASM, DTYPE, BLOCK_M, BLOCK_N, SWAP,
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


def w2a16(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    group_size = _check(x, words, scale, zero, bias)
    (tokens, inputs), outputs = x.shape, scale.shape[1]
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, group_size, x.device)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
    steps = triton.cdiv(inputs, TILE_COLUMNS)
    split_k, partials, counters = share(config, tiles, steps, x.device)
    _w2a16_kernel[tiles, split_k](
        x, words, scale, zero, bias, y, partials, counters, tokens, outputs, inputs,
        GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None, EVEN_K=inputs % TILE_COLUMNS == 0,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW = Config(16, 64, 256, num_warps=2, num_stages=3)
SOME = Config(32, 128, 256, num_warps=4, num_stages=3, swap=True)
MORE = Config(64, 128, 256, num_warps=4, num_stages=2, swap=True)
MORE_AMPERE = Config(64, 128, 256, num_warps=8, num_stages=2, swap=True)
"""Where activations too have to go through registers; there it is for more tokens, too, because an AMD GPU has no room
for more activations."""
MANY = Config(128, 128, 256, num_warps=8, num_stages=2, swap=True)
"""For more than 64 tokens. Blocks of 256 outputs would spill."""


def configuration(tokens: int, outputs: int, inputs: int, group_size: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: four blocks per processor where splitting sums can give them."""
    found = tabled("w2a16", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    more, many = (MORE, MANY) if hopper else (MORE_AMPERE, MORE_AMPERE)
    config = next((few for few in (FEW, SOME, more) if tokens <= few.block_m), many)
    return fitted(split_sums(config, tokens, outputs, inputs, blocks=4 * processors, least=1024, per_token=32))


def _check(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> int:
    """The group size, 0 for all inputs. Raises ValueError."""
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    expect("scale", scale, FLOATS, [None, None], x.device)
    (groups, outputs), inputs = scale.shape, x.shape[1]
    group_size = group_size_of(scale, inputs)
    expect("words", words, (torch.int16,), two_bit_shape(outputs, inputs), x.device)
    if zero is not None:
        expect("zero", zero, FLOATS, [groups, outputs], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [outputs], x.device)
    return group_size


library.register(
    "w2a16(Tensor x, Tensor words, Tensor scale, Tensor? zero=None, Tensor? bias=None) -> Tensor",
    launch=w2a16,
    reference=w2a16_reference,
    fake=lambda x, words, scale, zero=None, bias=None: x.new_empty(x.shape[0], scale.shape[1]),
)


RECORDED: dict[tuple[int, int, bool], tuple[float, ...]] = {
    # (capability, group size, zero): instructions per weight of FEW, SOME, MORE and, on Hopper, MANY
    (90, 128, False): (1.59, 2.49, 2.5, 3.41),
    (90, 64, False): (1.92, 2.59, 2.61, 3.51),
    (90, 32, False): (2.48, 2.78, 2.81, 3.82),
    (90, 0, False): (1.36, 1.89, 1.86, 2.66),
    (90, 128, True): (1.95, 2.88, 2.94, 3.79),
    (90, 64, True): (2.62, 3.34, 3.44, 4.29),
    (90, 32, True): (3.86, 4.18, 4.23, 5.2),
    (90, 0, True): (1.45, 2.34, 2.4, 3.2),
    (80, 128, False): (1.52, 2.64, 3.66),
    (80, 64, False): (1.8, 2.7, 3.88),
    (80, 32, False): (2.48, 2.81, 4.19),
    (80, 0, False): (1.34, 2.03, 2.98),
    (80, 128, True): (1.94, 3.07, 4.09),
    (80, 64, True): (2.51, 3.5, 4.59),
    (80, 32, True): (3.84, 4.25, 5.5),
    (80, 0, True): (1.49, 2.53, 3.47),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums and a bias, for bfloat16 with scales and zeros of 16 bits."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*bf16", "zero": "*bf16", "bias": "*bf16", "y": "*bf16",
        "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for (capability, group_size, zero), recorded in RECORDED.items():
        shipped = (FEW, SOME, MORE, MANY) if capability == 90 else (FEW, SOME, MORE_AMPERE)
        for config, instructions in zip(shipped, recorded, strict=True):
            constants = {
                "GROUP": group_size, "ZERO": zero, "BIAS": True, "EVEN_K": True, "ASM": True, "INTERP": False,
                "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": True, "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _w2a16_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * TILE_COLUMNS,
            )  # fmt: skip
            name = f"w2a16{'_zero' * zero} g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            representative = group_size == 64 and not zero and config in (FEW, MORE)
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
