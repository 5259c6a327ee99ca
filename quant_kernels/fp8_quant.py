"""Activations to float8_e4m3fn, one scale per token or per token and 128 inputs: codes = round(x · (448 / max |x|)).

x: float16, bfloat16 or float32 [tokens, inputs], contiguous, finite. codes: float8_e4m3fn [tokens, inputs]. scale:
float32, max |x| / 448 of what shares it, and never 0: [tokens], or, `grouped`, [tokens, ceil(inputs / 128)] (the last
group may be shorter), as DeepSeek-V3 has it (arXiv 2412.19437). Zeros get codes of 0; what is not a number stays so.

The product with 448 / max |x| is rounded to float32, as is that factor, and then to the nearest of the 253 values, half
to even, and to ±448 beyond them: by an instruction where there is one, on NVIDIA from Ada on. Elsewhere, and in
Triton's interpreter, whose own conversion is wrong, integers do the same, bit for bit. From 2⁻⁶ on a code is the
float's exponent and three bits of its mantissa, rounded by adding almost half of what is cut off, and the bit before
it; a carry goes into the exponent, as it should. Smaller ones are multiples of 2⁻⁹, which is what the last bit of 2¹⁴
is worth: adding that rounds them, and leaves the code in the low bits.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant
from quant_kernels.token_quant import LEAST, LONGEST, row_blocks, row_variant

GROUP = 128
"""Inputs of a token that share a scale, if `grouped`."""
LARGEST = tl.constexpr(448.0)


def fp8_quant_reference(x: Tensor, grouped: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    tokens, inputs = x.shape
    width = GROUP if grouped else inputs
    value = F.pad(x.float(), (0, -inputs % width)).view(tokens, -1, width)
    largest = value.abs().amax(dim=2, keepdim=True).clamp_min(LEAST.value)
    scaled = (value * (largest.new_tensor(LARGEST.value) / largest)).clamp(-LARGEST.value, LARGEST.value)
    codes = scaled.to(torch.float8_e4m3fn).view(tokens, -1)[:, :inputs].contiguous()
    scale = (largest / LARGEST.value).squeeze(2)
    return codes, scale if grouped else scale.squeeze(1)


@triton.jit
def to_fp8(value, CAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 → float8_e4m3fn as its byte: nearest, half to even, ±448 beyond it, NaN of NaN. CAST: see `has_fp8`."""
    if CAST:
        code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 15
        wide = tl.where(size < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))  # 2⁻⁶; 448
        code = (tl.where(size > 0x7F800000, 0x7F, wide) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def _fp8_quant_kernel(x, y, scale, K, CAST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One scale per token. WHOLE: a block holds the row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    y += row * K
    column = tl.arange(0, BLOCK)
    if WHOLE:
        value = tl.load(x + column, mask=column < K, other=0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(value), 0), LEAST)
        tl.store(y + column, to_fp8(value * tl.div_rn(LARGEST, largest), CAST), mask=column < K)
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + column, mask=column < K - start, other=0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value))
        largest = tl.maximum(tl.max(most, 0), LEAST)
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + column, mask=column < K - start, other=0).to(tl.float32)
            code = to_fp8(value * tl.div_rn(LARGEST, largest), CAST)
            tl.store(y + start + column, code, mask=column < K - start)
    tl.store(scale + row, tl.div_rn(largest, LARGEST))


@triton.jit
def _fp8_quant_grouped_kernel(x, y, scale, K, CAST: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """GROUPS: how many of a token a program quantizes."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + row * K + column, mask=column < K, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 1), LEAST)
    code = to_fp8(value * tl.div_rn(LARGEST, largest)[:, None], CAST)
    tl.store(y + row * K + column, code, mask=column < K)
    groups = tl.cdiv(K, 128)
    tl.store(scale + row * groups + group, tl.div_rn(largest, LARGEST), mask=group < groups)


def fp8_quant(x: Tensor, grouped: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, scale). Raises ValueError where x is not as described above."""
    expect("x", x, FLOATS, [None, None], x.device)
    tokens, inputs = x.shape
    codes, scale = _room(x, grouped)
    bytes, cast = codes.view(torch.uint8), has_fp8(x.device)  # noqa: A001
    if tokens and grouped:
        grid = (tokens, triton.cdiv(scale.shape[1], GROUPS))
        _fp8_quant_grouped_kernel[grid](x, bytes, scale, inputs, CAST=cast, GROUPS=GROUPS, num_warps=4)
    elif tokens:
        _fp8_quant_kernel[(tokens,)](x, bytes, scale, inputs, CAST=cast, **row_blocks(inputs))
    return codes, scale


GROUPS = 16
"""Of one program: with four warps, 16 values of a group to a thread."""


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether its instructions convert to float8_e4m3fn and multiply it: NVIDIA from Ada on."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def _room(x: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    tokens, inputs = x.shape
    if not inputs:
        raise ValueError(f"x has shape {[*x.shape]}, which leaves rows without values. They need one or more")
    shape = (tokens, triton.cdiv(inputs, GROUP)) if grouped else (tokens,)
    codes = torch.empty(tokens, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


library.register(
    "fp8_quant(Tensor x, bool grouped=False) -> (Tensor, Tensor)",
    launch=fp8_quant,
    reference=fp8_quant_reference,
    fake=lambda x, grouped=False: _room(x, grouped),
)


def gates() -> tuple[Gate, ...]:
    """The widest row that is read once, one that is read twice, and groups."""
    signature = {"x": "*bf16", "y": "*u8", "scale": "*fp32", "K": "i32"}
    made = []
    for capability in (80, 90):
        cast = {"CAST": capability == 90}
        grouped = Variant(_fp8_quant_grouped_kernel, signature, cast | {"GROUPS": GROUPS}, tuple(signature), 4, 3)
        made.append(Gate("fp8_quant grouped", grouped, capability, opcode="", representative=capability == 90))
        for width in (4096, LONGEST, 2 * LONGEST):
            variant = row_variant(_fp8_quant_kernel, signature, cast, width)
            made.append(Gate(f"fp8_quant {width}", variant, capability, opcode="", representative=width == LONGEST))
    return tuple(made)
