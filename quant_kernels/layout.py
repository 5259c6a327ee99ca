"""How a quantized weight lies in memory.

A weight of shape [out, in] comes as plain tensors, `w = (code - zero_point) · scale`: codes and zero
points are signed integers of 2 to 8 bits, and `group_size` consecutive input columns of a row share one
scale. Each kernel keeps them in the layout it reads fastest, a `Packed`; none spends a whole byte on a
code of four bits or fewer. What a kernel must know to accept a layer is a `LinearSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = Literal["int", "fp8"]
"""Whole numbers, or those of float8_e4m3fn."""


@dataclass(frozen=True)
class LinearSpec:
    """One quantized linear layer and the activations it will meet."""

    bits: int
    group_size: int | None
    """Input columns that share one scale; None: the whole row."""
    symmetric: bool
    dtype: torch.dtype
    """Of the activations."""
    device: str
    """Type of the device, `cpu` or `cuda`."""
    in_features: int
    out_features: int
    levels: Levels = "int"
    """Of the weight."""
    inputs: Levels | None = None
    """What activations are to be rounded to, 8 bits with a scale for each token; None: not at all, or by the caller."""

    @property
    def columns_per_scale(self) -> int:
        return self.group_size or self.in_features


@dataclass(frozen=True)
class Packed:
    """A weight in the layout of the kernel named `kernel`, which says what shapes its tensors have."""

    kernel: str
    bits: int
    out_features: int
    in_features: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)


def check(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> None:
    """Raise ValueError where the plain tensors are not a weight of `bits` bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: there are kernels for 2 to 8 bits")
    if codes.dtype == torch.float8_e4m3fn:
        _check_floats(codes, scale, zero_point)
        return
    if codes.dtype != torch.int8 or codes.ndim != 2 or not codes.numel():
        raise ValueError(
            f"codes are {codes.dtype} of shape {[*codes.shape]}, expected int8 or float8_e4m3fn of [out, in]"
        )
    rows, columns = codes.shape
    groups = scale.shape[-1] if scale.ndim == 2 else 0
    if not groups or scale.shape[0] != rows or columns % groups:
        raise ValueError(f"scale has shape {[*scale.shape]}, which does not divide codes of {[*codes.shape]}")
    if zero_point is not None and (zero_point.dtype != torch.int8 or zero_point.shape != scale.shape):
        raise ValueError(f"zero_point is {zero_point.dtype} of shape {[*zero_point.shape]}, expected int8 of "
                         f"{[*scale.shape]}, the shape of scale")  # fmt: skip
    limit = 1 << (bits - 1)
    for name, tensor in (("codes", codes), ("zero_point", zero_point)):
        if tensor is None:
            continue
        low, high = (int(extreme) for extreme in tensor.aminmax())
        if low < -limit or high >= limit:
            raise ValueError(f"{name} hold {low} … {high}, but {bits} bits reach from {-limit} to {limit - 1}")


def _check_floats(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    if codes.ndim != 2 or scale.ndim != 2 or scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
        raise ValueError(f"scale has shape {[*scale.shape]}, which does not divide codes of {[*codes.shape]}")
    if zero_point is not None:
        raise ValueError("zero_point is given, but floats have none")


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes of at most 4 bits per byte: int8 [rows, columns] → int8 [rows, ceil(columns / 2)].

    The low nibbles are the left half of a row and the high nibbles the right half, each in two's
    complement, so that unpacking is shifts and no interleaving.
    """
    half = (codes.shape[1] + 1) // 2
    right = F.pad(codes[:, half:], (0, codes.shape[1] % 2))
    return (codes[:, :half] & 15) | (right << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.cat(((packed << 4) >> 4, packed >> 4), dim=1)[:, :columns]
