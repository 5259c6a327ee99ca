"""What GPTQ's and AWQ's layouts have in common: codes as unsigned numbers, transposed, with scales in float16.

`w = (code - zero) · scale`, and a symmetric grid is one whose zeros are all 2^(b-1): an offset of 2^(b-1) against our
signed codes, on codes and zero points alike. Quantizers round scales to float16 before they choose codes, so nothing is
lost; scales of another type that are no float16 numbers are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.checkpoint.plain import Plain
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.models.headers import TensorHeader

LEAVES = ("qweight", "qzeros", "scales")


class Unsigned(Plain):
    """Answers that both formats give alike."""

    packs: ClassVar[bool] = True

    def scale_dtype(self, schemes: Collection[Scheme]) -> torch.dtype:
        """float16, whatever the weights are."""
        return torch.float16


def half(name: str, scale: Tensor) -> Tensor:
    """Scales as float16. Raises ValueError where that would change one."""
    rounded = scale.to(torch.float16)
    if not torch.equal(rounded.float(), scale.float()):
        worst = ((rounded.float() - scale.float()).abs() / scale.float().abs()).max().item()
        raise ValueError(
            f"{name}: its {scale.dtype} scales are not float16 numbers (off by up to {worst:.1e}). Quantize for this "
            "format (checkpoint.format in the recipe), which rounds scales before it chooses codes"
        )
    return rounded


def objections(name: str, kind: str, scheme: Scheme, form: str, bits: Collection[int]) -> list[str]:
    grid, told = scheme.weights, ", ".join(map(str, bits))
    if kind != "Linear":
        return [f"{name}: is a {kind}, and {form} holds nn.Linear only. Use compressed-tensors, or add it to 'ignore'"]
    if scheme.inputs or grid.kind != "int" or grid.bits not in bits:
        return [f"{name}: {form} holds integer weights of {told} bits whose inputs are not rounded, not {scheme.name}"]
    return []


def stored_tensors(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A layer's tensors. Raises ModelError where one is missing or no matrix."""
    for leaf in LEAVES:
        found = tensors.get(f"{name}.{leaf}")
        if found is None or found.dim() != 2:
            raise ModelError(f"{name}.{leaf}: {'is missing' if found is None else 'is no matrix'}")
    return tuple(tensors[f"{name}.{leaf}"] for leaf in LEAVES)


def check_shapes(name: str, entries: Entries, tensors: Mapping[str, Tensor], optional: Collection[str] = ()) -> None:
    """Raises ModelError where a tensor has not the shape that the others and the grid ask for."""
    for key, (dtype, shape) in entries.items():
        if key in optional and key not in tensors:
            continue
        found = tensors[key]
        floats = dtype == "F16" and found.is_floating_point()
        if tuple(found.shape) != shape or not (floats or found.dtype == torch.int32):
            raise ModelError(f"{key}: is {list(found.shape)} of {found.dtype}, expected {list(shape)} of {dtype}")


def signed_tensor(
    name: str, codes: UInt8[Tensor, "out in"], zeros: UInt8[Tensor, "out groups"], scales: Tensor, grid: Grid
) -> QuantizedTensor:
    offset = 1 << grid.bits - 1
    signed = (codes.contiguous().to(torch.int16) - offset).to(torch.int8)
    zero_point: Int8[Tensor, "out groups"] | None = (zeros.to(torch.int16) - offset).to(torch.int8).contiguous()
    if grid.symmetric:
        if zero_point is not None and zero_point.any():
            raise ModelError(f"{name}.qzeros: are not all {offset}, though the config says the grid is symmetric")
        zero_point = None
    return QuantizedTensor(signed, scales.T.contiguous(), zero_point, grid)


def unsigned(codes: Int8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows columns"]:
    return codes.view(torch.uint8) + (1 << bits - 1)


def unsigned_zeros(tensor: QuantizedTensor) -> UInt8[Tensor, "out groups"]:
    offset = 1 << tensor.grid.bits - 1
    if tensor.zero_point is None:
        return torch.full(tensor.scale.shape, offset, dtype=torch.uint8)
    return unsigned(tensor.zero_point, tensor.grid.bits)


def uniform_schemes(
    config: Mapping[str, Any], tensors: Mapping[str, TensorHeader], symmetric: bool
) -> dict[str, Scheme]:
    size = config.get("group_size", 128)
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise ModelError(f"quantization_config.group_size: {size!r}, expected a number of inputs, or -1")
    scheme = Scheme(Grid(config.get("bits", 4), symmetric, None if size == -1 else size))
    return {key.removesuffix(".qweight"): scheme for key in tensors if key.endswith(".qweight")}
