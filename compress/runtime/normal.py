"""Linear layers whose codes count the levels of NF4: looked up a chunk of rows at a time, as the reference does it."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.normal_float import level_table
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.runtime.modules import QuantLinear
from quant_kernels import Packed, reference
from quant_kernels.layout import unpack_nibbles


class NormalLinear(QuantLinear):
    """`y = x · Wᵀ + bias` with W in NF4, two codes to a byte; every device runs it, and no kernel does yet."""

    @staticmethod
    def _pack(weight: QuantizedTensor, inputs: Grid | None, dtype: torch.dtype, device: str | torch.device) -> Packed:
        codes = weight.codes.view(torch.int8).to(device)
        return reference.pack(codes, weight.scale.to(device), None, weight.grid.bits)

    def _multiply(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        y = reference.linear_by_rows(tokens, self.packed, self.bias, dequantize_rows)
        return y.view(*x.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] this layer computes with."""
        return dequantize_rows(self.packed, 0, self.out_features, dtype)


def dequantize_rows(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of the weight, computed in float32 and rounded once to `dtype`."""
    codes = unpack_nibbles(packed.codes[start:stop], packed.in_features) & 15
    scale = packed.scale[start:stop].to(torch.float32).unsqueeze(-1)
    levels = level_table(codes.device)[codes.long()].view(stop - start, packed.scale.shape[1], -1)
    return (levels * scale).view(stop - start, -1).to(dtype)
