from __future__ import annotations

import math

import pytest
import torch

from compress.core import hadamard as core

pytest.importorskip("triton")

from quant_kernels.hadamard import MOST, hadamard, hadamard_reference
from quant_kernels.library import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 3), (5, 2, 6), (3, 16, 48), (70, 64, 192), (2, 512, 1024), (1, MOST, MOST)]


def sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def given(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, channels, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size", "channels"), SIZES)
def test_kernel_and_reference_multiply_by_the_matrix_of_sylvester(
    tokens: int, size: int, channels: int, dtype: torch.dtype
) -> None:
    x = given(tokens, channels, dtype)
    exact = (x.double().cpu().view(tokens, -1, size) @ sylvester(size)).view(tokens, channels)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for y in (hadamard(x, size), hadamard_reference(x, size)):
        assert y.dtype == dtype
        assert (y.double().cpu() - exact).abs().max() <= tolerance * exact.abs().max()


def test_it_is_what_the_walk_computes() -> None:
    x = given(3, 48, torch.float32)
    assert torch.allclose(hadamard(x, 16).cpu(), core.hadamard(x.cpu(), 16), atol=1e-6)


def test_twice_is_nothing() -> None:
    x = given(4, 128, torch.float32)
    assert torch.allclose(hadamard(hadamard(x, 64), 64), x, atol=1e-5)


def test_no_tokens_are_none() -> None:
    assert hadamard(given(0, 32, torch.float16), 32).shape == (0, 32)


def test_the_operator_has_shapes_without_data() -> None:
    with torch.device("meta"):
        assert torch.ops.netsuke.hadamard(torch.empty(3, 64, dtype=torch.float16), 64).shape == (3, 64)


@pytest.mark.parametrize("size", [0, 3, 64, 2 * MOST])
def test_a_size_that_does_not_suit_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} must be a power of two"):
        hadamard(given(2, 96, torch.float32), size)
