"""How a quantized weight lies in memory.

A weight of shape [out, in] comes as plain tensors, `w = (code - zero_point) · scale`: codes and zero
points are signed integers of 2 to 8 bits, and `group_size` consecutive input columns of a row share one
scale. Codes may be floats too, without zero points: FP8 in float8_e4m3fn; or FP4 (E2M1), two to a byte, the
even column in the low nibble, with scales in 8 bits as NVFP4 and MXFP4 store them. Each kernel keeps them in
the layout it reads fastest, a `Packed`; none spends a whole byte on a code of four bits or fewer. What a
kernel must know to accept a layer is a `LinearSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = Literal["int", "fp8", "fp4"]
"""Whole numbers, those of float8_e4m3fn, or those of E2M1."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes 0 … 15 of FP4 stand for."""
FP4_GROUPS = {torch.float8_e4m3fn: 16, torch.float8_e8m0fnu: 32}
"""Type of an FP4 weight's scales → columns that share one: NVFP4 and MXFP4."""


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
    global_scale: Tensor | None = None
    """What all scales are to be divided by."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = self.codes, self.scale, self.zero_point, self.global_scale
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def levels_of(codes: Tensor) -> Levels:
    """What plain codes are, by their type."""
    return "fp4" if codes.dtype == torch.uint8 else "fp8" if codes.dtype == torch.float8_e4m3fn else "int"


def check(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, global_scale: Tensor | None = None
) -> None:
    """Raise ValueError where the plain tensors are not a weight of `bits` bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: there are kernels for 2 to 8 bits")
    if levels_of(codes) == "fp4":
        _check_fp4(codes, scale, zero_point, bits, global_scale)
        return
    if global_scale is not None:
        raise ValueError(f"global_scale is given for codes of {codes.dtype}; only NVFP4, in uint8, has one")
    if codes.dtype == torch.float8_e4m3fn:
        _check_floats(codes, scale, zero_point)
        return
    if codes.dtype != torch.int8 or codes.ndim != 2 or not codes.numel():
        raise ValueError(
            f"codes are {codes.dtype} of shape {[*codes.shape]}, expected int8 or float8_e4m3fn of [out, in], "
            "or uint8 of [out, in / 2]"
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


def _check_fp4(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, global_scale: Tensor | None) -> None:
    if bits != 4:
        raise ValueError(f"codes are torch.uint8, which are FP4, two to a byte, but bits={bits}. Use 4")
    if scale.dtype not in FP4_GROUPS:
        raise ValueError(f"scale is {scale.dtype}, expected {' or '.join(map(str, FP4_GROUPS))}: those of NVFP4 or "
                         "MXFP4 as they are stored")  # fmt: skip
    _check_floats(codes, scale, zero_point)
    columns, group_size = 2 * codes.shape[1], FP4_GROUPS[scale.dtype]
    if columns != group_size * scale.shape[1]:
        raise ValueError(f"scale has shape {[*scale.shape]} and is {scale.dtype}, in which {columns} columns have "
                         f"groups of {group_size}")  # fmt: skip
    if scale.dtype == torch.float8_e8m0fnu:
        if global_scale is not None:
            raise ValueError("global_scale is given, but MXFP4 has none")
    elif global_scale is None or global_scale.dtype != torch.float32 or global_scale.shape != (1,):
        found = "missing" if global_scale is None else f"{global_scale.dtype} of shape {[*global_scale.shape]}"
        raise ValueError(f"global_scale is {found}, expected torch.float32 of [1]: what NVFP4's scales are divided by")


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


def unpack_e2m1(packed: Tensor) -> Tensor:
    """FP4 codes, two to a byte → what they stand for: uint8 [rows, columns / 2] → float32 [rows, columns]."""
    pairs = _pairs(packed.device).index_select(0, packed.flatten().int())
    return pairs.view(torch.float32).view(len(packed), -1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of each byte, as one number of 64 bits: looked up together they take a quarter of the time."""
    values = torch.tensor(E2M1, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1).view(torch.float64).flatten()
