"""bitsandbytes: how NF4 and int8 layers lie on disk, for `from_pretrained` of transformers.

    4 bits  weight                        uint8 [out·in/2, 1]      two codes in a byte, the first in the high nibble
            weight.absmax                 float32 [out·in/64]      uint8 where scales are quantized too, and then
            weight.nested_absmax          float32 [⌈out·in/64/256⌉]
            weight.nested_quant_map       float32 [256]
            weight.quant_map              float32 [16]             the levels
            weight.quant_state.bitsandbytes__nf4  uint8            JSON: block size, dtype, shape
    8 bits  weight                        int8 [out, in]           w = code · SCB / 127
            SCB                           float32 [out]
            weight_format                 uint8 []                 0: rows

Blocks run on from row to row, so a row must be made of whole ones for groups to be ours. Nested scales put a number
into the JSON whose length nobody knows beforehand; blanks after it, which JSON does not mind, make it a fixed one.

SCB is 127 scales. A scale of 16 bits times 127 fits into float32, and comes back exactly. bitsandbytes fills -127 … 127
and takes SCB for the row's largest magnitude, but it only ever multiplies: our scales, which may be negative and use
-128, mean the same to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from compress.core.normal_float import LEVELS, NESTED_BLOCK, NestedScales, dynamic_map
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid

STATE = "weight.quant_state.bitsandbytes__nf4"
NUMBER_LENGTH = 24
"""The most characters a float is written in."""
INT8 = Grid(8)
INT8_MAX = 127


def encode_nf4(
    codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"] | NestedScales, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The stored tensors of one layer, by the last part of their names. `dtype`: of the weight that was quantized."""
    nested = isinstance(scale, NestedScales)
    flat = (scale.codes if isinstance(scale, NestedScales) else scale.float()).flatten()
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": codes.numel() // flat.numel(),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(codes.shape),
    }
    stored = {"weight": pack_nibbles(codes), "weight.absmax": flat, "weight.quant_map": torch.tensor(LEVELS)}
    if isinstance(scale, NestedScales):
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": scale.mean}
        stored["weight.nested_absmax"] = scale.largest.contiguous()
        stored["weight.nested_quant_map"] = dynamic_map(torch.device("cpu")).clone()
    text = json.dumps(state)
    if nested:
        text += " " * (NUMBER_LENGTH - len(json.dumps(state["nested_offset"])))
    return stored | {STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def decode_nf4(
    stored: Mapping[str, Tensor],
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out groups"] | NestedScales, torch.dtype]:
    """What `encode_nf4` was given, by anyone. Raises ValueError where groups or levels are not ours."""
    state = json.loads(bytes(stored[STATE].tolist()))
    rows, columns = state["shape"]
    if columns % state["blocksize"]:
        raise ValueError(f"rows of {columns} columns are not made of whole blocks of {state['blocksize']}")
    if not torch.equal(stored["weight.quant_map"].cpu(), torch.tensor(LEVELS)):
        raise ValueError(f"weight.quant_map: {stored['weight.quant_map'].tolist()} are not the levels of NF4")
    codes = unpack_nibbles(stored["weight"]).view(rows, columns)
    scale: Tensor | NestedScales = stored["weight.absmax"].view(rows, -1)
    if "weight.nested_absmax" in stored:
        _check_nested(state, stored["weight.nested_quant_map"])
        scale = NestedScales(
            stored["weight.absmax"].view(rows, -1), stored["weight.nested_absmax"], state["nested_offset"]
        )
    return codes, scale, getattr(torch, state["dtype"])


def pack_nibbles(codes: UInt8[Tensor, "out in"]) -> UInt8[Tensor, "half 1"]:
    """Codes 0 … 15, two to a byte, the first in the high nibble. Raises ValueError where one would be left over."""
    if codes.numel() % 2:
        raise ValueError(f"{list(codes.shape)} is an odd number of codes; they are stored two to a byte")
    pairs = codes.reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack_nibbles(packed: UInt8[Tensor, "half 1"]) -> UInt8[Tensor, " codes"]:
    """The codes that `pack_nibbles` was given, in one row."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()


def encode_int8(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one layer. Raises ValueError unless it has 8 bits and one symmetric scale per row."""
    if tensor.grid != INT8:
        raise ValueError(f"{tensor.grid} cannot be stored as int8 rows; use w8a8, symmetric, group_size: null")
    return {
        "weight": tensor.codes.contiguous(),
        "SCB": tensor.scale.float().flatten() * INT8_MAX,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def decode_int8(stored: Mapping[str, Tensor], dtype: torch.dtype) -> QuantizedTensor:
    """What `encode_int8` was given, exactly if its scales were of 16 bits. `dtype`: theirs.

    Raises ValueError where the codes are tiled for a GPU, as bitsandbytes once did.
    """
    if int(stored["weight_format"]):
        raise ValueError(f"weight_format {int(stored['weight_format'])} cannot be read, only 0, which is rows")
    return QuantizedTensor(stored["weight"], (stored["SCB"] / INT8_MAX).to(dtype).unsqueeze(1), None, INT8)


def _check_nested(state: Mapping[str, Any], levels: Tensor) -> None:
    if state["nested_blocksize"] != NESTED_BLOCK or not torch.equal(levels, dynamic_map(levels.device)):
        raise ValueError(f"nested_blocksize={state['nested_blocksize']} or nested_quant_map is not bitsandbytes' own")
