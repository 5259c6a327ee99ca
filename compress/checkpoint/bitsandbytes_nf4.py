"""NF4 as bitsandbytes stores it: the tensors of one layer [out, in], by the last part of their names.

    weight                               uint8 [out·in/2, 1]   two codes in a byte, the first in the high nibble
    weight.absmax                        float32 [out·in/64]
    weight.quant_map                     float32 [16]          the levels
    weight.quant_state.bitsandbytes__nf4 uint8                 JSON: block size, dtype, shape

Blocks run on from row to row, so a row must be made of whole ones for groups to be ours. The dtype is that of the
weight there was: what a reader makes of the codes, and what our scales have, which float32 holds exactly.

Others quantize the scales in turn: `absmax` is then uint8, beside

    weight.nested_absmax                 float32 [⌈out·in/64/256⌉]
    weight.nested_quant_map              float32 [256]

and the JSON has their mean. That is read and not written: 0.37 bits less per weight, but scales would be rounded once
the codes are chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.core.normal_float import BLOCK, LEVELS, NESTED_BLOCK, NestedScales, dynamic_map
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import NF4

STATE = "weight.quant_state.bitsandbytes__nf4"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def nf4_entries(shape: tuple[int, int], dtype: torch.dtype) -> Entries:
    """What `encode_nf4` writes for scales of a dtype, by arithmetic alone."""
    rows, columns = shape
    return {
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("F32", (rows * NF4.num_groups(columns),)),
        "weight.quant_map": ("F32", (len(LEVELS),)),
        STATE: ("U8", (len(write_state(shape, dtype)),)),
    }


def encode_nf4(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one layer, by the last part of their names."""
    text = write_state(tensor.shape, tensor.scale.dtype)
    return {
        "weight": pack_nibbles(tensor.codes),
        "weight.absmax": tensor.scale.float().flatten(),
        "weight.quant_map": torch.tensor(LEVELS),
        STATE: torch.tensor(list(text), dtype=torch.uint8),
    }


def decode_nf4(stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """What `encode_nf4` was given, and what anyone stored. Scales that their dtype does not hold stay in float32.

    Raises ValueError where a tensor is missing or does not fit, or where groups or levels are not ours.
    """
    for leaf in (STATE, "weight", "weight.absmax", "weight.quant_map"):
        if leaf not in stored:
            raise ValueError(f"{leaf} is missing")
    (rows, columns), dtype, state = read_state(stored[STATE])
    levels = stored["weight.quant_map"].cpu()
    if not torch.equal(levels, torch.tensor(LEVELS)):
        raise ValueError(f"weight.quant_map: {levels.tolist()} are not the levels of NF4")
    nested = "weight.nested_absmax" in stored
    _check(stored, "weight", torch.uint8, rows * columns // 2)
    _check(stored, "weight.absmax", torch.uint8 if nested else torch.float32, rows * columns // BLOCK)
    absmax = stored["weight.absmax"].view(rows, -1)
    exact = _nested(absmax, stored, state).dequantize() if nested else absmax
    scale = exact.to(dtype)
    codes = unpack_nibbles(stored["weight"]).view(rows, columns)
    return QuantizedTensor(codes, scale if torch.equal(scale.float(), exact) else exact, None, NF4)


def write_state(shape: tuple[int, int], dtype: torch.dtype) -> bytes:
    """The JSON of a layer."""
    name = str(dtype).removeprefix("torch.")
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": name, "shape": list(shape)}).encode()


def read_state(stored: UInt8[Tensor, " bytes"]) -> tuple[tuple[int, int], torch.dtype, dict[str, Any]]:
    """Shape, dtype, and all that anyone's JSON says. Raises ValueError where groups are not ours."""
    state = json.loads(bytes(stored.tolist()))
    shape, block, dtype = (state.get(key) for key in ("shape", "blocksize", "dtype"))
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{STATE} says it has shape {shape}, expected two sizes, out and in")
    if block != BLOCK or shape[1] % BLOCK:
        raise ValueError(
            f"rows of {shape[1]} columns in blocks of {block} cannot be read, only whole blocks of {BLOCK}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"{STATE} says {dtype!r}, expected one of {', '.join(FLOATS)}")
    return (shape[0], shape[1]), FLOATS[dtype], state


def pack_nibbles(codes: UInt8[Tensor, "out in"]) -> UInt8[Tensor, "half 1"]:
    """Codes 0 … 15, two to a byte, the first in the high nibble. Raises ValueError where one would be left over."""
    if codes.numel() % 2:
        raise ValueError(f"{list(codes.shape)} is an odd number of codes; they are stored two to a byte")
    pairs = codes.reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack_nibbles(packed: UInt8[Tensor, "half 1"]) -> UInt8[Tensor, " codes"]:
    """The codes that `pack_nibbles` was given, in one row."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()


def _check(stored: Mapping[str, Tensor], leaf: str, dtype: torch.dtype, size: int) -> None:
    tensor = stored[leaf]
    if tensor.dtype != dtype or tensor.numel() != size:
        raise ValueError(f"{leaf} is {tensor.numel()} of {tensor.dtype}, expected {size} of {dtype}")


def _nested(codes: UInt8[Tensor, "out groups"], stored: Mapping[str, Tensor], state: Mapping[str, Any]) -> NestedScales:
    largest, levels = stored["weight.nested_absmax"], stored.get("weight.nested_quant_map")
    mean, block = state.get("nested_offset"), state.get("nested_blocksize")
    own = levels is not None and torch.equal(levels, dynamic_map(levels.device)) and block == NESTED_BLOCK
    if not own or not isinstance(mean, float):
        raise ValueError(f"nested_blocksize={block}, nested_offset={mean} or nested_quant_map is not bitsandbytes' own")
    _check(stored, "weight.nested_absmax", torch.float32, -(-codes.numel() // NESTED_BLOCK))
    return NestedScales(codes, largest, mean)
