"""Activations to int8: every code is the nearest integer, half to even, and a row's largest value becomes ±127."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import token_quant
from quant_kernels.library import INTERPRETED
from quant_kernels.token_quant import LONGEST, token_quant_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(1, 1), (33, 17), (17, 130), (3, 1000), (2, 4097)]
"""Tokens, inputs."""

quantize = torch.ops.netsuke.token_quant


@pytest.fixture(params=["read once", "read twice"])
def _passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read twice":
        monkeypatch.setattr(token_quant, "LONGEST", 1)
        monkeypatch.setattr(token_quant, "PART", 64)


def activations(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, generator=generator)
    return (x * 10.0 ** torch.linspace(-2, 3, tokens)[:, None]).to(dtype).to(DEVICE)


def exact(x: Tensor) -> tuple[Any, Any]:
    """Codes and scale in float64 by numpy, but for the factor, which is a float32 number."""
    value = x.cpu().double().numpy()
    largest = np.abs(value).max(axis=1, keepdims=True)
    factor = (np.float32(127) / largest.astype(np.float32)).astype(np.float64)
    return np.rint(value * factor), largest[:, 0] / 127


def check(x: Tensor, results: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, scale, sums = results
    expected, expected_scale = exact(x)
    assert (codes.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    assert (codes.cpu().numpy() == expected).all()
    assert (codes.abs().amax(dim=1) == 127).all()
    assert np.abs(scale.cpu().numpy() / expected_scale - 1).max() < 2.0**-22
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = activations(*shape, dtype)
    check(x, quantize(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = activations(*shape, dtype)
    check(x, token_quant_reference(x))


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("dtype", FLOATS)
def test_halves_go_to_the_even_neighbour(dtype: torch.dtype) -> None:
    halves = torch.arange(-126.5, 127)
    x = torch.cat((torch.tensor([127.0]), halves)).to(dtype).to(DEVICE)[None]
    below = halves.floor()
    expected = torch.where(below % 2 == 0, below, below + 1)
    codes, scale, _ = quantize(x)
    assert torch.equal(codes[0, 1:].cpu(), expected.to(torch.int8))
    assert scale.item() == 1
    assert torch.equal(token_quant_reference(x)[0], codes)


@needs_kernels
@pytest.mark.usefixtures("_passes")
def test_rows_of_zeros_and_of_next_to_nothing_have_a_scale_and_no_codes() -> None:
    x = torch.zeros(3, 70, device=DEVICE)
    x[1] = 1e-40
    x[2, 5] = -3
    for codes, scale, sums in (quantize(x), token_quant_reference(x)):
        assert not codes[:2].any()
        assert (scale > 0).all()
        assert scale.isfinite().all()
        assert sums.tolist() == [0, 0, -127]


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_in_its_row() -> None:
    x = activations(3, 33)
    expected = quantize(x)
    x[1, 7] = torch.nan
    for got, want in zip(quantize(x), expected, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@needs_kernels
@pytest.mark.parametrize("inputs", [LONGEST, LONGEST + 1, 131072])
def test_rows_of_any_length(inputs: int) -> None:
    x = activations(1, inputs, torch.float16)
    check(x, quantize(x))


def test_no_tokens_give_no_codes() -> None:
    codes, scale, sums = quantize(torch.zeros(0, 8, device=DEVICE))
    assert codes.shape == (0, 8)
    assert scale.shape == sums.shape == (0,)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int8), "x is torch.int8, expected torch.float16 or torch.bfloat16 or"),
        (torch.zeros(8), r"x has shape \[8\], expected \[any, any\]"),
        (torch.zeros(8, 2).T, r"x has strides \(1, 2\), which are not contiguous. Call .contiguous\(\)"),
        (torch.zeros(2, 0), r"x has shape \[2, 0\], which leaves rows without values"),
    ],
)
def test_what_does_not_fit_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_quant.token_quant(x)


def test_the_operator_meets_the_contract_of_torch_library() -> None:
    torch.library.opcheck(quantize, (activations(3, 17),))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_compiled_graph_goes_through(backend: str) -> None:
    x = activations(3, 17)
    compiled = torch.compile(lambda x: quantize(x * 2), fullgraph=True, backend=backend)
    for got, want in zip(compiled(x), quantize(x * 2), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2048, 4096, 5120, 8192, 14336, 28672, 53248])
def test_rows_of_real_size_in_a_captured_graph(inputs: int, dtype: torch.dtype) -> None:
    x = activations(1025, inputs, dtype)
    quantize(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = quantize(x)
    for _ in range(2):
        x.copy_(x.flip(0))
        graph.replay()
        check(x, results)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    x = activations(66000, 32800, torch.float16)
    codes, scale, sums = quantize(x)
    check(x[-3:], (codes[-3:], scale[-3:], sums[-3:]))
