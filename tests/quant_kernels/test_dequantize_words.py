"""4-bit words back to a plain weight: what the formula says, for any shape, group and type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import dequantize_words, w4a16
from quant_kernels.library import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
WEIGHTS = [(1, 32, 32), (70, 160, 32), (65, 192, 64), (3, 384, 128), (40, 512, 256), (130, 77, 77)]
"""Outputs, inputs, group size."""


def problem(outputs: int, inputs: int, group_size: int, zero: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Words, scale and zero, and the weight they stand for in float64."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    shape = (outputs, inputs // group_size)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(torch.float16)
    points = {
        "symmetric": None,
        "integer": torch.randint(-8, 8, shape, generator=generator).to(torch.float16),
        "float": (torch.rand(shape, generator=generator) * 15 - 8).to(torch.float16),
    }[zero]
    group = torch.arange(inputs) // group_size
    shifted = codes.double() - (0 if points is None else (points + 8).double()[:, group] - 8)
    words, scales, zeros = w4a16.pack(codes, scale, points)
    moved = None if zeros is None else zeros.to(DEVICE)
    return words.to(DEVICE), scales.to(DEVICE), moved, shifted * scale.double()[:, group]


@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_reference_is_the_formula(weight: tuple[int, int, int], zero: str) -> None:
    words, scale, zeros, expected = problem(*weight, zero)
    made = dequantize_words.dequantize_words_reference(words, scale, zeros, weight[1], torch.float32)
    torch.testing.assert_close(made.cpu().double(), expected, rtol=1e-6, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_the_weight_is_the_formula(weight: tuple[int, int, int], zero: str, dtype: torch.dtype) -> None:
    words, scale, zeros, expected = problem(*weight, zero)
    made = torch.ops.netsuke.dequantize_words(words, scale, zeros, weight[1], dtype)
    # A scale and a fraction of a zero point are rounded to the type, the result too; the interpreter truncates.
    eps = torch.finfo(dtype).eps
    steps = 8 * scale.float().max().item() * eps if zero == "float" else 0
    assert made.dtype == dtype
    assert bool(((made.cpu().double() - expected).abs() <= 1.6 * eps * expected.abs() + steps).all())


def test_what_does_not_fit_is_named() -> None:
    words, scale, zeros, _ = problem(40, 256, 128, "integer")
    call = dequantize_words.dequantize_words
    for arguments, sentence in (
        ((words.int(), scale, zeros, 256, torch.float16), "words is torch.int32"),
        ((words, scale, zeros, 512, torch.float16), "words has shape"),
        ((words, scale, zeros, 255, torch.float16), "2 groups, which do not divide the 255 inputs"),
        ((words, scale.T, zeros, 256, torch.float16), "scale has"),
        ((words, scale, zeros[:1] if zeros is not None else None, 256, torch.float16), "zero has shape"),
        ((words, scale, zeros, 256, torch.int8), "dtype=torch.int8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(*arguments)


def test_shapes_are_known_without_data() -> None:
    words, scale, zeros, _ = problem(70, 160, 32, "integer")
    arguments = (words, scale, zeros, 160, torch.float16)
    torch.library.opcheck(torch.ops.netsuke.dequantize_words, arguments)
