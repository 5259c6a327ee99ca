"""Linear layers that keep their weights as integer codes and compute with whichever kernel suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quant_kernels
from compress.core.hadamard import hadamard
from compress.core.inputs import round_inputs
from compress.core.minifloat import pack_e2m1
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from quant_kernels import Packed
from quant_kernels.layout import Levels


class QuantLinear(nn.Module):
    """`y = x · Wᵀ + bias` with W quantized; stands where an `nn.Linear` stood.

    The weight is packed for one kernel when the layer is made, which suits activations of one type on one
    device. To run on another device or in another type, load the model again.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        scheme: Scheme,
        input_scale: Tensor | None = None,
        rotated: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.scheme = scheme
        self.rotated = rotated
        self.backend = packed.kernel
        self._bits = packed.bits
        self._rounds_inputs = quant_kernels.rounds_inputs(packed)
        self._packed: Packed | None = None
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", packed.zero_point)
        self.register_buffer("global_scale", packed.global_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        inputs: Grid | None = None,
        input_scale: Tensor | None = None,
        rotated: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> QuantLinear:
        """Pack a weight for activations of `dtype` on `device`.

        `rotated`: the size of the Hadamard matrix that inputs are rotated by first, in runs. `inputs`: the grid they
        are rounded to then.
        """
        packed = cls._pack(weight, inputs, dtype, device)
        bias = None if bias is None else bias.detach().to(device=device, dtype=dtype)
        input_scale = None if input_scale is None else input_scale.to(device)
        return cls(packed, bias, Scheme(weight.grid, inputs), input_scale, rotated)

    @staticmethod
    def _pack(weight: QuantizedTensor, inputs: Grid | None, dtype: torch.dtype, device: str | torch.device) -> Packed:
        levels = weight_levels(weight.grid)
        return quant_kernels.pack(
            pack_e2m1(weight.codes) if levels == "fp4" else weight.codes,
            weight.step if levels == "fp8" else weight.scale,
            weight.zero_point,
            bits=weight.grid.bits,
            dtype=dtype,
            device=str(device),
            inputs=levels_of(inputs),
            global_scale=weight.global_scale,
        )

    @property
    def packed(self) -> Packed:
        """The buffers as a weight; made once, since looking up a module's buffers takes longer than a small layer."""
        if self._packed is None or self._packed.codes is not self._buffers["codes"]:
            tensors = self.codes, self.scale, self.zero_point, self.global_scale
            self._packed = Packed(self.backend, self._bits, self.out_features, self.in_features, *tensors)
        return self._packed

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        self._packed = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if self.rotated:
            x = _turned(x, self.rotated)
        if self.scheme.inputs and not self._rounds_inputs:
            x = round_inputs(x, self.scheme.inputs, self.input_scale)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return quant_kernels.linear(x, self.packed, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] this layer computes with."""
        return quant_kernels.dequantize(self.packed, dtype)

    def extra_repr(self) -> str:
        size = self.scheme.weights.group_size
        group_size = "" if size is None else f", group_size={size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.scheme.name}{group_size}, backend={self.backend}"
        )


def weight_levels(grid: Grid) -> Levels:
    """What the codes of a weight are to a kernel."""
    return "int" if grid.kind == "int" else "fp8" if grid.bits == 8 else "fp4"


def _turned(x: Tensor, size: int) -> Tensor:
    """Inputs rotated in runs of `size`: on a GPU by our kernel, in one pass over them."""
    if x.device.type != "cuda":
        return hadamard(x, size)
    from quant_kernels import hadamard as kernel

    if size > kernel.MOST:
        return hadamard(x, size)
    return torch.ops.netsuke.hadamard(x.reshape(-1, x.shape[-1]).contiguous(), size).view(x.shape)


def levels_of(inputs: Grid | None) -> Levels | None:
    """What a kernel may round inputs to; None where none can: other bits, or scales that are not a token's."""
    if inputs is None or inputs.bits != 8 or inputs.rows != 1 or inputs.group_size is not None:
        return None
    return "int" if inputs.kind == "int" else "fp8"


class SharedInput(nn.Module):
    """Layers that read the same input, run as one: the rows of `linear` are theirs, one layer's after another's.

    The model goes on calling each layer by its name (`parts`). The first call with an input computes them all, and the
    others take what waits for them.
    """

    def __init__(self, linear: QuantLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = list(sizes)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def parts(self) -> list[SharedLinear]:
        return [SharedLinear(self, index) for index in range(len(self.sizes))]

    def take(self, x: Tensor, index: int) -> Tensor:
        """The output of one layer for x [..., in]."""
        if x is not self._input or index not in self._waiting:
            self._input, self._waiting = x, dict(enumerate(self.linear(x).split(self.sizes, dim=-1)))
        y = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return y


class SharedLinear(nn.Module):
    """One of the layers of a `SharedInput`; stands where its `nn.Linear` stood."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features = shared.linear.in_features
        self.out_features = shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(x, self.index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] this layer computes with."""
        return self.shared.linear.dequantize(dtype).split(self.shared.sizes)[self.index]


class Compensated(nn.Module):
    """A quantized layer and the low-rank product that makes up for its rounding: `layer(x) + (x Bᵀ) Aᵀ`."""

    A: Tensor
    B: Tensor

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = len(A), B.shape[1]
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.B), self.A)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] this layer computes with."""
        return (cast(QuantLinear, self.layer).dequantize() + self.A.float() @ self.B.float()).to(dtype)

    def extra_repr(self) -> str:
        return f"rank={len(self.B)}"


def put_in_place(model: nn.Module, names: Sequence[str], layer: QuantLinear) -> None:
    """Let `layer` do the work of the linear layers `names`, which read the same input; its rows are theirs in turn."""
    if len(names) == 1:
        model.set_submodule(names[0], layer)
        return
    sizes = [cast(nn.Linear, model.get_submodule(name)).out_features for name in names]
    for name, part in zip(names, SharedInput(layer, sizes).parts(), strict=True):
        model.set_submodule(name, part)
