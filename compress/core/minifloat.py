"""Floats of 4 and 8 bits: rounding to the nearest level, and two FP4 codes in a byte.

E4M3 reaches from -448 to 448; E2M1 has the magnitudes 0, ½, 1, 1½, 2, 3, 4, 6, each of which is an E4M3 number too. So
codes of both are float8_e4m3fn tensors of level values, and dequantize like integers. Halves go to the even mantissa,
what lies beyond the end goes to the end (OCP Microscaling Formats, 2023).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
EMPTY_E4M3 = 0.125
"""The scale of a group without numbers, as compressed-tensors has it."""


def round_e4m3(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The nearest E4M3 numbers, in float32."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_e2m1(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The nearest E2M1 numbers, in float32.

    Levels are ½ apart below 2, 1 apart from 2 to 4, 2 apart beyond: the step is half the power of two below |x|.
    """
    x = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    step = torch.frexp(x.abs().clamp_(min=1))[1].sub_(2).float().exp2_()
    return (x / step).round_().mul_(step)


def stored_e4m3(scale: Float[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
    """Scales in E4M3, never 0."""
    stored = round_e4m3(scale)
    return torch.where(stored > 0, stored, EMPTY_E4M3).to(torch.float8_e4m3fn)


def power_of_two(largest: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The scale of E2M1 numbers of at most this magnitude: 2^(floor(log2) - 2), twice that from 1.75 · 2^k on."""
    mantissa, exponent = torch.frexp(largest.float())
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - 3 + (mantissa >= 7 / 8))
    return scale.clamp(2.0**-127, 2.0**127)


def overall_scale(largest: Float[Tensor, ""], room: float = E4M3_MAX) -> Float[Tensor, 1]:
    """What NVFP4's E4M3 scales are divided by, for numbers of at most this magnitude; the largest scale is `room`."""
    tiny = torch.finfo(torch.float32).tiny
    return (room * E2M1_MAX / largest.float().clamp(min=tiny)).nan_to_num(posinf=1.0).view(1)


def pack_e2m1(codes: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "rows half"]:
    """Levels as 4-bit codes, sign and index of the magnitude, the first of two in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"codes have {codes.shape[-1]} columns; FP4 is stored two to a byte")
    value = codes.float()
    magnitude = value.abs()
    # Below 2 the index counts halves; then 2, 3, 4, 6 follow as 4 … 7.
    index = torch.where(magnitude < 2, magnitude * 2, torch.where(magnitude < 6, magnitude + 2, 7.0)).to(torch.uint8)
    code = index | (value.signbit().to(torch.uint8) << 3)
    return code[..., ::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: UInt8[Tensor, "rows half"]) -> Float[Tensor, "rows columns"]:
    """The inverse of `pack_e2m1`: float8_e4m3fn levels."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    levels = torch.cat((levels, -levels)).to(torch.float8_e4m3fn)
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return levels.view(torch.uint8)[code.long()].view(torch.float8_e4m3fn)
