"""4-bit words back to a plain weight, for products with so many tokens that a library's is worth the detour.

    weight[n, k] = (u[n, k] - zero[g, n]) · scale[g, n], g = k // group size

words, scale and zero are those of `w4a16`. weight: float16, bfloat16 or float32 [outputs, inputs], rounded as that
operator rounds it. A block makes one tile of 64 outputs × 128 inputs, and reads its four kilobytes in one piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS
from quant_kernels.gate import Gate, Variant
from quant_kernels.packed_dot import dequantize_plane
from quant_kernels.w4a16 import check_weight
from quant_kernels.words import (
    SIGNED_ZERO,
    TILE_WORDS,
    code_offset,
    unpack_planes,
    unpack_words,
    word_offsets,
)


def dequantize_words_reference(
    words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, dtype: torch.dtype
) -> Tensor:
    """In float32, rounded once."""
    groups, outputs = scale.shape
    codes = unpack_words(words, outputs, inputs).float().view(outputs, groups, -1)
    shifted = codes - (SIGNED_ZERO if zero is None else zero.float().T.unsqueeze(2))
    return (shifted * scale.float().T.unsqueeze(2)).view(outputs, inputs).to(dtype)


@triton.jit
def _dequantize_words_kernel(  # type: ignore[no-untyped-def]
    words, scale, zero, weight, N, K,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else weight.dtype.element_ty
    ROWS: tl.constexpr = 64  # of a tile
    tiles_k = tl.cdiv(K, 128)
    tile = tl.program_id(0)
    rows = tile // tiles_k * ROWS + tl.arange(0, ROWS)
    read_rows = tl.minimum(rows, N - 1)
    start = tile % tiles_k * 128
    column = tl.arange(0, 32)
    words_at = words + word_offsets(rows, K) + (start // 128) * TILE_WORDS
    planes = unpack_planes(tl.load(words_at, eviction_policy="evict_first"), DTYPE, ASM)
    for plane in tl.static_range(4):
        inputs = start + plane * 32 + column
        group = tl.minimum(start + plane * 32, K - 1) // GROUP if GROUP > 0 else 0
        at = tl.cast(group, tl.int64) * N + read_rows
        s = tl.load(scale + at).to(tl.float32)
        z = tl.load(zero + at).to(tl.float32) if ZERO else tl.full((ROWS,), 8.0, tl.float32)
        value = dequantize_plane(planes[plane], s, z, DTYPE, code_offset(DTYPE), True, ZERO)
        weight_at = weight + rows.to(tl.int64)[:, None] * K + inputs[None, :]
        tl.store(weight_at, value.to(weight.dtype.element_ty), mask=(rows < N)[:, None] & (inputs < K)[None, :])


def dequantize_words(words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs]. Raises ValueError where an argument is not as described above."""
    group_size = check_weight(words, scale, zero, inputs, words.device)
    if dtype not in FLOATS or (dtype == torch.float32 and not library.INTERPRETED):
        raise ValueError(f"dtype={dtype}: weights are made in torch.float16 or torch.bfloat16")
    weight = torch.empty(scale.shape[1], inputs, dtype=dtype, device=words.device)
    _dequantize_words_kernel[(words.shape[0] * words.shape[1],)](
        words, scale, zero, weight, *weight.shape,
        GROUP=group_size, ZERO=zero is not None,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED, num_warps=4,
    )  # fmt: skip
    return weight


library.register(
    "dequantize_words(Tensor words, Tensor scale, Tensor? zero, int inputs, ScalarType dtype) -> Tensor",
    launch=dequantize_words,
    reference=dequantize_words_reference,
    fake=lambda words, scale, zero, inputs, dtype: words.new_empty(scale.shape[1], inputs, dtype=dtype),
)


def gates() -> tuple[Gate, ...]:
    """With and without zero points, for bfloat16."""
    pointers = {"words": "*i16", "scale": "*bf16", "zero": "*bf16", "weight": "*bf16"}
    made = []
    for capability in (80, 90):
        for zero in (False, True):
            constants = {"GROUP": 128, "ZERO": zero, "ASM": True, "INTERP": False}
            variant = Variant(_dequantize_words_kernel, pointers | {"N": "i32", "K": "i32"}, constants,
                              (*pointers, "N", "K"), num_warps=4, num_stages=3)  # fmt: skip
            made.append(Gate(f"dequantize_words{'_zero' * zero}", variant, capability, "", representative=not zero))
    return tuple(made)
