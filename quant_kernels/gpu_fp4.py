"""Layers of 4-bit floats on a GPU: NVFP4 and MXFP4 weights, activations of 16 bits.

`gpu_fp4`: the operator of `fp4`, for float16 or bfloat16 activations, any number of rows. Weights and scales keep every
bit they were stored with, 4.5 or 4.25 to a weight. Where a scheme rounds inputs to 4 bits too, the caller does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels import reference
from quant_kernels.gpu import machine_objection
from quant_kernels.layout import FP4_GROUPS, LinearSpec, Packed


def fp4_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_fp4` cannot run this layer; None where it can."""
    if spec.columns_per_scale not in FP4_GROUPS.values():
        return f"needs groups of 16 (NVFP4) or 32 (MXFP4) columns, not {spec.columns_per_scale}"
    return machine_objection()


def pack_fp4(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, global_scale: Tensor | None = None
) -> Packed:
    """codes, scale, global_scale: as `quant_kernels.fp4_words` lays them out, MXFP4's with a `global_scale` as well.

    Raises ValueError where a scale is NaN, or one of NVFP4 not positive.
    """
    from quant_kernels.fp4_words import pack_mxfp4, pack_nvfp4

    codes, scale = codes.contiguous(), scale.contiguous()
    if global_scale is None:
        words, scales, overall = pack_mxfp4(codes, scale.view(torch.uint8))
    else:
        words, scales, overall = pack_nvfp4(codes, scale, global_scale)
    rows, half = codes.shape
    return Packed("gpu_fp4", bits, rows, 2 * half, words, scales, None, overall)


def linear_fp4(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both float16 or both bfloat16."""
    from quant_kernels import fp4  # noqa: F401  (registers the operator)

    return torch.ops.netsuke.w4a16_fp4(x, packed.codes, packed.scale, packed.global_scale, bias)


def linear_fp4_dense(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for many tokens: the whole weight is made in the type of x, used once and let go."""
    from quant_kernels import fp4  # noqa: F401

    weight = torch.ops.netsuke.dequantize_fp4(
        packed.codes, packed.scale, packed.global_scale, packed.in_features, x.dtype
    )
    return F.linear(x, weight, bias)


def dequantize_fp4_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight, the first a multiple of 64: unpacked as stored, then the reference's."""
    from quant_kernels.fp4_words import NVFP4_GROUP, group_size_of, unpack_mxfp4, unpack_nvfp4
    from quant_kernels.words import TILE_ROWS

    assert packed.global_scale is not None, "pack_fp4 has made one"
    inputs, overall = packed.in_features, None
    words, scales = packed.codes[start // TILE_ROWS : -(-stop // TILE_ROWS)], packed.scale[:, start:stop]
    if group_size_of(scales, inputs) == NVFP4_GROUP:
        codes, scale, overall = unpack_nvfp4(words, scales, packed.global_scale, inputs)
    else:
        codes, stored = unpack_mxfp4(words, scales, packed.global_scale, inputs)
        scale = stored.view(torch.float8_e8m0fnu)
    plain = reference.pack(codes, scale, None, packed.bits, overall)
    return reference.dequantize_rows(plain, 0, stop - start, dtype)
