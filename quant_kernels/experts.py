"""Mixtures of experts with 4-bit weights and 16-bit activations: every pair of a token and one of its experts.

    y[t, i] = routing_weights[t, i] · (x[r] · weight[e]ᵀ + bias[e]), e = experts[t, i]

experts: int32 or int64 [tokens, top_k], which expert the i-th of a token is; tokens · top_k *pairs*. x: float16 or
bfloat16 [tokens, inputs], one row for all pairs of a token; or [tokens · top_k, inputs], where each pair has its own,
as between two layers of an expert. words, scale, zero, bias: of `quant_kernels.wna16`, with a leading axis of experts.
routing_weights: float32 [tokens, top_k], 1 if not given. y: [tokens, top_k, outputs], in the type of x, or with
`combine` [tokens, outputs], its sum over top_k, again rounded to that type. An expert that does not exist, as one that
is kept elsewhere, gives zeros.

Pairs are sorted by expert, on the device, and cut into tiles of at most BLOCK_M pairs of one expert. How many tiles
there will be is known only there, so as many blocks start as there can be at most, and those without a tile end at
once. Weights of experts without tokens are not read. A tile is computed as in `wna16`, in `quant_kernels.packed_dot`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library, wna16
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.dequantize_words import check_weight
from quant_kernels.gate import Gate, Variant
from quant_kernels.packed_dot import packed_dot
from quant_kernels.split_k import share, sum_splits
from quant_kernels.tuning import Config, tabled
from quant_kernels.words import TILE_WORDS


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`words`, `scale` and `zero` of signed codes -8 … 7 [experts, outputs, inputs], scale and zero_point [experts,
    outputs, groups], each expert's as `wna16.pack` makes them."""
    zero_points = [None] * len(codes) if zero_point is None else zero_point
    words, scales, zeros = zip(*map(wna16.pack, codes, scale, zero_points, repeat(4)), strict=True)
    return torch.stack(words), torch.stack(scales), None if zero_point is None else torch.stack(zeros)


def most_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """That `pairs` can take, if those without an expert are tiled too: the most if all but one tile is of one pair."""
    kinds = min(pairs, num_experts + 1)
    return kinds + (pairs - kinds) // block_m


def group_by_expert(experts: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Which pairs are computed together: (order, tiles).

    order: int32 [pairs], pairs by expert and of one expert as they come; those whose expert does not exist are last, as
    if it were number num_experts. tiles: int32 [`most_tiles`, 3], each tile's expert, and the first and the end of its
    pairs in `order`. Where there are more than needed, the end is not after the first. Nothing waits for the device.
    """
    pairs, device = experts.numel(), experts.device
    kind = experts.flatten().clamp(-1, num_experts).remainder(num_experts + 1)  # of -1, that is num_experts
    ordered, order = kind.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 2, dtype=kind.dtype, device=device))
    num_tiles = (bounds.diff() + (block_m - 1)) // block_m
    end_tiles = num_tiles.cumsum(0)
    tile = torch.arange(most_tiles(pairs, num_experts, block_m), device=device)
    expert = torch.searchsorted(end_tiles, tile, right=True).clamp_max(num_experts)
    first = bounds[expert] + (tile - (end_tiles - num_tiles)[expert]) * block_m
    end = torch.minimum(first + block_m, bounds[expert + 1])
    return order.to(torch.int32), torch.stack((expert, first, end), dim=1).to(torch.int32)


def w4a16_experts_reference(
    x: Tensor, words: Tensor, scale: Tensor, experts: Tensor, routing_weights: Tensor | None = None,
    zero: Tensor | None = None, bias: Tensor | None = None, combine: bool = False,
) -> Tensor:  # fmt: skip
    """One expert after the other, in float32, rounded once at the end, and once more if combined."""
    tokens, top_k = experts.shape
    rows = x.float() if len(x) == tokens * top_k else x.float().repeat_interleave(top_k, dim=0)
    y = torch.zeros(tokens * top_k, scale.shape[2], device=x.device)
    for expert in range(len(words)):
        of_expert = [None if each is None else each[expert] for each in (zero, bias)]
        chosen = experts.flatten() == expert
        y[chosen] = wna16.wna16_reference(rows[chosen], words[expert], scale[expert], 4, *of_expert)
    if routing_weights is not None:
        y *= routing_weights.view(-1, 1)
    y = y.view(tokens, top_k, -1).to(x.dtype)
    return y.sum(dim=1) if combine else y


@triton.jit
def _w4a16_experts_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, routing_weights, order, tiles, y, partials, counters, experts, pairs_per_row, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, INTERP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """experts: how many there are. Else as in `_wna16_kernel`."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else x.dtype.element_ty
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.num_programs(0) // tiles_n, tiles_n, 8)
    expert = tl.load(tiles + tile_m * 3).to(tl.int64)
    begin = tl.load(tiles + tile_m * 3 + 1)
    end = tl.load(tiles + tile_m * 3 + 2)
    if begin >= end:
        return
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert == experts:
        for row in range(begin, end):
            at = y + tl.load(order + row).to(tl.int64) * N + outputs
            tl.store(at, tl.zeros((BLOCK_N,), y.dtype.element_ty), mask=outputs < N)
        return
    place = begin + tl.arange(0, BLOCK_M)
    # Past the end the last one is read again: a mask would cost an instruction per load in the loop. Stores are masked.
    read_outputs = tl.minimum(outputs, N - 1)
    splits = tl.num_programs(1)
    steps = tl.cdiv(tl.cdiv(K, 128), splits)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, 128))
    pair = tl.load(order + tl.minimum(place, end - 1))
    x_at = x + (pair // pairs_per_row).to(tl.int64)[:, None] * K + tl.arange(0, 32)[None, :]
    words += expert * tl.cdiv(N, 64) * tl.cdiv(K, 128) * TILE_WORDS
    scales = expert * (K // GROUP if GROUP > 0 else 1) * N
    total = packed_dot(
        x_at, words, read_outputs, scale + scales, zero + scales if ZERO else zero, first, last, N, K,
        4, GROUP, ZERO, EVEN_K, ASM, DTYPE, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip
    # Once more, so that it need not be kept in registers during the loop.
    pair = tl.load(order + tl.minimum(place, end - 1), cache_modifier=".ca")
    if SPLIT:
        total, complete = sum_splits(total, partials, counters, tile, split, splits)
        end = tl.where(complete, end, 0)
    if SWAP:
        total = total.T
    if BIAS:
        total += tl.load(bias + expert * N + read_outputs).to(tl.float32)[None, :]
    if WEIGHTED:
        total *= tl.load(routing_weights + pair)[:, None]
    y_at = y + pair.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(place < end)[:, None] & (outputs < N)[None, :])


def w4a16_experts(
    x: Tensor, words: Tensor, scale: Tensor, experts: Tensor, routing_weights: Tensor | None = None,
    zero: Tensor | None = None, bias: Tensor | None = None, combine: bool = False,
) -> Tensor:  # fmt: skip
    """[tokens, top_k, outputs], or [tokens, outputs] if combined. Raises ValueError where an argument is not as
    described above."""
    group_size = _check(x, words, scale, experts, routing_weights, zero, bias)
    (tokens, top_k), (num_experts, _, outputs), inputs = experts.shape, scale.shape, x.shape[1]
    y = torch.empty(tokens, top_k, outputs, dtype=x.dtype, device=x.device)
    if y.numel():
        config = configuration(experts.numel(), num_experts, outputs, inputs, group_size, x.device)
        order, table = group_by_expert(experts, num_experts, config.block_m)
        tiles, steps = len(table) * triton.cdiv(outputs, config.block_n), triton.cdiv(inputs, 128)
        split_k, partials, counters = share(config, tiles, steps, x.device)
        _w4a16_experts_kernel[tiles, split_k](
            x, words, scale, zero, bias, routing_weights, order, table, y, partials, counters, num_experts,
            experts.numel() // len(x), outputs, inputs,
            GROUP=group_size, ZERO=zero is not None, BIAS=bias is not None, WEIGHTED=routing_weights is not None,
            EVEN_K=inputs % 128 == 0, ASM=library.ASSEMBLY,
            INTERP=library.INTERPRETED, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split_k > 1,
            SWAP=config.swap, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y.sum(dim=1) if combine else y


def configuration(
    pairs: int, num_experts: int, outputs: int, inputs: int, group_size: int, device: torch.device
) -> Config:
    """As measured on this GPU, else as for one weight that has the outputs of all experts that can be in use, and the
    tokens of an expert if all have the same; but blocks of 64 tokens and more have no registers left to split sums."""
    tokens = triton.cdiv(pairs, num_experts)
    found = tabled("w4a16_experts", device, outputs, inputs, group_size, tokens)
    if found is not None:
        return found
    config = wna16.configuration(tokens, min(pairs, num_experts) * outputs, inputs, group_size, 4, device)
    return config if config.block_m < 64 else replace(config, split_k=1)


def _check(
    x: Tensor, words: Tensor, scale: Tensor, experts: Tensor, routing_weights: Tensor | None, zero: Tensor | None,
    bias: Tensor | None,
) -> int:  # fmt: skip
    """The group size, 0 for all inputs. Raises ValueError."""
    expect("scale", scale, FLOATS, [None, None, None], x.device)
    num_experts, groups, outputs = scale.shape
    expect("words", words, (torch.int16,), [num_experts, None, None, None, None], x.device)
    if not num_experts:
        raise ValueError("scale has no experts. It needs one or more")
    expect("x", x, FLOATS if library.INTERPRETED else FLOATS[:2], [None, None], x.device)
    group_size = check_weight(words[0], scale[0], None, x.shape[1], 4, x.device)
    if zero is not None:
        expect("zero", zero, FLOATS, [num_experts, groups, outputs], x.device)
    if bias is not None:
        expect("bias", bias, FLOATS, [num_experts, outputs], x.device)
    expect("experts", experts, (torch.int32, torch.int64), [None, None], x.device)
    if routing_weights is not None:
        expect("routing_weights", routing_weights, (torch.float32,), experts.shape, x.device)
    tokens, pairs = len(experts), experts.numel()
    if len(x) not in (tokens, pairs):
        raise ValueError(f"x has {len(x)} rows, expected one for each of {tokens} tokens or of {pairs} pairs")
    return group_size


library.register(
    "w4a16_experts(Tensor x, Tensor words, Tensor scale, Tensor experts, Tensor? routing_weights=None, "
    "Tensor? zero=None, Tensor? bias=None, bool combine=False) -> Tensor",
    launch=w4a16_experts,
    reference=w4a16_experts_reference,
    fake=lambda x, words, scale, experts, routing_weights=None, zero=None, bias=None, combine=False: x.new_empty(
        *(experts.shape[:1] if combine else experts.shape), scale.shape[2]
    ),
)


RECORDED: dict[tuple[int, int, bool], tuple[float, ...]] = {
    # (capability, group size, zero): instructions per weight of what `wna16` ships for 4 bits, in its order
    (90, 128, False): (1.95, 2.93, 2.88, 3.0, 3.11),
    (90, 64, False): (2.27, 3.01, 3.03, 3.18, 3.2),
    (90, 32, False): (2.98, 3.18, 3.22, 3.37, 3.32),
    (90, 0, False): (1.71, 2.29, 2.37, 2.39, 2.44),
    (90, 128, True): (2.16, 3.21, 3.27, 3.34, 3.48),
    (90, 64, True): (2.95, 3.7, 3.78, 3.88, 3.91),
    (90, 32, True): (4.47, 4.61, 4.69, 4.77, 4.69),
    (90, 0, True): (1.71, 2.82, 2.85, 2.91, 2.94),
    (80, 128, False): (1.88, 3.02, 3.71, 5.88),
    (80, 64, False): (2.23, 3.12, 3.86, 6.08),
    (80, 32, False): (2.79, 3.21, 3.95, 6.38),
    (80, 0, False): (1.77, 2.41, 3.08, 5.19),
    (80, 128, True): (2.13, 3.35, 4.08, 6.12),
    (80, 64, True): (2.92, 3.8, 4.49, 6.94),
    (80, 32, True): (4.28, 4.65, 5.34, 8.12),
    (80, 0, True): (1.77, 2.9, 3.63, 5.7),
}


def gates() -> tuple[Gate, ...]:
    """What `configuration` gives, with split sums, a bias and routing weights, for bfloat16 with scales and zeros of 16
    bits."""
    pointers = {
        "x": "*bf16", "words": "*i16", "scale": "*bf16", "zero": "*bf16", "bias": "*bf16", "routing_weights": "*fp32",
        "order": "*i32", "tiles": "*i32", "y": "*bf16", "partials": "*fp32", "counters": "*i32",
    }  # fmt: skip
    numbers = dict.fromkeys(("experts", "pairs_per_row", "N", "K"), "i32")
    made = []
    for (capability, group_size, zero), recorded in RECORDED.items():
        for config, instructions in zip(wna16.shipped(4, capability == 90).values(), recorded, strict=True):
            constants = {
                "GROUP": group_size, "ZERO": zero, "BIAS": True, "WEIGHTED": True, "EVEN_K": True, "ASM": True,
                "INTERP": False, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config.block_m < 64,
                "SWAP": config.swap,
            }  # fmt: skip
            variant = Variant(
                _w4a16_experts_kernel, pointers | numbers, constants, (*pointers, "N", "K"),
                config.num_warps, config.num_stages, weights=config.block_n * 128,
            )  # fmt: skip
            name = f"w4a16_experts{'_zero' * zero} g{group_size} {config.block_m}x{config.block_n}"
            opcode = "HGMMA" if capability == 90 and config.block_m > 16 else "HMMA"
            representative = capability == 90 and group_size == 128 and not zero and config.block_m in (16, 64)
            made.append(Gate(name, variant, capability, opcode, instructions, representative))
    return tuple(made)
