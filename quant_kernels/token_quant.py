"""Activations to int8, one scale per token: codes[m, k] = round(x[m, k] / scale[m]), scale[m] = max |x[m, :]| / 127.

x: float16, bfloat16 or float32 [tokens, inputs], contiguous, finite. codes: int8 [tokens, inputs], -127 … 127. scale:
float32 [tokens], never 0: a row of zeros gets codes of 0. sums: int32 [tokens], of each row of codes, by which products
with unsigned weights take off zero points.

Codes are the product with 127 / max |x|, itself rounded to float32, to the nearest integer, half to even: exactly
these, on every device. Rounding is one multiply-add: added to 3 · 2²², whose last bit is worth 1, a number below 2²²
is rounded by the addition, and stands in the low bits of the result as an integer. What makes activations, a norm or a
gate, quantizes them the same way with the functions of this file (`norm_quant`, `silu_mul_quant`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant

LEAST = tl.constexpr(1e-30)
"""Rows without a larger value are quantized as if they had one, so that 127 divided by it is finite."""
SHIFTER = tl.constexpr(12582912.0)
SHIFTER_BITS = tl.constexpr(0x4B400000)
"""3 · 2²², as a number and as its bits."""
LONGEST = 32768
"""Longer rows do not stay in registers, but are read twice, a part of this length at a time:"""
PART = 4096


def token_quant_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums)."""
    value = x.float()
    largest = value.abs().amax(dim=1).clamp_min(LEAST.value)
    exact = (
        value.double() * (largest.new_tensor(127) / largest)[:, None].double()
    )  # of two float32 numbers, float64 holds it
    codes = exact.round().to(torch.int8)
    return codes, largest / 127, codes.sum(dim=1, dtype=torch.int32)


@triton.jit
def to_codes(value, largest):  # type: ignore[no-untyped-def]
    """float32 values of a row and the largest magnitude in it, at least `LEAST` → codes, int32."""
    shifted = tl.fma(value, tl.div_rn(127.0, largest), SHIFTER)
    return shifted.to(tl.int32, bitcast=True) - SHIFTER_BITS


@triton.jit
def _token_quant_kernel(x, y, scale, sums, K, WHOLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """WHOLE: a block holds the row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    y += row * K
    column = tl.arange(0, BLOCK)
    if WHOLE:
        value = tl.load(x + column, mask=column < K, other=0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(value), 0), LEAST)
        codes = to_codes(value, largest)
        tl.store(y + column, codes.to(tl.int8), mask=column < K)
        total = tl.sum(codes, 0)
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + column, mask=column < K - start, other=0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value))
        largest = tl.maximum(tl.max(most, 0), LEAST)
        parts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + column, mask=column < K - start, other=0).to(tl.float32)
            codes = to_codes(value, largest)
            tl.store(y + start + column, codes.to(tl.int8), mask=column < K - start)
            parts += codes
        total = tl.sum(parts, 0)
    tl.store(scale + row, tl.div_rn(largest, 127.0))
    tl.store(sums + row, total)


def token_quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums). Raises ValueError where x is not as described above."""
    expect("x", x, FLOATS, [None, None], x.device)
    tokens, inputs = x.shape
    codes, scale, sums = new_codes(x, tokens, inputs)
    if codes.numel():
        _token_quant_kernel[(tokens,)](x, codes, scale, sums, inputs, **row_blocks(inputs))
    return codes, scale, sums


def new_codes(x: Tensor, tokens: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for codes, scales and sums on the device of x. Raises ValueError where rows are empty."""
    if not inputs:
        raise ValueError(f"x has shape {[*x.shape]}, which leaves rows without values. They need one or more")
    return (
        torch.empty(tokens, inputs, dtype=torch.int8, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, dtype=torch.int32, device=x.device),
    )


def row_blocks(width: int) -> dict[str, Any]:
    """How a kernel with a program per row is launched: up to 16 warps, for enough loads in flight when rows are few."""
    block = triton.next_power_of_2(width) if width <= LONGEST else PART
    return {"BLOCK": block, "WHOLE": width <= LONGEST, "num_warps": max(1, min(16, block // 512)), "num_stages": 2}


def row_variant(kernel: Any, signature: dict[str, str], constants: dict[str, Any], width: int) -> Variant:
    """As it is launched for rows of `width`, a multiple of 16."""
    blocks = row_blocks(width)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or kind == "i32")
    return Variant(kernel, signature, constants | blocks, aligned, **options)


library.register(
    "token_quant(Tensor x) -> (Tensor, Tensor, Tensor)",
    launch=token_quant,
    reference=token_quant_reference,
    fake=lambda x: new_codes(x, *x.shape),
)


def gates() -> tuple[Gate, ...]:
    """The widest row that is read once, and one that is read twice."""
    signature = {"x": "*bf16", "y": "*i8", "scale": "*fp32", "sums": "*i32", "K": "i32"}
    return tuple(
        Gate(f"token_quant {width}", row_variant(_token_quant_kernel, signature, {}, width), capability, opcode="",
             representative=width == LONGEST)
        for capability in (80, 90) for width in (4096, LONGEST, 2 * LONGEST)
    )  # fmt: skip
