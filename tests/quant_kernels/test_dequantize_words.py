"""Words of 2, 3 or 4 bits back to a plain weight: what the formula says, for any shape, group and type."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import dequantize_words, wna16
from quant_kernels.library import INTERPRETED
from quant_kernels.packed_codes import BITS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
WEIGHTS = [(1, 32, 32), (70, 160, 32), (65, 192, 64), (3, 384, 128), (40, 512, 256), (130, 77, 77)]
"""Outputs, inputs, group size."""
ZEROS = ["symmetric", "integer", "float"]
every_width = pytest.mark.parametrize("bits", BITS)


def problem(
    bits: int, outputs: int, inputs: int, group_size: int, zero: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Words, scale and zero, and the weight they stand for in float64."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    shape, middle = (outputs, inputs // group_size), 1 << bits - 1
    codes = torch.randint(-middle, middle, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(torch.float16)
    points = {
        "symmetric": None,
        "integer": torch.randint(-middle, middle, shape, generator=generator).to(torch.float16),
        "float": (torch.rand(shape, generator=generator) * (2 * middle - 1) - middle).to(torch.float16),
    }[zero]
    group = torch.arange(inputs) // group_size
    shifted = codes.double() - (0 if points is None else (points + middle).double()[:, group] - middle)
    words, scales, zeros = wna16.pack(codes, scale, points, bits)
    moved = None if zeros is None else zeros.to(DEVICE)
    return words.to(DEVICE), scales.to(DEVICE), moved, shifted * scale.double()[:, group]


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@every_width
def test_the_reference_is_the_formula(bits: int, weight: tuple[int, int, int], zero: str) -> None:
    words, scale, zeros, expected = problem(bits, *weight, zero)
    made = dequantize_words.dequantize_words_reference(words, scale, zeros, weight[1], bits, torch.float32)
    torch.testing.assert_close(made.cpu().double(), expected, rtol=1e-6, atol=1e-7)


CASES = [
    (*case, dtype)
    for case, dtype in zip(product(BITS, WEIGHTS, ZEROS), cycle((torch.float16, torch.bfloat16)), strict=False)
]
"""Every width and weight with all zeros; both types with each of these, since there is an odd number of zeros."""


@needs_kernels
@pytest.mark.parametrize(("bits", "weight", "zero", "dtype"), CASES, ids=str)
def test_the_weight_is_the_formula(bits: int, weight: tuple[int, int, int], zero: str, dtype: torch.dtype) -> None:
    words, scale, zeros, expected = problem(bits, *weight, zero)
    made = torch.ops.netsuke.dequantize_words(words, scale, zeros, weight[1], bits, dtype)
    # A scale and a fraction of a zero point are rounded to the type, the result too; the interpreter truncates.
    eps = torch.finfo(dtype).eps
    steps = 8 * scale.float().max().item() * eps if zero == "float" else 0
    assert made.dtype == dtype
    assert bool(((made.cpu().double() - expected).abs() <= 1.6 * eps * expected.abs() + steps).all())


def test_what_does_not_fit_is_named() -> None:
    words, scale, zeros, _ = problem(4, 40, 256, 128, "integer")
    call = dequantize_words.dequantize_words
    for arguments, sentence in (
        ((words.int(), scale, zeros, 256, 4, torch.float16), "words is torch.int32"),
        ((words, scale, zeros, 512, 4, torch.float16), "words has shape"),
        ((words, scale, zeros, 255, 4, torch.float16), "2 groups, which do not divide the 255 inputs"),
        ((words, scale.T, zeros, 256, 4, torch.float16), "scale has"),
        ((words, scale, zeros[:1] if zeros is not None else None, 256, 4, torch.float16), "zero has shape"),
        ((words, scale, zeros, 256, 3, torch.float16), "words has shape"),
        ((words, scale, zeros, 256, 8, torch.float16), "bits=8: words hold codes of 2 to 4 bits"),
        ((words, scale, zeros, 256, 4, torch.int8), "dtype=torch.int8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(*arguments)


@every_width
def test_shapes_are_known_without_data(bits: int) -> None:
    words, scale, zeros, _ = problem(bits, 17, 96, 32, "integer")
    arguments = (words, scale, zeros, 96, bits, torch.float16)
    torch.library.opcheck(torch.ops.netsuke.dequantize_words, arguments)
