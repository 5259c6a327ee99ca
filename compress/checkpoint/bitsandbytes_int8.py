"""LLM.int8() as bitsandbytes stores it: the tensors of one layer [out, in], by the last part of their names.

    weight         int8 [out, in]
    SCB            float32 [out]    127 · scale: the largest |w| of a row that bitsandbytes itself has quantized
    weight_format  uint8 []         0: row by row

A code times `SCB / 127` is the weight. One float32 scale in a hundred is the quotient of no `SCB`, so ours are
bfloat16, whatever the weight is: `SCB` and its quotient are then exact, and so is `code · SCB · (1/127)`, which is how
bitsandbytes computes it. -128 and negative scales, which it never chooses, are numbers to it like any other.

What is stored is w8a16. bitsandbytes computes more coarsely while the model runs: inputs too are rounded to int8, token
by token, except in columns where one exceeds a threshold (Dettmers et al., arXiv 2208.07339).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.checkpoint.layouts import Entries
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid

INT8 = Grid(8)
SCALE = "SCB"
FORMAT = "weight_format"
SCALE_DTYPE = torch.bfloat16
LARGEST = 127


def int8_entries(shape: tuple[int, int]) -> Entries:
    """What `encode_int8` writes, by arithmetic alone."""
    return {"weight": ("I8", shape), SCALE: ("F32", shape[:1]), FORMAT: ("U8", ())}


def encode_int8(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one layer. Raises ValueError where its scales would not be given back."""
    if tensor.scale.dtype != SCALE_DTYPE:
        raise ValueError(f"scales are {tensor.scale.dtype}, expected {SCALE_DTYPE}: others may be no SCB / {LARGEST}")
    return {
        "weight": tensor.codes.contiguous(),
        SCALE: tensor.scale.flatten().float() * LARGEST,
        FORMAT: torch.zeros((), dtype=torch.uint8),
    }


def decode_int8(stored: Mapping[str, Tensor]) -> QuantizedTensor:
    """What `encode_int8` was given, and what anyone stored; scales that bfloat16 does not hold are float32.

    Raises ValueError where a tensor is missing or does not fit, or where codes are not stored row by row.
    """
    for leaf in ("weight", SCALE):
        if leaf not in stored:
            raise ValueError(f"{leaf} is missing")
    codes, largest = stored["weight"], stored[SCALE]
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"weight is {list(codes.shape)} of {codes.dtype}, expected [out, in] of torch.int8")
    if largest.dtype != torch.float32 or largest.shape != codes.shape[:1]:
        expected = f"[{len(codes)}] of torch.float32"
        raise ValueError(f"{SCALE} is {list(largest.shape)} of {largest.dtype}, expected {expected}")
    if FORMAT in stored and stored[FORMAT].item() != 0:
        raise ValueError(f"{FORMAT} is {stored[FORMAT].item()}; only 0, codes row by row, can be read")
    exact = (largest / LARGEST).unsqueeze(1)
    scale = exact.to(SCALE_DTYPE)
    return QuantizedTensor(codes, scale if torch.equal(scale.float(), exact) else exact, None, INT8)
