"""4-bit floats: packing loses no bit of what is stored, and unpacking no bit of what it means."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from quant_kernels import fp4_words, library
from quant_kernels.fp4_words import (
    MXFP4_FACTOR,
    NVFP4_FACTOR,
    dequantize,
    pack_mxfp4,
    pack_nvfp4,
    unpack_codes,
    unpack_mxfp4,
    unpack_nvfp4,
    unpack_scales,
)
from quant_kernels.layout import E2M1

Bits = NDArray[np.uint32]
SIZES = [(1, 2), (1, 32), (3, 48), (70, 160), (65, 130), (5, 256), (0, 64)]
"""Outputs and inputs."""
STORED_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
STORED_BYTES = bytes.fromhex("10325476A9CBED0F")
"""As the packer of compressed-tensors stores them."""


def stored_codes(outputs: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(outputs + inputs)
    return torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator)


def stored_scale(outputs: int, groups: int, most: int) -> Tensor:
    """Bytes up to `most`, which is there."""
    generator = torch.Generator().manual_seed(outputs + groups)
    made = torch.randint(0, most + 1, (outputs, groups), dtype=torch.uint8, generator=generator)
    made.view(-1)[:1] = most
    return made


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nvfp4_comes_back_as_it_was_stored(size: tuple[int, int]) -> None:
    codes, scale = stored_codes(*size), stored_scale(size[0], -(-size[1] // 16), 0x7E).view(torch.float8_e4m3fn)
    global_scale = torch.tensor([1234.567])
    words, packed_scale, packed_global = pack_nvfp4(codes, scale, global_scale)
    assert [*packed_scale.shape] == [2 * -(-size[1] // 128), size[0]]
    back = unpack_nvfp4(words, packed_scale, packed_global, size[1])
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(back[2], global_scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("most", [0, 1, 120, 127, 254])
def test_mxfp4_comes_back_as_it_was_stored_whatever_the_largest_scale(most: int, size: tuple[int, int]) -> None:
    codes, scale = stored_codes(*size), stored_scale(size[0], -(-size[1] // 32), most)
    words, packed_scale, global_scale = pack_mxfp4(codes, scale)
    assert [*packed_scale.shape] == [-(-size[1] // 128), size[0]]
    back = unpack_mxfp4(words, packed_scale, global_scale, size[1])
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)


def test_even_inputs_are_in_low_nibbles_and_the_global_scale_divides() -> None:
    codes = torch.frombuffer(bytearray(STORED_BYTES), dtype=torch.uint8)[None]
    scale = torch.tensor([[1.75]]).to(torch.float8_e4m3fn)
    weight = dequantize(*pack_nvfp4(codes, scale, torch.tensor([448.0])), inputs=16)
    assert weight.tolist() == [[value * 1.75 / 448 for value in STORED_VALUES]]
    assert dequantize(*pack_mxfp4(codes, torch.tensor([[122]], dtype=torch.uint8)), inputs=16).tolist() == [
        [value / 32 for value in STORED_VALUES]
    ]


def test_a_scale_is_that_of_its_group_in_both_formats() -> None:
    codes = torch.full((3, 150), 0x22, dtype=torch.uint8)  # all 1, 300 inputs
    eights = torch.arange(3 * 19, dtype=torch.uint8).view(3, 19)
    weight = dequantize(*pack_nvfp4(codes, eights.view(torch.float8_e4m3fn), torch.ones(1)), inputs=300)
    assert torch.equal(weight, eights.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)[:, :300])
    powers = torch.arange(100, 130, dtype=torch.uint8).view(3, 10)
    weight = dequantize(*pack_mxfp4(codes, powers), inputs=300)
    assert torch.equal(weight, torch.exp2(powers.float() - 127).repeat_interleave(32, 1)[:, :300])


E4M3 = torch.float8_e4m3fn
WRONG = {
    "weight_packed is torch.int8": {"weight_packed": torch.zeros(5, 32, dtype=torch.int8)},
    "weight_scale is torch.uint8, expected torch.float8_e4m3fn": {"weight_scale": torch.zeros(5, 4, dtype=torch.uint8)},
    r"weight_scale has shape \[5, 2\], expected \[5, 4\]": {"weight_scale": torch.zeros(5, 2).to(E4M3)},
    "weight_scale has negative or NaN": {"weight_scale": torch.full((5, 4), -1.0).to(E4M3)},
    "weight_scale has negative or NaN scales": {"weight_scale": torch.full((5, 4), torch.nan).to(E4M3)},
    r"weight_global_scale has shape \[5\]": {"weight_global_scale": torch.ones(5)},
    "weight_global_scale is 0.0": {"weight_global_scale": torch.zeros(1)},
    "weight_global_scale is nan": {"weight_global_scale": torch.full((1,), torch.nan)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_nvfp4_cannot_be_is_refused(message: str) -> None:
    stored = {"weight_packed": stored_codes(5, 64), "weight_scale": torch.ones(5, 4).to(E4M3)}
    with pytest.raises(ValueError, match=message):
        pack_nvfp4(**stored | {"weight_global_scale": torch.ones(1)} | WRONG[message])


def test_what_mxfp4_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="scales of 0xFF, which are NaN"):
        pack_mxfp4(stored_codes(5, 64), stored_scale(5, 2, 255))
    with pytest.raises(ValueError, match=r"weight_scale has shape \[5, 4\], expected \[5, 2\]"):
        pack_mxfp4(stored_codes(5, 64), stored_scale(5, 4, 127))
    words, scale, global_scale = pack_mxfp4(stored_codes(5, 256), stored_scale(5, 8, 127))
    with pytest.raises(ValueError, match="scale has 2 rows: 384 inputs"):
        dequantize(words, scale, global_scale, 384)


CODES = {"bfloat16": (fp4_words.BFLOAT16_CODES, -126), "float16": (fp4_words.FLOAT16_CODES, -14)}
SCALES = {
    ("NVFP4", "bfloat16"): fp4_words.BFLOAT16_NVFP4,
    ("NVFP4", "float16"): fp4_words.FLOAT16_NVFP4,
    ("MXFP4", "bfloat16"): fp4_words.BFLOAT16_MXFP4,
    ("MXFP4", "float16"): fp4_words.FLOAT16_MXFP4,
}
VALUE = np.array(E2M1)
E4M3_VALUE = torch.arange(127, dtype=torch.uint8).view(E4M3).double().numpy()


def floats(bits: Bits, dtype: str) -> NDArray[np.float64]:
    """The values of 16-bit floats, subnormal ones too."""
    signed = torch.from_numpy((bits & 0xFFFF).astype(np.uint16).view(np.int16).copy())
    return signed.view(getattr(torch, dtype)).double().numpy()


def bits_of(values: NDArray[np.float64], dtype: str) -> Bits:
    """Values as 16-bit floats, which must hold them exactly."""
    rounded = torch.from_numpy(values).to(getattr(torch, dtype))
    np.testing.assert_array_equal(rounded.double().numpy(), values)
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def both(function: object, *registers: Bits, dtype: str) -> Bits:
    """A function of floats on the halves of registers."""
    low = bits_of(function(*(floats(each, dtype) for each in registers)), dtype)  # type: ignore[operator]
    high = bits_of(function(*(floats(each >> 16, dtype) for each in registers)), dtype)  # type: ignore[operator]
    return low | high << 16


def run(assembly: str, word: Bits) -> list[Bits]:
    """Operands 0 to 3 of PTX with operand 4, executed line by line: the very text that kernels have."""
    registers: dict[str, Bits] = {"$4": word}
    for line in re.sub(r"\.reg[^;]*;", "", assembly.strip("{}\n")).replace("\n", "").split(";")[:-1]:
        name, target, *sources = re.findall(r"\{.*?\}|[\w.$]+", line)
        a, *others = (registers[each] if each in registers else np.uint32(int(each, 0)) for each in sources)
        a = np.broadcast_to(a, word.shape)
        match name, others:
            case "mov.b32", [] if target[0] == "{":
                first, second = re.findall(r"\$\d", target)
                registers[first], registers[second] = a & 0xFFFF, a >> 16
                continue
            case "mov.b32", []:
                value = a
            case "and.b32", [b]:
                value = a & b
            case "shl.b32", [b]:
                value = a << b
            case "shr.b32", [b]:
                value = a >> b
            case "add.u32", [b]:
                value = a + b
            case "mad.lo.u32", [b, c]:
                value = a * b + c
            case "lop3.b32", [b, c, 0xEA]:
                value = a & b | c
            case "max.f16x2", [b]:
                value = both(np.maximum, a, b, dtype="float16")
            case (("fma.rn.f16x2" | "fma.rn.bf16x2"), [b, c]):
                dtype = "bfloat16" if "bf16" in name else "float16"
                value = both(lambda x, y, z: x * y + z, a, b, c, dtype=dtype)
            case _:
                raise NotImplementedError(line)
        registers[target] = value
    return [registers[f"${plane}"] for plane in range(4)]


@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
@pytest.mark.parametrize("dtype", CODES)
def test_the_assembly_turns_each_of_all_words_into_its_values(dtype: str, half: int) -> None:
    """Both words of a register at once: the other one is the complement."""
    assembly, exponent = CODES[dtype]
    words = np.arange(1 << 16, dtype=np.uint32)
    for plane, bits in enumerate(run(assembly.value, words << half | (words ^ 0xFFFF) << (16 - half))):
        value = floats(bits >> half, dtype)
        expected = VALUE[words >> 4 * plane & 15] * 2.0**exponent
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(np.signbit(value), np.signbit(expected))


def unpacked_scales(assembly: str, dtype: str, count: int) -> NDArray[np.float64]:
    """What becomes of bytes 0 … count, in each of the four places, with others beside them."""
    byte = np.arange(count, dtype=np.uint32)
    results = []
    for place in range(4):
        word = sum((byte if other == place else byte[::-1] * 7 % count) << np.uint32(8 * other) for other in range(4))
        results.append(floats(run(assembly, word.astype(np.uint32))[place], dtype))  # type: ignore[union-attr]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    return results[0]


@pytest.mark.parametrize("dtype", CODES)
def test_each_nvfp4_weight_is_exact(dtype: str) -> None:
    """Of all codes times all scales; no multiplication on the way rounds, or `both` would have raised."""
    values = floats(bits_of(VALUE * 2.0 ** CODES[dtype][1], dtype), dtype)
    products = np.multiply.outer(values, unpacked_scales(SCALES["NVFP4", dtype].value, dtype, 127))
    bits_of(products, dtype)
    np.testing.assert_array_equal(products * NVFP4_FACTOR.value, np.multiply.outer(VALUE, E4M3_VALUE))


@pytest.mark.parametrize(("dtype", "binades"), [("bfloat16", 126), ("float16", 24)])
def test_each_mxfp4_weight_is_exact_within_some_binades_of_the_largest_scale(dtype: str, binades: int) -> None:
    values = floats(bits_of(VALUE * 2.0 ** CODES[dtype][1], dtype), dtype)
    scales = unpacked_scales(SCALES["MXFP4", dtype].value, dtype, 255)
    products = np.multiply.outer(values, scales)
    expected = np.multiply.outer(VALUE, np.exp2(np.arange(255.0) - 254))
    bits_of(products[:, -binades - 1 :], dtype)
    np.testing.assert_array_equal(products[:, -binades - 1 :] * MXFP4_FACTOR.value, expected[:, -binades - 1 :])
    rounded = torch.from_numpy(products).to(getattr(torch, dtype)).double().numpy() * MXFP4_FACTOR.value
    assert np.abs(rounded - expected).max() <= 2.0 ** -(binades + (2 if dtype == "float16" else 1))


@triton.jit
def _unpack_kernel(words, scale, codes, scales, NVFP4: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    values = unpack_codes(tl.load(words + at), DTYPE, ASM)
    s = unpack_scales(tl.load(scale + at), NVFP4, DTYPE, ASM)
    for plane in tl.static_range(4):
        tl.store(codes + plane * 256 + at, values[plane].to(tl.float32))
        tl.store(scales + plane * 256 + at, s[plane].to(tl.float32))


def check_kernel(nvfp4: bool, device: str, dtype: tl.dtype, asm: bool) -> None:
    """Values and scales as a kernel unpacks them, multiplied, in float64."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**15), 2**15, (256,), dtype=torch.int16, generator=generator)
    byte = torch.arange(256) % 127 if nvfp4 else torch.arange(231, 231 + 256).clamp_max(254)
    stored = torch.stack([byte.roll(place) for place in range(4)], dim=1).to(torch.uint8)
    scale = stored.view(torch.int32).flatten()
    codes, scales = torch.empty(2, 4, 256, device=device)
    _unpack_kernel[(1,)](words.to(device), scale.to(device), codes, scales, NVFP4=nvfp4, DTYPE=dtype, ASM=asm)
    factor = NVFP4_FACTOR.value if nvfp4 else MXFP4_FACTOR.value
    s = stored.view(E4M3).double() if nvfp4 else torch.exp2(stored.double() - 254)
    for plane in range(4):
        value = torch.tensor(E2M1, dtype=torch.float64)[(words.long() >> 4 * plane) & 15]
        assert torch.equal((codes[plane].double() * scales[plane].double()).cpu() * factor, value * s[:, plane])


@pytest.mark.parametrize("nvfp4", [True, False], ids=["NVFP4", "MXFP4"])
def test_a_kernel_unpacks_what_was_packed(nvfp4: bool) -> None:
    check_kernel(nvfp4, "cuda" if torch.cuda.is_available() else "cpu", tl.float32, False)


@pytest.mark.gpu
@pytest.mark.skipif(library.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("asm", [True, False])
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16])
@pytest.mark.parametrize("nvfp4", [True, False], ids=["NVFP4", "MXFP4"])
def test_a_gpu_unpacks_what_was_packed(nvfp4: bool, dtype: tl.dtype, asm: bool) -> None:
    check_kernel(nvfp4, "cuda", dtype, asm)
