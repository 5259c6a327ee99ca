"""Quantized linear layers on a GPU, with this package's own Triton kernels.

`gpu_int4`, codes of 2, 3 or 4 bits, each in as many bits: the operator of `wna16`. `gpu_int8`, of 5 to 8 bits: that of
`w8a16`. Both take groups of 32 or 64 columns, of a multiple of 128, or one scale per row, symmetric or with zero
points, any number of rows, float16 or bfloat16 activations.

Triton is imported when a layer is first packed: a machine without a GPU needs no Triton.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels.layout import LinearSpec, Packed

MOST_TOKENS = 1024
"""From here on reading and writing the dequantized weight, 4.5 bytes each, is less than what cuBLAS is quicker by; a
prediction from both rooflines, not yet measured."""
CAPABILITY = (8, 0)
"""The oldest NVIDIA GPUs with the matrix instructions that the kernels are compiled to: Ampere."""


def int4_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_int4` cannot run this layer; None where it can."""
    if spec.bits > 4:
        return f"holds codes of up to 4 bits, not {spec.bits}"
    return _group_objection(spec) or machine_objection()


def int8_objection(spec: LinearSpec) -> str | None:
    """Why `gpu_int8` cannot run this layer; None where it can."""
    if spec.bits <= 4:
        return f"would spend a byte on each code of {spec.bits} bits"
    return _group_objection(spec) or machine_objection()


def pack_int4(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: words as in `quant_kernels.packed_codes`; scale, zero_point: [groups, out], zeros of the stored codes."""
    from quant_kernels import wna16

    words, scales, zeros = wna16.pack(codes, scale, zero_point, bits)
    rows, columns = codes.shape
    return Packed("gpu_int4", bits, rows, columns, words, scales, zeros)


def pack_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Packed:
    """codes: int8 as `w8a16.pack` lays them out; scale, zero_point: [groups, out]."""
    from quant_kernels import w8a16

    weight, scales, zeros = w8a16.pack(codes, scale, zero_point)
    rows, columns = codes.shape
    return Packed("gpu_int8", bits, rows, columns, weight, scales, zeros)


def linear_int4(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both float16 or both bfloat16."""
    from quant_kernels import wna16  # noqa: F401  (registers the operator)

    return torch.ops.netsuke.wna16(x, packed.codes, packed.scale, packed.bits, packed.zero_point, bias)


def linear_int8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in] → [tokens, out], both float16 or both bfloat16."""
    from quant_kernels import w8a16  # noqa: F401

    return torch.ops.netsuke.w8a16(x, packed.codes, packed.scale, packed.zero_point, bias)


def linear_int4_dense(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same for many tokens: the whole weight is made in the type of x, used once and let go."""
    from quant_kernels import dequantize_words  # noqa: F401

    weight = torch.ops.netsuke.dequantize_words(
        packed.codes, packed.scale, packed.zero_point, packed.in_features, packed.bits, x.dtype
    )
    return F.linear(x, weight, bias)


def dequantize_int4_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight, the first a multiple of 64."""
    from quant_kernels.dequantize_words import dequantize_words_reference
    from quant_kernels.words import TILE_ROWS

    words = packed.codes[start // TILE_ROWS : -(-stop // TILE_ROWS)]
    zero = None if packed.zero_point is None else packed.zero_point[:, start:stop]
    return dequantize_words_reference(words, packed.scale[:, start:stop], zero, packed.in_features, packed.bits, dtype)


def dequantize_int8_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight."""
    from quant_kernels.w8a16 import unpack

    codes = unpack(packed.codes[start:stop], packed.in_features).to(torch.float32)
    grouped = codes.view(stop - start, packed.scale.shape[0], -1)
    if packed.zero_point is not None:
        grouped -= packed.zero_point[:, start:stop].T.to(torch.float32).unsqueeze(-1)
    scale = packed.scale[:, start:stop].T.to(torch.float32)
    return grouped.mul_(scale.unsqueeze(-1)).view(stop - start, -1).to(dtype)


def _group_objection(spec: LinearSpec) -> str | None:
    group = spec.columns_per_scale
    if group in (32, 64, spec.in_features) or group % 128 == 0:
        return None
    return f"needs groups of 32, 64 or a multiple of 128 columns, or one scale per row, not {group}"


def machine_objection() -> str | None:
    """Why Triton kernels would not run on this machine's GPU."""
    if find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install netsuke[gpu]"
    if torch.version.cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    return None
