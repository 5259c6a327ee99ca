"""8-bit weights times 8-bit activations on the integer tensor cores.

    y[m, n] = x_scale[m] · scale[n] · Σ (x[m, k] - x_zero[m]) · weight[n, k] + bias[n]

x: int8 [tokens, inputs], with an x_scale (float32) and, where activations are quantized asymmetrically, an x_zero
(int32, -128 … 127) per token, or one for all: [tokens] or [1] each. weight: int8 [outputs, inputs], with a scale
(float32) per output. With x_zero come weight_sums (int32 [outputs], the sum of each row of weight): x goes into the
product as it is, and x_zero · weight_sums is taken off at the end. All contiguous: both operands have the inputs they
are summed over side by side, as tensor cores read them, so that nothing at all is done per weight. Inputs should be a
multiple of 16; rows of other lengths are read a byte at a time.

Sums are int32 and exact, whatever the order, the zero point included, so splitting them changes nothing. Only the
scales and the bias round: in float32, then to the type of the result, float16, bfloat16 or float32. Triton's
interpreter truncates to bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, fitted, gpu_of, split_sums, tabled

MAX_INPUTS = (2**31 - 1) // (128 * 128)
MAX_INPUTS_ZERO = (2**31 - 1) // (128 * 255)
"""Beyond these a sum could leave int32."""


def w8a8_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, x_zero: Tensor | None, weight_sums: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """In float64, where sums of integers are exact and the rest all but so."""
    shifted = x.double() if x_zero is None else x.double() - x_zero.double()[:, None]
    y = x_scale.double()[:, None] * scale.double() * (shifted @ weight.double().T)
    return (y if bias is None else y + bias.double()).to(dtype)


@triton.jit
def _w8a8_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, weight, scale, x_zero, weight_sums, bias, y, partials, counters, M, N, K,
    SCALES: tl.constexpr, ZEROS: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """SCALES, ZEROS: from one token's to the next's, 1 or 0. EVEN_K: K is a multiple of BLOCK_K."""
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
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
    tl.assume(first < last)  # the launcher sees to it
    column = tl.arange(0, BLOCK_K)[None, :]
    x_at = x + read_tokens.to(tl.int64)[:, None] * K + column
    weight_at = weight + read_outputs.to(tl.int64)[:, None] * K + column
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.int32)
    for step in range(first, last):
        start = step * BLOCK_K
        if EVEN_K:
            a = tl.load(x_at + start)
            w = tl.load(weight_at + start, eviction_policy="evict_first")
        else:
            a = tl.load(x_at + start, mask=column < K - start, other=0)
            w = tl.load(weight_at + start, mask=column < K - start, other=0, eviction_policy="evict_first")
        left, right = (w, a) if SWAP else (a, w)
        total = tl.dot(left, right.T, total, out_dtype=tl.int32)

    if SWAP:
        total = total.T
    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        M = tl.where(complete, M, 0)
    if ZERO:
        total -= tl.load(x_zero + read_tokens * ZEROS)[:, None] * tl.load(weight_sums + read_outputs)[None, :]
    result = total.to(tl.float32) * tl.load(scale + read_outputs)[None, :]
    result *= tl.load(x_scale + read_tokens * SCALES)[:, None]
    if BIAS:
        result += tl.load(bias + read_outputs).to(tl.float32)[None, :]
    y_at = y + tokens.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=(tokens < M)[:, None] & (outputs < N)[None, :])


def w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, x_zero: Tensor | None, weight_sums: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[tokens, outputs]. Raises ValueError where an argument is not as described above."""
    _check(x, x_scale, weight, scale, x_zero, weight_sums, bias, dtype)
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    y = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    config = configuration(tokens, outputs, inputs, x.device)
    block_k = config.block_k if inputs % config.block_k == 0 else min(128, config.block_k)
    tiles, steps = (
        triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n),
        triton.cdiv(inputs, block_k),
    )
    split_k, partials, counters = share(config, tiles, steps, x.device)
    partials = None if partials is None else partials.view(torch.int32)
    _w8a8_kernel[tiles, split_k](
        x, x_scale, weight, scale, x_zero, weight_sums, bias, y, partials, counters, tokens, outputs, inputs,
        SCALES=int(x_scale.numel() > 1), ZEROS=int(x_zero is not None and x_zero.numel() > 1),
        ZERO=x_zero is not None, BIAS=bias is not None, EVEN_K=inputs % block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, SPLIT=split_k > 1, SWAP=config.swap,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


FEW = Config(16, 64, 256, num_warps=2)
"""On instructions with as few rows. Hopper's have 64 and want four warps, which takes half as many again per weight."""
SOME = Config(32, 128, 128, num_warps=4, swap=True)
MORE = Config(64, 128, 128, num_warps=4, swap=True)
MANY = Config(128, 128, 128, num_warps=4, num_stages=3)
MANY_AMPERE = Config(128, 128, 128, num_warps=8, num_stages=3)
"""Where both operands have to go through registers."""
PREFILL = Config(128, 256, 128, num_warps=8)
"""For more than 512 tokens on Hopper; smaller GPUs have too little shared memory for it."""


def configuration(tokens: int, outputs: int, inputs: int, device: torch.device) -> Config:
    """As measured on this GPU, else by rule of thumb: sums are split until each processor has eight warps."""
    found = tabled("w8a8", device, outputs, inputs, 0, tokens)
    if found is not None:
        return found
    hopper, processors = gpu_of(device)
    many = MANY_AMPERE if not hopper else PREFILL if tokens > 512 else MANY
    config = next((few for few in (FEW, SOME, MORE) if tokens <= few.block_m), many)
    if tokens <= 512:
        blocks = triton.cdiv(8 * processors, config.num_warps)
        config = split_sums(config, tokens, outputs, inputs, blocks=blocks, least=1024)
    return fitted(config)


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, x_zero: Tensor | None, weight_sums: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    expect("x", x, (torch.int8,), [None, None], x.device)
    tokens, inputs = x.shape
    most = MAX_INPUTS if x_zero is None else MAX_INPUTS_ZERO
    if not 1 <= inputs <= most:
        raise ValueError(
            f"x has {inputs} inputs: 1 to {most} are possible, beyond which sums overflow. Split the layer"
        )
    expect("weight", weight, (torch.int8,), [None, inputs], x.device)
    outputs = weight.shape[0]
    expect("x_scale", x_scale, (torch.float32,), [1 if x_scale.shape == (1,) else tokens], x.device)
    expect("scale", scale, (torch.float32,), [outputs], x.device)
    if (x_zero is None) != (weight_sums is None):
        raise ValueError("x_zero and weight_sums need each other. Give both or neither")
    if x_zero is not None and weight_sums is not None:
        expect("x_zero", x_zero, (torch.int32,), [1 if x_zero.shape == (1,) else tokens], x.device)
        expect("weight_sums", weight_sums, (torch.int32,), [outputs], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [outputs], x.device)
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: results are {', '.join(map(str, FLOATS))}")


library.register(
    "w8a8(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? x_zero, Tensor? weight_sums, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    launch=w8a8,
    reference=w8a8_reference,
    fake=lambda x, x_scale, weight, scale, x_zero, weight_sums, bias, dtype: x.new_empty(
        x.shape[0], weight.shape[0], dtype=dtype
    ),
)


RECORDED: dict[int, tuple[tuple[Config, float], ...]] = {
    # capability: instructions per weight of each configuration
    90: ((FEW, 0.64), (SOME, 0.83), (MORE, 0.84), (MANY, 0.91), (PREFILL, 0.85)),
    80: ((FEW, 0.58), (SOME, 0.85), (MORE, 1.18), (MANY_AMPERE, 2.22)),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums where it splits them, zero points and a bias."""
    pointers = {
        "x": "*i8", "x_scale": "*fp32", "weight": "*i8", "scale": "*fp32", "x_zero": "*i32", "weight_sums": "*i32",
        "bias": "*bf16", "y": "*bf16", "partials": "*i32", "counters": "*i32",
    }  # fmt: skip
    made = []
    for capability, recorded in RECORDED.items():
        for config, instructions in recorded:
            constants = {
                "SCALES": 1, "ZEROS": 1, "ZERO": True, "BIAS": True, "EVEN_K": True, "SPLIT": config != PREFILL,
                "SWAP": config.swap, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            }  # fmt: skip
            variant = Variant(
                _w8a8_kernel, pointers | {"M": "i32", "N": "i32", "K": "i32"}, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * config.block_k,
            )  # fmt: skip
            name = f"w8a8 {config.block_m}x{config.block_n}x{config.block_k}"
            opcode = "IGMMA" if capability == 90 and config != FEW else "IMMA"
            made.append(
                Gate(
                    name,
                    variant,
                    capability,
                    opcode,
                    instructions,
                    representative=capability == 90 and config in (FEW, MORE),
                )
            )
    return tuple(made)
