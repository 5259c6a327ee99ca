"""4-bit float weights: what checkpoints store, as words, and what kernels make of words.

Contract: codes are e2m1, 0 … 15 for 0, .5, 1, 1.5, 2, 3, 4, 6, and from 8 on the same with a minus, in words as
`quant_kernels.words` lays them out. A weight is value(code) · s / global_scale. Two formats differ in s, a byte:

    NVFP4  groups of 16 inputs; s is float8 e4m3 without a sign; global_scale is any positive number
    MXFP4  groups of 32 inputs; s is 2^(byte - 254), in parts of the largest, of which global_scale is the inverse

`scale` is int32: byte j of a word is that of plane j of 128 inputs. MXFP4's is [ceil(inputs / 128), outputs]; NVFP4's
has twice the rows, in turn for the first and the second 16 inputs of each plane. global_scale is float32 [1]. Nothing
is lost: unpacking gives back to the bit what was stored.

Kernels unpack both to 16-bit floats and multiply them. The magnitude of a code, put where the exponent of a float ends
and its mantissa starts, is its value times a power of two, .5 as a subnormal number. An e4m3 byte becomes a float the
same way; an e8m0 one is an exponent as it stands. No instruction here flushes subnormal numbers, and the powers of two
cancel but for a few: products are value · s divided by `NVFP4_FACTOR` or `MXFP4_FACTOR`. They are exact in both types,
save for MXFP4 scales far below the largest of the tensor: weights are rounded to multiples of 2⁻²⁵ of that one in
float16, which changes none whose scale is within 2²⁴ of it, and in bfloat16 none within 2¹²⁶.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels.arguments import expect
from quant_kernels.layout import E2M1
from quant_kernels.words import pack_words, unpack_words

NVFP4_GROUP, MXFP4_GROUP = 16, 32
NVFP4_FACTOR, MXFP4_FACTOR = tl.constexpr(256.0), tl.constexpr(0.5)
"""What products of unpacked codes and scales have to be multiplied by."""


def pack_nvfp4(
    weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`words`, `scale` and `global_scale` of what compressed-tensors stores as `nvfp4-pack-quantized`: uint8 [outputs,
    inputs / 2], even inputs in low nibbles; float8_e4m3fn [outputs, inputs / 16]; float32 [1], which divides.

    Raises ValueError where a scale is negative or NaN, or the last one is not positive.
    """
    expect("weight_scale", weight_scale, (torch.float8_e4m3fn,), [None, None], weight_packed.device)
    expect("weight_global_scale", weight_global_scale, (torch.float32,), [1], weight_packed.device)
    stored = weight_scale.view(torch.uint8)
    codes = _codes(weight_packed, stored, NVFP4_GROUP)
    if bool((stored > 0x7E).any()):
        raise ValueError("weight_scale has negative or NaN scales, which no quantizer gives. Quantize the layer again")
    if not 0 < weight_global_scale.item() < torch.inf:
        raise ValueError(f"weight_global_scale is {weight_global_scale.item()}, expected a positive number")
    return pack_words(codes), _pack_scale(stored, NVFP4_GROUP), weight_global_scale


def unpack_nvfp4(words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_nvfp4`."""
    stored = _unpack_scale(scale, inputs, NVFP4_GROUP)
    return _nibbles(words, scale.shape[1], inputs), stored.view(torch.float8_e4m3fn), global_scale


def pack_mxfp4(weight_packed: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`words`, `scale` and `global_scale` of what compressed-tensors stores as `mxfp4-pack-quantized`: uint8 [outputs,
    inputs / 2] as in NVFP4; uint8 [outputs, inputs / 32], 2^(byte - 127).

    Raises ValueError where a scale is 0xFF, which is NaN.
    """
    codes = _codes(weight_packed, weight_scale, MXFP4_GROUP)
    largest = int(weight_scale.max()) if weight_scale.numel() else 127
    if largest == 0xFF:
        raise ValueError("weight_scale has scales of 0xFF, which are NaN. Quantize the layer again")
    global_scale = torch.tensor([2.0 ** (127 - largest)], dtype=torch.float32, device=weight_scale.device)
    return pack_words(codes), _pack_scale(weight_scale + (254 - largest), MXFP4_GROUP), global_scale


def unpack_mxfp4(words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_mxfp4`."""
    largest = 128 - int(torch.frexp(global_scale).exponent)
    stored = _unpack_scale(scale, inputs, MXFP4_GROUP) - (254 - largest)
    return _nibbles(words, scale.shape[1], inputs), stored


def _codes(weight_packed: Tensor, stored: Tensor, group_size: int) -> Tensor:
    """uint8 [outputs, inputs]. Raises ValueError where bytes of codes and of scales do not fit each other."""
    expect("weight_packed", weight_packed, (torch.uint8,), [None, None], weight_packed.device)
    groups = [weight_packed.shape[0], triton.cdiv(2 * weight_packed.shape[1], group_size)]
    expect("weight_scale", stored, (torch.uint8,), groups, weight_packed.device)
    return torch.stack((weight_packed & 15, weight_packed >> 4), dim=2).flatten(1)


def _nibbles(words: Tensor, outputs: int, inputs: int) -> Tensor:
    codes = unpack_words(words, outputs, inputs)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _pack_scale(stored: Tensor, group_size: int) -> Tensor:
    """Bytes [outputs, groups] → words."""
    (outputs, groups), halves = stored.shape, 32 // group_size
    tiles = triton.cdiv(groups, 4 * halves)
    padded = F.pad(stored, (0, 4 * halves * tiles - groups)).view(outputs, tiles, 4, halves)
    planes = padded.to(torch.int32).unbind(2)
    words = planes[0] | planes[1] << 8 | planes[2] << 16 | planes[3] << 24
    return words.flatten(1).T.contiguous()


def _unpack_scale(scale: Tensor, inputs: int, group_size: int) -> Tensor:
    """The inverse."""
    (rows, outputs), halves = scale.shape, 32 // group_size
    words = scale.T.reshape(outputs, rows // halves, halves)
    planes = torch.stack([(words >> 8 * plane).to(torch.uint8) for plane in range(4)], dim=2)
    return planes.flatten(1)[:, : triton.cdiv(inputs, group_size)].contiguous()


def dequantize(words: Tensor, scale: Tensor, global_scale: Tensor, inputs: int) -> Tensor:
    """The weight, float32 [outputs, inputs]."""
    group_size = group_size_of(scale, inputs)
    stored = _unpack_scale(scale, inputs, group_size)
    s = stored.view(torch.float8_e4m3fn).double() if group_size == NVFP4_GROUP else torch.exp2(stored.double() - 254)
    values = torch.tensor(E2M1, dtype=torch.float64, device=words.device)
    weight = values[unpack_words(words, scale.shape[1], inputs).long()]
    return (weight * s.repeat_interleave(group_size, dim=1)[:, :inputs] / global_scale.double()).float()


def group_size_of(scale: Tensor, inputs: int) -> int:
    """16 or 32, by the rows of scale. Raises ValueError."""
    tiles = triton.cdiv(inputs, 128)
    if not inputs or scale.shape[0] not in (tiles, 2 * tiles):
        raise ValueError(
            f"scale has {scale.shape[0]} rows: {inputs} inputs, of which there must be some, have {tiles} in MXFP4 and "
            f"{2 * tiles} in NVFP4. Use pack_mxfp4 or pack_nvfp4"
        )
    return MXFP4_GROUP if scale.shape[0] == tiles else NVFP4_GROUP


def _halves(bits: int) -> str:
    """An immediate with the same 16 bits twice."""
    return f"{bits * 0x10001:#010x}"


def _unpack_assembly(lowest: int) -> str:
    """PTX: two words in operand 4 → operands 0 to 3, of each half a plane's sign, and its magnitude from `lowest` on.

    A code whose place is left of its plane's is moved there in one instruction with an addition, which carries a set
    sign, next above the magnitude, to the top; what it leaves in between is masked off. In the last plane the sign is
    at the top, and the magnitude alone is moved.
    """
    magnitude = 7 << lowest
    carry = 0x8000 - (8 << lowest)
    lines = ["{", ".reg .b32 t;"]
    for plane in range(3):
        shift = lowest - 4 * plane
        lines.append(f"and.b32 t, $4, {_halves(15 << 4 * plane)};")
        lines.append(f"{'shl' if shift > 0 else 'shr'}.b32 t, t, {abs(shift)};")
        lines.append(f"add.u32 t, t, {_halves(carry)};")
        lines.append(f"and.b32 ${plane}, t, {_halves(0x8000 | magnitude)};")
    lines.append(f"shr.b32 t, $4, {12 - lowest};")
    lines.append(f"and.b32 t, t, {_halves(magnitude)};")
    lines.append(f"lop3.b32 $3, $4, {_halves(0x8000)}, t, 0xEA;")
    return "\n".join([*lines, "}"])


def _scale_assembly(lowest: int, mask: int, *steps: str) -> str:
    """PTX: a word of scales in operand 4 → operands 0 to 3, of 16 bits: bytes from bit `lowest` on, masked, and then
    `steps`, which are taken with two of them at a time, in the halves of d.
    """
    lines = ["{", ".reg .b32 d, c, z;", f"mov.b32 z, {_halves(0x8000)};"]
    for first, shift in ((0, lowest), (1, lowest - 8)):
        lines.append(f"{'shl' if shift > 0 else 'shr'}.b32 d, $4, {abs(shift)};")
        lines.extend([f"and.b32 d, d, {_halves(mask)};", *steps, f"mov.b32 {{${first}, ${first + 2}}}, d;"])
    return "\n".join([*lines, "}"])


def _times(dtype: str, power_of_two: int) -> str:
    """A multiplication by the float with these bits; as one with -0 added, which Ampere has for bfloat16 too."""
    return f"mov.b32 c, {_halves(power_of_two)};\nfma.rn.{dtype}x2 d, d, c, z;"


BFLOAT16_CODES = tl.constexpr(_unpack_assembly(6))
"""Value · 2⁻¹²⁶."""
FLOAT16_CODES = tl.constexpr(_unpack_assembly(9))
"""Value · 2⁻¹⁴."""
BFLOAT16_NVFP4 = tl.constexpr(_scale_assembly(4, 0x07F0, _times("bf16", 0x7F00), _times("bf16", 0x7700)))
"""s · 2⁻¹²⁰ · 2¹²⁷ · 2¹¹¹ = s · 2¹¹⁸."""
FLOAT16_NVFP4 = tl.constexpr(_scale_assembly(7, 0x3F80, _times("f16", 0x7400)))
"""s · 2⁻⁸ · 2¹⁴ = s · 2⁶."""
BFLOAT16_MXFP4 = tl.constexpr(_scale_assembly(7, 0x7F80))
"""2^(byte - 127): the byte is the exponent."""
AT_LEAST_224 = f"mov.b32 c, {_halves(224)};\nmax.f16x2 d, d, c;"
"""Integers compare like the subnormal floats they are."""
LESS_224_IN_EXPONENT = f"mad.lo.u32 d, d, 1024, {-224 * 0x10001 * 1024 & 0xFFFFFFFF:#x};"
FLOAT16_MXFP4 = tl.constexpr(_scale_assembly(0, 0x00FF, AT_LEAST_224, LESS_224_IN_EXPONENT))
"""2^(byte - 239), and 0 up to byte 224: byte - 224 is the exponent."""


@triton.jit
def _value(words, PLANE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same by way of float32, for others than NVIDIA."""
    code = words.to(tl.int32) >> (4 * PLANE)
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return (bits.to(tl.float32, bitcast=True) * 2.0**126).to(DTYPE)


@triton.jit
def _scale_of(word, PLANE: tl.constexpr, NVFP4: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    stored = (word >> (8 * PLANE)) & 255
    if NVFP4:
        s = (stored << 20).to(tl.float32, bitcast=True) * 2.0**112
    else:
        s = (tl.maximum(stored - 126, 0) << 23).to(tl.float32, bitcast=True)
    return s.to(DTYPE)


@triton.jit
def unpack_codes(words, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of any shape → the values of four planes, times 2⁻¹²⁶ or 2⁻¹⁴ with `ASM`: for NVIDIA."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            BFLOAT16_CODES if DTYPE == tl.bfloat16 else FLOAT16_CODES,  # noqa: SIM300
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        planes = _floats(a, b, c, d, DTYPE)
    else:
        planes = (_value(words, 0, DTYPE), _value(words, 1, DTYPE), _value(words, 2, DTYPE), _value(words, 3, DTYPE))
    return planes


@triton.jit
def _floats(a, b, c, d, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return a.to(DTYPE, bitcast=True), b.to(DTYPE, bitcast=True), c.to(DTYPE, bitcast=True), d.to(DTYPE, bitcast=True)


@triton.jit
def unpack_scales(word, NVFP4: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of `scale` → the scales of four planes, for what `unpack_codes` gives."""
    if ASM:
        E4M3: tl.constexpr = BFLOAT16_NVFP4 if DTYPE == tl.bfloat16 else FLOAT16_NVFP4  # noqa: SIM300
        E8M0: tl.constexpr = BFLOAT16_MXFP4 if DTYPE == tl.bfloat16 else FLOAT16_MXFP4  # noqa: SIM300
        a, b, c, d = tl.inline_asm_elementwise(
            E4M3 if NVFP4 else E8M0,
            "=&h,=&h,=&h,=&h,r",
            [word],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        scales = _floats(a, b, c, d, DTYPE)
    else:
        scales = (
            _scale_of(word, 0, NVFP4, DTYPE),
            _scale_of(word, 1, NVFP4, DTYPE),
            _scale_of(word, 2, NVFP4, DTYPE),
            _scale_of(word, 3, NVFP4, DTYPE),
        )
    return scales
