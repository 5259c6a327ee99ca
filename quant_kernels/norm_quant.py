"""Between two linear layers: add to the residual, RMSNorm, and quantize per token for the next layer, read once.

    residual ← residual + x
    y[m, k] = residual[m, k] / √(mean_k residual[m, k]² + epsilon) · (weight[k] + offset)

x: [tokens, inputs] of float16, bfloat16 or float32; residual: likewise and changed in place, or None, then x takes its
place. weight: [inputs] of any of these. offset: 0 in Llama, 1 in Gemma, which stores weight - 1. All contiguous.

`norm_quant` gives y as int8 codes with a scale and the sum of the codes per token, as `token_quant` describes them. The
root divides a whole row and so never touches a code: it goes into the scale, whose relative error is 2⁻²⁰ at most.

`norm_sums` gives y in the type of x and its sums over groups of inputs, float32 [inputs / group_size, tokens], with
which a product with group-wise quantized weights takes off their zero points.

The sum with the residual is rounded to the type of the residual, and the rounded one is what is normalised; from there
on everything is float32. Models that round the normalised value to 16 bits before the weight is multiplied differ.
Rows that do not fit a program's registers are read twice. Triton's interpreter truncates to bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate
from quant_kernels.token_quant import LEAST, new_codes, row_blocks, row_variant, to_codes

GROUPS = (32, 64, 128, 256)
"""What `group_size` can be."""


def norm_quant_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums)."""
    weighted, inverse_root = _weighted(x, weight, residual, epsilon, offset)
    largest = weighted.abs().amax(dim=1).clamp_min(LEAST.value)
    exact = weighted.double() * (largest.new_tensor(127) / largest)[:, None].double()
    codes = exact.round().to(torch.int8)
    return codes, largest * inverse_root / 127, codes.sum(dim=1, dtype=torch.int32)


def norm_sums_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, offset: float, group_size: int
) -> tuple[Tensor, Tensor]:
    """(y, sums)."""
    weighted, inverse_root = _weighted(x, weight, residual, epsilon, offset)
    y = (weighted * inverse_root[:, None]).to(x.dtype)
    return y, y.float().view(len(y), -1, group_size).sum(dim=2).T.contiguous()


def _weighted(
    x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, offset: float
) -> tuple[Tensor, Tensor]:
    """residual · (weight + offset), and what each row is yet to be multiplied by, in float32."""
    if residual is not None:
        residual.copy_(x.float() + residual.float())
    value = (x if residual is None else residual).float()
    inverse_root = (value.square().mean(dim=1) + epsilon).rsqrt()
    return value * (weight.float() + offset), inverse_root


@triton.jit
def _added(x, residual, at, mask):  # type: ignore[no-untyped-def]
    """A row's values, float32, after adding them to the residual, if there is one."""
    value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _weight(weight, at, mask, offset):  # type: ignore[no-untyped-def]
    return tl.load(weight + at, mask=mask, other=0).to(tl.float32) + offset


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, weight, residual, y, scale, sums, M, K, epsilon, offset,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GROUP: inputs that are summed; 0: quantize instead. WHOLE: a block holds the row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    y += row * K
    if residual is not None:
        residual += row * K
    column = tl.arange(0, BLOCK)
    if WHOLE:
        mask = column < K
        value = _added(x, residual, column, mask)
        weighted = value * _weight(weight, column, mask, offset)
        square = tl.sum(value * value, 0)
        largest = tl.max(tl.abs(weighted), 0)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            at = start + column
            value = _added(x, residual, at, at < K)
            squares += value * value
            most = tl.maximum(most, tl.abs(value * _weight(weight, at, at < K, offset)))
        square = tl.sum(squares, 0)
        largest = tl.max(most, 0)
        source = x
        if residual is not None:
            source = residual
            tl.debug_barrier()  # each thread may read what another has written
    inverse_root = tl.rsqrt(square / K + epsilon)
    largest = tl.maximum(largest, LEAST)

    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK if WHOLE else K, BLOCK):
        at = start + column
        mask = at < K
        if not WHOLE:
            weighted = tl.load(source + at, mask=mask, other=0).to(tl.float32) * _weight(weight, at, mask, offset)
        if GROUP == 0:
            codes = to_codes(weighted, largest)
            total += codes
            tl.store(y + at, codes.to(tl.int8), mask=mask)
        else:
            normalised = (weighted * inverse_root).to(y.dtype.element_ty)
            tl.store(y + at, normalised, mask=mask)
            grouped = tl.sum(tl.reshape(normalised.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(sums + group.to(tl.int64) * M + row, grouped, mask=group < K // GROUP)
    if GROUP == 0:
        tl.store(scale + row, largest * inverse_root / 127)
        tl.store(sums + row, tl.sum(total, 0))


def norm_quant(
    x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums). Raises ValueError where an argument is not as described above."""
    _check(x, weight, residual, epsilon)
    tokens, inputs = x.shape
    codes, scale, sums = new_codes(x, tokens, inputs)
    if codes.numel():
        _norm_kernel[(tokens,)](
            x, weight, residual, codes, scale, sums, tokens, inputs, epsilon, offset, GROUP=0, **row_blocks(inputs)
        )
    return codes, scale, sums


def norm_sums(
    x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float, offset: float, group_size: int
) -> tuple[Tensor, Tensor]:
    """(y, sums). Raises ValueError where an argument is not as described above."""
    _check(x, weight, residual, epsilon)
    tokens, inputs = x.shape
    if group_size not in GROUPS or inputs % group_size:
        raise ValueError(f"group_size={group_size}: can be {', '.join(map(str, GROUPS))} where it divides the {inputs} "
                         "inputs. Pad x and the weight, or use a smaller one")  # fmt: skip
    y, sums = _new_sums(x, group_size)
    if y.numel():
        _norm_kernel[(tokens,)](
            x, weight, residual, y, None, sums, tokens, inputs, epsilon, offset, GROUP=group_size, **row_blocks(inputs)
        )
    return y, sums


def _new_sums(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.shape[1] // group_size, x.shape[0], dtype=torch.float32, device=x.device)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, epsilon: float) -> None:
    expect("x", x, FLOATS, [None, None], x.device)
    expect("weight", weight, FLOATS, [x.shape[1]], x.device)
    if residual is not None:
        expect("residual", residual, FLOATS, x.shape, x.device)
    if not epsilon >= torch.finfo(torch.float32).tiny:
        raise ValueError(f"epsilon={epsilon}: must be positive, in float32 too, or rows of zeros have no norm")


library.register(
    "norm_quant(Tensor x, Tensor weight, Tensor(a!)? residual, float epsilon, float offset=0.0) "
    "-> (Tensor, Tensor, Tensor)",
    launch=norm_quant,
    reference=norm_quant_reference,
    fake=lambda x, weight, residual, epsilon, offset=0.0: new_codes(x, *x.shape),
)
library.register(
    "norm_sums(Tensor x, Tensor weight, Tensor(a!)? residual, float epsilon, float offset, int group_size) "
    "-> (Tensor, Tensor)",
    launch=norm_sums,
    reference=norm_sums_reference,
    fake=lambda x, weight, residual, epsilon, offset, group_size: _new_sums(x, group_size),
)


def gates() -> tuple[Gate, ...]:
    """Both forms with a residual, for rows that are read once and twice."""
    signature = {
        "x": "*bf16", "weight": "*bf16", "residual": "*bf16", "y": "*i8", "scale": "*fp32", "sums": "*i32",
        "M": "i32", "K": "i32", "epsilon": "fp32", "offset": "fp32",
    }  # fmt: skip
    summing = {name: kind for name, kind in signature.items() if name != "scale"} | {"y": "*bf16", "sums": "*fp32"}
    made = []
    for capability in (80, 90):
        for width in (4096, 8192, 32768, 65536):
            for name, arguments, constants in (
                ("norm_quant", signature, {"GROUP": 0}),
                ("norm_sums", summing, {"GROUP": 128, "scale": None}),
            ):
                variant = row_variant(_norm_kernel, arguments, constants, width)
                made.append(Gate(f"{name} {width}", variant, capability, opcode="", representative=width == 4096))
    return tuple(made)
