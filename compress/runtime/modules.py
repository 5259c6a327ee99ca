"""A linear layer that keeps its weight as integer codes and computes with whichever kernel suits it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quant_kernels
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from quant_kernels import Packed


class QuantLinear(nn.Module):
    """`y = x · Wᵀ + bias` with W quantized; stands where an `nn.Linear` stood.

    The weight is packed for one kernel when the layer is made, which suits activations of one type on one
    device. To run on another device or in another type, load the model again.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, grid: Grid) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.grid = grid
        self.backend = packed.kernel
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", packed.zero_point)
        self.register_buffer("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> QuantLinear:
        """Pack a weight for activations of `dtype` on `device`."""
        packed = quant_kernels.pack(
            weight.codes,
            weight.scale,
            weight.zero_point,
            bits=weight.grid.bits,
            dtype=dtype,
            device=str(device),
        )
        bias = None if bias is None else bias.detach().to(device=device, dtype=dtype)
        return cls(packed, bias, weight.grid)

    @property
    def packed(self) -> Packed:
        return Packed(
            self.backend,
            self.grid.bits,
            self.out_features,
            self.in_features,
            self.codes,
            self.scale,
            self.zero_point,
        )

    def forward(self, x: Tensor) -> Tensor:
        return quant_kernels.linear(x, self.packed, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] this layer computes with."""
        return quant_kernels.dequantize(self.packed, dtype)

    def extra_repr(self) -> str:
        group_size = "" if self.grid.group_size is None else f", group_size={self.grid.group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.grid.scheme}{group_size}, backend={self.backend}"
        )
