"""Between a gated feed-forward's two products: activation(gate) · up, quantized per token, read once.

    silu: activation(g) = g · σ(g)        gelu_tanh: activation(g) = g · σ(√(8/π) · (g + 0.044715 · g³))

gate, up: float16, bfloat16 or float32 [tokens, inputs], both of one type; or one tensor [tokens, 2 · inputs], gate
first, as a product with both weights makes it, and no `up`. Rows may be any distance apart, values in them are not.
Gives int8 codes, a scale and the sum of the codes per token, as `token_quant` describes them, of the float32 result.

The second is GELU with tanh, as (1 + tanh t) / 2 = σ(2t). Exponentials are good to 2⁻¹⁸, so that a code may be the
neighbour of the nearest where the exact quotient lies within 0.001 of the middle. Rows that do not fit a program's
registers are read twice.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS
from quant_kernels.gate import Gate
from quant_kernels.token_quant import LEAST, new_codes, row_blocks, row_variant, to_codes, token_quant_reference

ACTIVATIONS = ("silu", "gelu_tanh")


def silu_mul_quant_reference(
    gate: Tensor, up: Tensor | None = None, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums)."""
    gate, up = gate.float().chunk(2, dim=1) if up is None else (gate.float(), up.float())
    return token_quant_reference((F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up)


@triton.jit
def _gated(gate, up, at, mask, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    g = tl.load(gate + at, mask=mask, other=0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0).to(tl.float32)
    if GELU:
        exponent = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    else:
        exponent = g
    return g / (1 + tl.exp(-exponent)) * u


@triton.jit
def _silu_mul_quant_kernel(  # type: ignore[no-untyped-def]
    gate, up, y, scale, sums, gate_stride, up_stride, K,
    GELU: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WHOLE: a block holds the row."""
    row = tl.program_id(0).to(tl.int64)
    gate += row * gate_stride
    up += row * up_stride
    y += row * K
    column = tl.arange(0, BLOCK)
    if WHOLE:
        value = _gated(gate, up, column, column < K, GELU)
        largest = tl.max(tl.abs(value), 0)
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            at = start + column
            most = tl.maximum(most, tl.abs(_gated(gate, up, at, at < K, GELU)))
        largest = tl.max(most, 0)
    largest = tl.maximum(largest, LEAST)

    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK if WHOLE else K, BLOCK):
        at = start + column
        if not WHOLE:
            value = _gated(gate, up, at, at < K, GELU)
        codes = to_codes(value, largest)
        total += codes
        tl.store(y + at, codes.to(tl.int8), mask=at < K)
    tl.store(scale + row, tl.div_rn(largest, 127.0))
    tl.store(sums + row, tl.sum(total, 0))


def silu_mul_quant(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums). Raises ValueError where an argument is not as described above."""
    _check(gate, up, activation)
    gate, up = gate.chunk(2, dim=1) if up is None else (gate, up)
    tokens, inputs = gate.shape
    codes, scale, sums = new_codes(gate, tokens, inputs)
    if codes.numel():
        _silu_mul_quant_kernel[(tokens,)](
            gate, up, codes, scale, sums, gate.stride(0), up.stride(0), inputs,
            GELU=activation == "gelu_tanh", **row_blocks(inputs),
        )  # fmt: skip
    return codes, scale, sums


def _check(gate: Tensor, up: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: can be {' or '.join(map(repr, ACTIVATIONS))}")
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS or tensor.dtype != gate.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, FLOATS))}, and both of one "
                             "type. Call .to()")  # fmt: skip
        if tensor.ndim != 2 or tensor.shape != gate.shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}, expected [tokens, inputs], gate and up the same")
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: values of a row must be next to each other. "
                             "Call .contiguous()")  # fmt: skip
        if tensor.device != gate.device:
            raise ValueError(f"{name} is on {tensor.device}, gate on {gate.device}. Move one of them")
    if up is None and gate.shape[1] % 2:
        raise ValueError(f"gate has shape {[*gate.shape]}: without up it holds both halves, an even number of columns")


library.register(
    "silu_mul_quant(Tensor gate, Tensor? up=None, str activation='silu') -> (Tensor, Tensor, Tensor)",
    launch=silu_mul_quant,
    reference=silu_mul_quant_reference,
    fake=lambda gate, up=None, activation="silu": new_codes(
        gate, gate.shape[0], gate.shape[1] // (2 if up is None else 1)
    ),
)


def gates() -> tuple[Gate, ...]:
    """Both activations, for rows that are read once and twice."""
    signature = {
        "gate": "*bf16", "up": "*bf16", "y": "*i8", "scale": "*fp32", "sums": "*i32",
        "gate_stride": "i32", "up_stride": "i32", "K": "i32",
    }  # fmt: skip
    made = []
    for capability in (80, 90):
        for width in (4096, 14336, 28672, 53248):
            for activation in ACTIVATIONS:
                variant = row_variant(_silu_mul_quant_kernel, signature, {"GELU": activation != "silu"}, width)
                name = f"silu_mul_quant {activation} {width}"
                made.append(Gate(name, variant, capability, opcode="", representative=width == 14336))
    return tuple(made)
