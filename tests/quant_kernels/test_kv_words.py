"""Kernels read from the bytes of a cache what was quantized, and the assembly takes each of all words apart."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant_kernels import kv_words, library
from quant_kernels.kv_planes import FP8, KVFormat, dequantize, quantize
from quant_kernels.kv_words import (
    groups_of,
    load_pieces,
    load_scales,
    num_pieces,
    piece_channel,
    piece_factor,
    piece_offset,
    piece_width,
    words_left,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(
    not library.INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter"
)
FORMATS = {
    "int8": KVFormat(8),
    "fp8": KVFormat(8, levels="fp8"),
    "int4": KVFormat(4),
    "int4 in groups": KVFormat(4, group_size=32),
    "int4 per channel": KVFormat(4, "channel"),
    "int2": KVFormat(2),
    "int2 in groups": KVFormat(2, group_size=32),
    "int2 per channel": KVFormat(2, "channel"),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
HEAD_DIMS = [64, 96, 128, 256]
ALL_WORDS = np.arange(1 << 16, dtype=np.uint32)


@pytest.mark.parametrize("head_dim", [32, *HEAD_DIMS])
@every_format
def test_every_channel_is_in_one_piece(format: KVFormat, head_dim: int) -> None:
    groups = groups_of(format, head_dim)
    channels = [
        piece_channel(piece, head_dim, format.bits, groups) + 2 * word
        for piece in range(num_pieces(head_dim, format.bits, groups))
        for word in range(piece_width(head_dim, format.bits, groups))
        if word < words_left(piece, head_dim, format.bits, groups)
    ]
    assert sorted(channels) == list(range(head_dim))


@triton.jit
def _read_kernel(  # type: ignore[no-untyped-def]
    codes, scale, minimum, x, tokens, DTYPE: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """x: float32 [rows, D]. Rows past `tokens` are those of codes alone: scales and minima are 0."""
    row = tl.program_id(0).to(tl.int64) * 32
    token = tl.arange(0, 32)
    stored = row + token < tokens
    pieces = load_pieces(codes, row, DTYPE, ASM, 32, D, BITS, GROUPS)
    scales = load_scales(scale, minimum, row, stored, ASM, D, BITS, GROUPS)
    word = tl.arange(0, piece_width(D, BITS, GROUPS))
    for piece in tl.static_range(num_pieces(D, BITS, GROUPS)):
        if GROUPS == 1:
            value = pieces[piece].to(tl.float32) - piece_offset(piece, DTYPE, BITS, GROUPS)
            value *= scales[0].to(tl.float32)[:, None]
            if BITS < 8:
                value += scales[1].to(tl.float32)[:, None]
        else:
            value = kv_words.dequantize(pieces, scales, piece, DTYPE, D, BITS, GROUPS).to(tl.float32)
        channel = piece_channel(piece, D, BITS, GROUPS) + 2 * word
        at = x + (row + token)[:, None] * D + channel[None, :]
        mask = (token >= 0)[:, None] & (word < words_left(piece, D, BITS, GROUPS))[None, :]
        tl.store(at, value * piece_factor(GROUPS), mask=mask)


def read(format: KVFormat, head_dim: int, dtype: tl.dtype, asm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel reads of 64 tokens, of which 50 have scales, what it should be, and a step of each [64, D]."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(1, 1, 64, head_dim, generator=generator) * 2.0 ** torch.linspace(-3, 2, head_dim) + 0.3
    x[..., 5] = 0.75
    scale = x.abs().amax().view(1) / 448 if format.levels == "fp8" else None
    planes = quantize(x, format, torch.float16, scale)
    expected = dequantize(planes, format)[0, 0]
    step = expected.new_zeros(expected.shape)
    if format.levels == "int":
        step += (
            planes.scale[0, 0]
            .float()
            .repeat_interleave(64 // planes.scale.shape[2], 0)
            .repeat_interleave(head_dim // planes.scale.shape[3], 1)
        )
    if format.levels == "int" and format.per == "token":
        expected[50:] = 0
    y = torch.full((64, head_dim), torch.nan, device=DEVICE)
    codes, scale, minimum = (None if part is None else part.to(DEVICE) for part in planes)
    _read_kernel[(2,)](
        codes, scale, minimum, y, 50,
        DTYPE=dtype, ASM=asm, D=head_dim, BITS=format.bits, GROUPS=groups_of(format, head_dim), num_warps=1,
    )  # fmt: skip
    return y.cpu() * (scale.cpu() if format.levels == "fp8" else 1), expected, step


@needs_kernels
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_format
def test_a_kernel_reads_what_was_quantized(format: KVFormat, head_dim: int) -> None:
    value, expected, _ = read(format, head_dim, tl.float32, False)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("head_dim", [96, 128])
@every_format
def test_in_float16_it_is_rounded_to_a_small_part_of_a_step(format: KVFormat, head_dim: int) -> None:
    check_float16(format, head_dim, asm=False)


@pytest.mark.gpu
@pytest.mark.skipif(library.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_format
def test_a_gpu_reads_what_was_quantized(format: KVFormat, head_dim: int) -> None:
    check_float16(format, head_dim, asm=True)


def check_float16(format: KVFormat, head_dim: int, asm: bool) -> None:
    """Within two roundings, of the result and of minimum - 64 · scale; the interpreter has no fused multiply-add."""
    value, expected, step = read(format, head_dim, tl.float16, asm)
    allowed = 1e-5 + expected.abs() * 2.0**-10 + step * (2.0**-4 if library.INTERPRETED else 2.0**-5)
    assert ((value - expected).abs() <= allowed).all()


@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
@pytest.mark.parametrize("name", ["BYTE", "FOUR_BIT", "FP8"])
def test_the_assembly_takes_each_of_all_words_apart(name: str, half: int) -> None:
    """Runs the very text, both words of a register at once: the other one is the complement."""
    pieces = emulate(
        getattr(kv_words, f"{name}_ASSEMBLY").value, ALL_WORDS << half | (ALL_WORDS ^ 0xFFFF) << (16 - half)
    )
    codes = [(ALL_WORDS & 0xFF).astype(np.uint8), (ALL_WORDS >> 8).astype(np.uint8)]
    if name == "FP8":
        expected = [torch.from_numpy(each).view(FP8).double() for each in codes]
        expected = [torch.where(each.isnan(), 480.0 * (1 - 2 * (torch.from_numpy(code).int() >> 7)), each) / 256
                    for each, code in zip(expected, codes, strict=True)]  # fmt: skip
    elif name == "BYTE":
        expected = [torch.from_numpy(each.view(np.int8)).double() + 1152 for each in codes]
    else:
        expected = [torch.from_numpy((ALL_WORDS >> 4 * i & 15).astype(np.float64)) + (64 if i % 2 else 1024)
                    for i in range(4)]  # fmt: skip
    for piece, values in zip(pieces, expected, strict=True):
        found = torch.from_numpy((piece >> half & 0xFFFF).astype(np.uint16).view(np.int16)).view(torch.float16)
        assert torch.equal(found.double(), values)


def emulate(assembly: str, words: np.ndarray) -> list[np.ndarray]:
    """The outputs of PTX that is made of shifts, and, and lop3 with a table; the input is the operand after them."""
    lines = [line for line in assembly.splitlines() if line.endswith(";") and not line.startswith(".reg")]
    numbers = [int(number) for number in re.findall(r"\$(\d)", assembly)]
    registers = {f"${max(numbers)}": words}
    for name, target, *operands in (re.findall(r"[\w.$]+", line) for line in lines):
        sources = [registers[each] if each in registers else np.uint32(int(each, 0)) for each in operands]
        if name == "lop3.b32":
            registers[target] = lop3(*sources)
        elif name == "and.b32":
            registers[target] = sources[0] & sources[1]
        elif name in ("shl.b32", "shr.b32"):
            registers[target] = sources[0] << sources[1] if name == "shl.b32" else sources[0] >> sources[1]
        else:
            raise NotImplementedError(name)
    return [registers[f"${number}"] for number in range(max(numbers))]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit of the table is the result for one combination of bits of a, b and c."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            terms = [value if row >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result
