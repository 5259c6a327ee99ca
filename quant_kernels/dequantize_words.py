"""Words of 2 to 4 bits back to a plain weight, for products with so many tokens that a library's is worth the detour.

    weight[n, k] = (u[n, k] - zero[g, n]) · scale[g, n], g = k // group size

words, scale and zero are those of `wna16`. weight: float16, bfloat16 or float32 [outputs, inputs], rounded as that
operator rounds it. A block makes one tile of 64 outputs, and reads its four or six kilobytes in one piece.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect, group_size_of
from quant_kernels.gate import Gate, Variant
from quant_kernels.packed_codes import (
    BITS,
    code_addresses,
    code_shape,
    load_planes,
    plane_offset,
    tile_columns,
    unpack_codes,
)
from quant_kernels.packed_dot import dequantize_plane


def dequantize_words_reference(
    words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """In float32, rounded once."""
    groups, outputs = scale.shape
    codes = unpack_codes(words, outputs, inputs, bits).float().view(outputs, groups, -1)
    shifted = codes - (1 << bits - 1 if zero is None else zero.float().T.unsqueeze(2))
    return (shifted * scale.float().T.unsqueeze(2)).view(outputs, inputs).to(dtype)


@triton.jit
def _dequantize_words_kernel(  # type: ignore[no-untyped-def]
    words, scale, zero, weight, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that share a scale, 0: all. INTERP: compute in float32."""
    DTYPE: tl.constexpr = tl.float32 if INTERP else weight.dtype.element_ty
    ROWS: tl.constexpr = 64  # of a tile
    COLUMNS: tl.constexpr = tile_columns(BITS)
    MIDDLE: tl.constexpr = 0 if ZERO else 1 << (BITS - 1)
    tiles_k = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0)
    rows = tile // tiles_k * ROWS + tl.arange(0, ROWS)
    read_rows = tl.minimum(rows, N - 1)
    start = tile % tiles_k * COLUMNS
    column = tl.arange(0, 32)
    planes = load_planes(code_addresses(words, rows, K, BITS), tile % tiles_k, DTYPE, ASM, BITS)
    for plane in tl.static_range(COLUMNS // 32):
        inputs = start + plane * 32 + column
        group = tl.minimum(start + plane * 32, K - 1) // GROUP if GROUP > 0 else 0
        at = tl.cast(group, tl.int64) * N + read_rows
        s = tl.load(scale + at).to(tl.float32)
        z = tl.load(zero + at).to(tl.float32) if ZERO else s
        value = dequantize_plane(planes[plane], s, z, DTYPE, plane_offset(plane, DTYPE, BITS) + MIDDLE, True, ZERO)
        weight_at = weight + rows.to(tl.int64)[:, None] * K + inputs[None, :]
        tl.store(weight_at, value.to(weight.dtype.element_ty), mask=(rows < N)[:, None] & (inputs < K)[None, :])


def dequantize_words(
    words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """[outputs, inputs]. Raises ValueError where an argument is not as described above."""
    group_size = check_weight(words, scale, zero, inputs, bits, words.device)
    if dtype not in FLOATS or (dtype == torch.float32 and not library.INTERPRETED):
        raise ValueError(f"dtype={dtype}: weights are made in torch.float16 or torch.bfloat16")
    weight = torch.empty(scale.shape[1], inputs, dtype=dtype, device=words.device)
    _dequantize_words_kernel[(words.shape[0] * words.shape[1],)](
        words, scale, zero, weight, *weight.shape,
        BITS=bits, GROUP=group_size, ZERO=zero is not None,
        ASM=library.ASSEMBLY, INTERP=library.INTERPRETED, num_warps=4,
    )  # fmt: skip
    return weight


def check_weight(
    words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, bits: int, device: torch.device
) -> int:
    """The group size of a weight, 0 for all inputs. Raises ValueError."""
    if bits not in BITS:
        raise ValueError(f"bits={bits}: words hold codes of {BITS[0]} to {BITS[-1]} bits")
    expect("scale", scale, FLOATS, [None, None], device)
    groups, outputs = scale.shape
    group_size = group_size_of(scale, inputs)
    expect("words", words, (torch.int16,), code_shape(outputs, inputs, bits), device)
    if zero is not None:
        expect("zero", zero, FLOATS, [groups, outputs], device)
    return group_size


library.register(
    "dequantize_words(Tensor words, Tensor scale, Tensor? zero, int inputs, int bits, ScalarType dtype) -> Tensor",
    launch=dequantize_words,
    reference=dequantize_words_reference,
    fake=lambda words, scale, zero, inputs, bits, dtype: words.new_empty(scale.shape[1], inputs, dtype=dtype),
)


def gates() -> tuple[Gate, ...]:
    """With and without zero points, for bfloat16."""
    pointers = {"words": "*i16", "scale": "*bf16", "zero": "*bf16", "weight": "*bf16"}
    made = []
    for capability, bits, zero in product((80, 90), BITS, (False, True)):
        constants = {"BITS": bits, "GROUP": 128, "ZERO": zero, "ASM": True, "INTERP": False}
        variant = Variant(_dequantize_words_kernel, pointers | {"N": "i32", "K": "i32"}, constants,
                          (*pointers, "N", "K"), num_warps=4, num_stages=3)  # fmt: skip
        name = f"dequantize_words{'_zero' * zero} {bits} bits"
        made.append(Gate(name, variant, capability, "", representative=not zero))
    return tuple(made)
