"""Keys and values in few bits: what the numbers of a quantized KV cache mean, and how they lie in memory.

Contract. Keys and values are two sides, each with a `KVFormat` of its own. D = head_dim channels of a token and head,
x = scale · code + minimum, become

    codes     uint8 [sequences, kv_heads, tokens, D · bits / 8]
    scale,    "token":    [sequences, kv_heads, tokens, groups], of `group_size` consecutive channels
    minimum   "channel":  [sequences, kv_heads, tokens / 32, D], of 32 consecutive tokens, tokens a multiple of 32
              fp8:        scale [kv_heads], the same for all tokens, calibrated; no minimum

Of 4 and 2 bits, codes are unsigned and go up from the minimum of their group. Of 8 bits they are symmetric, -127 … 127
in two's complement or float8_e4m3fn, and there is no minimum. Byte j of a token holds the codes of channels j + i · D ·
bits / 8, i = 0 in its lowest bits: a *plane* i is a run of channels, and unpacking is the same for all of them.

In pages, sequences are blocks of `block_tokens` tokens, a multiple of 32: codes [blocks, kv_heads, block_tokens, …],
and scales likewise. A block table, int32 [batch, most blocks of a sequence], says which ones a sequence has.

Scales are float16 or bfloat16, like the model; float32 where that is. Codes are found with the scale as it is stored,
(x - minimum) / scale in float32, to the nearest, half to even. A scale may be 0, and codes are 0 then: what does not
vary comes back as its minimum, exactly. (Keys per channel and values per token are from KIVI, arXiv 2402.02750, which
divides by 0 there.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quant_kernels.arguments import FLOATS, expect
from quant_kernels.layout import Levels

TOKENS = 32
"""Consecutive tokens that share a scale per channel; blocks of a paged cache are made of so many."""
GROUP = 32
"""Channels that share a scale, where not all do."""
FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8_e4m3fn."""


class Planes(NamedTuple):
    """One side of a cache, in the shapes above."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)


@dataclass(frozen=True)
class KVFormat:
    """Of keys or of values. Raises ValueError where there is none such."""

    bits: int
    """8, 4 or 2."""
    per: Literal["token", "channel"] = "token"
    """Whether channels of a token share a scale, or tokens of a channel."""
    group_size: int | None = None
    """Channels of a token that share a scale, 32; None: all of a head."""
    levels: Levels = "int"
    """Whole numbers, or those of float8_e4m3fn with one scale per head."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2):
            raise ValueError(f"bits={self.bits}: keys and values have 8, 4 or 2")
        if self.bits == 8 and (self.per, self.group_size) != ("token", None):
            raise ValueError(f"per={self.per!r}, group_size={self.group_size}: 8 bits have one scale for all channels "
                             "of a token and head. Leave both out")  # fmt: skip
        if self.levels == "fp8" and self.bits != 8:
            raise ValueError(f"levels='fp8' have 8 bits, not {self.bits}")
        if self.per == "channel" and self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size}: with per='channel' no channels share a scale. Leave it out"
            )
        if self.group_size not in (None, GROUP):
            raise ValueError(f"group_size={self.group_size}: scales are of {GROUP} channels or of all (None)")

    @property
    def symmetric(self) -> bool:
        """Whether there is no minimum."""
        return self.bits == 8

    def check(self, head_dim: int) -> None:
        """Raise ValueError where heads of so many channels do not divide into planes and groups."""
        multiple = self.group_size or 8
        if head_dim < 1 or head_dim % multiple:
            raise ValueError(f"head_dim={head_dim} is not a multiple of {multiple}. Leave this cache unquantized, or "
                             "choose another group_size")  # fmt: skip

    def code_shape(self, sequences: int, kv_heads: int, tokens: int, head_dim: int) -> tuple[int, ...]:
        return sequences, kv_heads, tokens, head_dim * self.bits // 8

    def scale_shape(self, sequences: int, kv_heads: int, tokens: int, head_dim: int) -> tuple[int, ...]:
        """Also of the minimum, where there is one."""
        if self.levels == "fp8":
            return (kv_heads,)
        if self.per == "channel":
            return sequences, kv_heads, tokens // TOKENS, head_dim
        return sequences, kv_heads, tokens, head_dim // (self.group_size or head_dim)

    def token_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that a token takes in one head: its codes, and its share of scales and minima of `dtype`."""
        self.check(head_dim)
        numbers = 0 if self.levels == "fp8" else 1 if self.symmetric else 2
        of_scales = numbers * dtype.itemsize
        if self.per == "channel":
            return (head_dim * self.bits + head_dim * of_scales * 8 // TOKENS) // 8
        return head_dim * self.bits // 8 + head_dim // (self.group_size or head_dim) * of_scales

    def new(
        self, sequences: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> Planes:
        """Room for so many tokens, all of it 0; scales of fp8 are 1. In pages: so many blocks, and their tokens."""
        self.check(head_dim)
        check_tokens(self, tokens)
        shape = (sequences, kv_heads, tokens, head_dim)
        codes = torch.zeros(self.code_shape(*shape), dtype=torch.uint8, device=device)
        if self.levels == "fp8":
            return Planes(codes, torch.ones(kv_heads, dtype=dtype, device=device), None)
        scale = torch.zeros(self.scale_shape(*shape), dtype=dtype, device=device)
        return Planes(codes, scale, None if self.symmetric else torch.zeros_like(scale))


def check_tokens(format: KVFormat, tokens: int) -> None:
    """Raise ValueError where tokens do not divide into groups that share a scale."""
    if format.per == "channel" and tokens % TOKENS:
        raise ValueError(f"{tokens} tokens are no multiple of {TOKENS}, which share a scale per channel. Keep the rest "
                         "in full precision until there are more")  # fmt: skip


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of any integer type [..., D] → bytes, uint8 [..., D · bits / 8]. They are not checked."""
    planes = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = planes[0].to(torch.uint8)
    for i, plane in enumerate(planes[1:], start=1):
        packed = packed | plane.to(torch.uint8) << bits * i
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [..., D]."""
    if bits == 8:
        return packed
    return torch.cat([packed >> bits * i & (1 << bits) - 1 for i in range(8 // bits)], dim=-1)


def quantize(
    x: Tensor, format: KVFormat, dtype: torch.dtype | None = None, static_scale: Tensor | None = None
) -> Planes:
    """Keys or values, finite, of any float type [..., kv_heads, tokens, D].

    `dtype`: of scale and minimum; None: as x. `static_scale` [kv_heads]: for fp8, and only there; beyond 448 of it is
    ±448. Raises ValueError where x does not divide into groups, and where one scale too many or too few is given.
    """
    format.check(x.shape[-1])
    check_tokens(format, x.shape[-2])
    if (static_scale is None) != (format.levels == "int"):
        raise ValueError("static_scale is for fp8, which has no other; scales of whole numbers are found here")
    exact = x.float().contiguous()
    if static_scale is not None:
        scaled = exact / _divisor(static_scale)[:, None, None]
        return Planes(scaled.clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8), static_scale, None)
    dtype = dtype or x.dtype
    value, dim = _grouped(exact, format)
    low, high = value.aminmax(dim=dim, keepdim=True)
    if format.symmetric:
        scale, offset, least, most = torch.maximum(-low, high) / 127, None, -127, 127
    else:
        offset, least, most = low.to(dtype), 0, (1 << format.bits) - 1
        value, scale = value - offset.float(), (high - low) / most
    scale = scale.to(dtype)
    codes = (value / _divisor(scale)).round().clamp(least, most).to(torch.int8).view(torch.uint8).view(x.shape)
    return Planes(pack_codes(codes, format.bits), scale.squeeze(dim), None if offset is None else offset.squeeze(dim))


def dequantize(planes: Planes, format: KVFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., kv_heads, tokens, D], in `dtype`: of whole tokens, or of groups of them where those share a scale."""
    if format.levels == "fp8":
        return _fp8_values(planes.codes).to(dtype) * planes.scale.to(dtype)[:, None, None]
    codes = unpack_codes(planes.codes, format.bits)
    value, dim = _grouped((codes.view(torch.int8) if format.symmetric else codes).to(dtype), format)
    value = value * planes.scale.to(dtype).unsqueeze(dim)
    if planes.minimum is not None:
        value += planes.minimum.to(dtype).unsqueeze(dim)
    return value.view(codes.shape)


def format_of(name: str, planes: Planes, head_dim: int) -> KVFormat:
    """The format of what is stored for heads of so many channels. `name`: of the side. Raises ValueError where there is
    none such."""
    codes, scale, minimum = planes
    expect(f"{name}_codes", codes, (torch.uint8,), [None] * 4, codes.device)
    sequences, kv_heads, tokens, code_bytes = codes.shape
    levels: Levels = "fp8" if scale.ndim == 1 else "int"
    per: Literal["token", "channel"] = "channel" if scale.ndim == 4 and scale.shape[3] == head_dim else "token"
    groups = scale.shape[3] if scale.ndim == 4 and per == "token" else 1
    bits = 8 * code_bytes // head_dim
    found = KVFormat(bits, per, None if groups == 1 else head_dim // max(groups, 1), levels)
    found.check(head_dim)
    check_tokens(found, tokens)
    shape = (sequences, kv_heads, tokens, head_dim)
    expect(f"{name}_codes", codes, (torch.uint8,), found.code_shape(*shape), codes.device)
    expect(f"{name}_scale", scale, FLOATS, found.scale_shape(*shape), codes.device)
    if (minimum is None) != found.symmetric:
        raise ValueError(f"{name}_minimum is {'missing' if minimum is None else 'given'}: {bits} bits are "
                         f"{'symmetric' if found.symmetric else 'counted from one'}")  # fmt: skip
    if minimum is not None:
        expect(f"{name}_minimum", minimum, FLOATS, found.scale_shape(*shape), codes.device)
    return found


def _fp8_values(codes: Tensor) -> Tensor:
    """What float8_e4m3fn bytes that are no NaN stand for, in float32: their bits where float16 has them, but for the
    bias of the exponent. On a CPU that takes a quarter of the time of torch's conversion."""
    wide = codes.to(torch.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(torch.float16).float() * 256


def _divisor(scale: Tensor) -> Tensor:
    """In float32, and infinite where it is 0, so that codes are 0 there."""
    return scale.float().masked_fill(scale == 0, torch.inf)


def _grouped(x: Tensor, format: KVFormat) -> tuple[Tensor, int]:
    """[..., tokens, D] with an axis of what shares a scale, and which one it is."""
    if format.per == "channel":
        return x.unflatten(-2, (-1, TOKENS)), -2
    return x.unflatten(-1, (-1, format.group_size or x.shape[-1])), -1
