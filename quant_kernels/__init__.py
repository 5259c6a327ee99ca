"""Linear layers on quantized weights: one contract, a plain reference, and a kernel wherever one is faster.

    packed = pack(codes, scale, zero_point, bits=4, dtype=torch.bfloat16)
    y = linear(x, packed, bias)

This package is a leaf: it needs torch, and Triton for its GPU kernels, and knows nothing of models or files.
"""

from __future__ import annotations

from quant_kernels.dispatch import KERNELS, Backend, choose, dequantize, linear, pack, rounds_inputs
from quant_kernels.layout import Packed

__all__ = ["KERNELS", "Backend", "Packed", "choose", "dequantize", "linear", "pack", "rounds_inputs"]
