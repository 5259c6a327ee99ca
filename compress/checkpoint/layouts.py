"""How one quantized layer [out, in] lies on disk, by the names that compressed-tensors has for it.

    pack-quantized        weight_packed      int32 [out, ceil(in·b/32)]      q + 2^(b-1), one bit stream per row
                          weight_scale       float [out, groups]             in the model's dtype
                          weight_shape       int64 [2]                       (out, in)
                          weight_zero_point  int32 [ceil(out·b/32), groups]  asymmetric: one bit stream per column
    int-quantized         weight             int8  [out, in]                 q, a byte each, whatever b is
                          weight_scale       float [out, groups]
                          weight_zero_point  int8  [out, groups]             asymmetric
    float-quantized       weight             E4M3  [out, in]
                          weight_scale       float [out, 1], [1] for the whole tensor, or one per block
    nvfp4-pack-quantized  weight_packed      uint8 [out, in/2]               two E2M1, the first in the low nibble
                          weight_scale       E4M3  [out, in/16]
                          weight_global_scale  float32 [1]                   what weight_scale is to be divided by
    mxfp4-pack-quantized  weight_packed      uint8 [out, in/2]
                          weight_scale       uint8 [out, in/32]              an exponent, plus 127

`groups` is 1 with one scale per channel. Each layout says beforehand what it writes (`entries`), and reads back exactly
what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from compress.checkpoint.packing import num_words, pack, unpack
from compress.core.minifloat import pack_e2m1, unpack_e2m1
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme

Entries = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name → (safetensors dtype, shape)."""


class Layout(Protocol):
    """The tensors of one layer, by the last part of their names."""

    def entries(self, shape: tuple[int, int], grid: Grid, scale_dtype: str) -> Entries:
        """What `encode` writes, by arithmetic alone."""

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors. Raises ValueError where a code is not on the grid."""

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> QuantizedTensor:
        """What `encode` was given."""


class PackQuantized:
    """Integer codes as a dense bit stream."""

    def entries(self, shape: tuple[int, int], grid: Grid, scale_dtype: str) -> Entries:
        rows, columns = shape
        entries: Entries = {
            "weight_packed": ("I32", (rows, num_words(columns, grid.bits))),
            "weight_scale": (scale_dtype, grid.scale_shape(rows, columns)),
            "weight_shape": ("I64", (2,)),
        }
        if not grid.symmetric:
            entries["weight_zero_point"] = "I32", (num_words(rows, grid.bits), grid.num_groups(columns))
        return entries

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        bits = tensor.grid.bits
        stored = {
            "weight_packed": pack(_unsigned(tensor.codes, bits), bits),
            "weight_scale": tensor.scale.contiguous(),
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero_point is not None:
            stored["weight_zero_point"] = pack(_unsigned(tensor.zero_point.T, bits), bits).T.contiguous()
        return stored

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> QuantizedTensor:
        rows, columns = shape
        codes = _signed(unpack(stored["weight_packed"], grid.bits, columns), grid.bits)
        zero_point = None
        if not grid.symmetric:
            words = stored["weight_zero_point"].T
            zero_point = _signed(unpack(words, grid.bits, rows), grid.bits).T.contiguous()
        return QuantizedTensor(codes, stored["weight_scale"], zero_point, grid)


class IntQuantized:
    """Integer codes, a byte each."""

    def entries(self, shape: tuple[int, int], grid: Grid, scale_dtype: str) -> Entries:
        scales = grid.scale_shape(*shape)
        entries: Entries = {"weight": ("I8", shape), "weight_scale": (scale_dtype, scales)}
        if not grid.symmetric:
            entries["weight_zero_point"] = "I8", scales
        return entries

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        stored = {"weight": tensor.codes.contiguous(), "weight_scale": tensor.scale.contiguous()}
        if tensor.zero_point is not None:
            stored["weight_zero_point"] = tensor.zero_point.contiguous()
        return stored

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> QuantizedTensor:
        return QuantizedTensor(stored["weight"], stored["weight_scale"], stored.get("weight_zero_point"), grid)


class FloatQuantized:
    """FP8 codes."""

    def entries(self, shape: tuple[int, int], grid: Grid, scale_dtype: str) -> Entries:
        scales = (1,) if grid.rows is None else grid.scale_shape(*shape)
        return {"weight": ("F8_E4M3", shape), "weight_scale": (scale_dtype, scales)}

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        scale = tensor.scale.view(1) if tensor.grid.rows is None else tensor.scale.contiguous()
        return {"weight": tensor.codes.contiguous(), "weight_scale": scale}

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> QuantizedTensor:
        return QuantizedTensor(stored["weight"], stored["weight_scale"].view(grid.scale_shape(*shape)), None, grid)


class FP4Pack:
    """FP4 codes, two in a byte."""

    def entries(self, shape: tuple[int, int], grid: Grid, scale_dtype: str) -> Entries:
        rows, columns = shape
        entries: Entries = {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3" if grid.scale == "e4m3" else "U8", grid.scale_shape(rows, columns)),
        }
        if grid.scale == "e4m3":
            entries["weight_global_scale"] = "F32", (1,)
        return entries

    def encode(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        stored = {"weight_packed": pack_e2m1(tensor.codes), "weight_scale": tensor.scale.contiguous()}
        if tensor.global_scale is None:
            return stored | {"weight_scale": tensor.scale.contiguous().view(torch.uint8)}
        return stored | {"weight_global_scale": tensor.global_scale.clone()}  # layers may share one, files may not

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], grid: Grid) -> QuantizedTensor:
        scale = stored["weight_scale"]
        if grid.scale == "e8m0":
            scale = scale.view(torch.float8_e8m0fnu)
        codes = unpack_e2m1(stored["weight_packed"])
        return QuantizedTensor(codes, scale, None, grid, stored.get("weight_global_scale"))


WHOLE_BYTE = 8
LAYOUTS: dict[str, Layout] = {
    "pack-quantized": PackQuantized(),
    "int-quantized": IntQuantized(),
    "float-quantized": FloatQuantized(),
    "nvfp4-pack-quantized": FP4Pack(),
    "mxfp4-pack-quantized": FP4Pack(),
}


def layout_for(scheme: Scheme) -> str:
    """The layout that engines expect of a scheme: int8 weights beside int8 inputs are not packed, all others are."""
    grid = scheme.weights
    if grid.kind == "float":
        return {"float": "float-quantized", "e4m3": "nvfp4-pack-quantized", "e8m0": "mxfp4-pack-quantized"}[grid.scale]
    return "int-quantized" if scheme.inputs and grid.bits == WHOLE_BYTE else "pack-quantized"


def _unsigned(codes: Int8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows columns"]:
    return codes.view(torch.uint8) + (1 << bits - 1)


def _signed(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int8[Tensor, "rows columns"]:
    return (codes - (1 << bits - 1)).view(torch.int8)
