"""Layers whose inputs are rounded to 8 bits token by token, and layers of FP8 codes, on a GPU.

`gpu_w8a8`: 5 to 8 bits, symmetric, one scale per row; inputs to int8, then the operator of `w8a8`. `gpu_w4a8`: 2 to 4
bits, one scale per row, with zero points or not; inputs to int8, then that of `w4a8`. `gpu_fp8`: FP8 codes, one scale
per row; inputs to FP8, then that of `fp8`, on GPUs that multiply FP8. `gpu_fp8_weights`: the same weights with inputs
of 16 bits, by `w8a16_fp8`.

Inputs come as they are: the kernels round them. Their int8 scale is max|x| / 127, as that of serving engines;
compressed-tensors, and with it netsuke's own scores, divide by 127.5, which no score can tell apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.gpu import machine_objection
from quant_kernels.layout import LinearSpec, Packed

FP8_CAPABILITY = (8, 9)


def w8a8_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_w8a8` cannot run this layer; None where it can."""
    if spec.bits <= 4:
        return f"would spend a byte on each code of {spec.bits} bits"
    if not spec.symmetric:
        return "has no room for zero points"
    return _row_objection(spec) or machine_objection()


def w4a8_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_w4a8` cannot run this layer; None where it can."""
    if spec.bits > 4:
        return f"holds codes of up to 4 bits, not {spec.bits}"
    return _row_objection(spec) or machine_objection()


def fp8_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_fp8` cannot run this layer; None where it can."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return f"needs compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or newer to multiply FP8"
    return _row_objection(spec) or machine_objection()


def fp8_weights_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_fp8_weights` cannot run this layer; None where it can."""
    return _row_objection(spec) or machine_objection()


def pack_w8a8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: int8 [out, in]; scale: float32 [out]."""
    rows, columns = codes.shape
    return Packed("gpu_w8a8", bits, rows, columns, codes.contiguous(), scale.float().view(-1), None)


def pack_w4a8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: two to a byte as in `byte_planes`; scale: float32 [out]; zero_point: the scaled ones of the operator."""
    from quant_kernels.byte_planes import pack_channels

    zero = None if zero_point is None else zero_point.view(-1)
    rows, columns = codes.shape
    return Packed("gpu_w4a8", bits, rows, columns, *pack_channels(codes, scale.view(-1), zero))


def pack_fp8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: float8_e4m3fn [out, in]; scale: float32 [out]."""
    rows, columns = codes.shape
    return Packed("gpu_fp8", bits, rows, columns, codes.contiguous(), scale.float().view(-1), None)


def pack_fp8_weights(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: words as `fp8.pack_words` lays them out; scale: float32 [out]."""
    from quant_kernels.fp8 import pack_words

    rows, columns = codes.shape
    return Packed("gpu_fp8_weights", bits, rows, columns, pack_words(codes), scale.float().view(-1), None)


def linear_w8a8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], in the type of x."""
    from quant_kernels import token_quant, w8a8  # noqa: F401

    codes, scale, _ = torch.ops.netsuke.token_quant(x)
    return torch.ops.netsuke.w8a8(codes, scale, packed.codes, packed.scale, None, None, bias, x.dtype)


def linear_w4a8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], in the type of x."""
    from quant_kernels import token_quant, w4a8  # noqa: F401

    codes, scale, sums = torch.ops.netsuke.token_quant(x)
    return torch.ops.netsuke.w4a8(codes, scale, sums, packed.codes, packed.scale, packed.zero_point, bias, x.dtype)


def linear_fp8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], in the type of x."""
    from quant_kernels import fp8, fp8_quant  # noqa: F401

    codes, scale = torch.ops.netsuke.fp8_quant(x)
    return torch.ops.netsuke.fp8(codes, scale, packed.codes, packed.scale, bias, x.dtype)


def linear_fp8_weights(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both float16 or both bfloat16."""
    from quant_kernels import fp8  # noqa: F401

    return torch.ops.netsuke.w8a16_fp8(x, packed.codes, packed.scale, bias)


def dequantize_byte_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of a weight with a byte for each code, int8 or FP8."""
    return (packed.codes[start:stop].float() * packed.scale[start:stop, None]).to(dtype)


def dequantize_w4a8_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight."""
    from quant_kernels.byte_planes import unpack_bytes

    assert packed.zero_point is not None, "pack_w4a8 has made one"
    codes = unpack_bytes(packed.codes[start:stop], packed.in_features).float()
    return (codes * packed.scale[start:stop, None] - packed.zero_point[start:stop, None]).to(dtype)


def dequantize_fp8_word_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight."""
    from quant_kernels.fp8 import unpack_words

    codes = unpack_words(packed.codes[start:stop], packed.in_features)
    return (codes.float() * packed.scale[start:stop, None]).to(dtype)


def _row_objection(spec: LinearSpec) -> str | None:
    if spec.columns_per_scale == spec.in_features:
        return None
    return f"needs one scale per row, not groups of {spec.columns_per_scale}"
