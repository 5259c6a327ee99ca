"""Activations to fp8: every code is the nearest value, half to even, and a row's or group's largest becomes ±448."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant_kernels import fp8_quant
from quant_kernels.fp8_quant import fp8_quant_reference, has_fp8, to_fp8
from quant_kernels.library import INTERPRETED
from quant_kernels.token_quant import LONGEST

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1), (33, 17), (17, 130), (3, 1000), (2, 4097)]
"""Tokens, inputs."""
CODES = np.arange(127, dtype=np.uint8)
VALUES = np.where(CODES < 8, CODES / 512, (1 + CODES % 8 / 8) * 2.0 ** (CODES // 8 - 7.0))
"""What the codes from 0 to 0x7e stand for, by the definition of the format: 0 … 448."""

quantize = torch.ops.netsuke.fp8_quant


@pytest.fixture(params=["read once", "read twice"])
def _passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read twice":
        monkeypatch.setattr("quant_kernels.token_quant.LONGEST", 1)
        monkeypatch.setattr("quant_kernels.token_quant.PART", 64)


def activations(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, generator=generator)
    return (x * 10.0 ** torch.linspace(-2, 3, tokens)[:, None]).to(dtype).to(DEVICE)


def nearest(value: Any) -> Any:
    """The codes nearest to float32 numbers, by a search in the table of values."""
    size = np.abs(value).astype(np.float64)
    above = np.searchsorted(VALUES, size).clip(1, 126)
    middle = (VALUES[above - 1] + VALUES[above]) / 2
    even = above - above % 2
    code = np.where(size > middle, above, np.where(size < middle, above - 1, even))
    return np.where(np.isnan(value), 127, code) | np.signbit(value) * 128


def check(x: Tensor, results: tuple[Tensor, Tensor], grouped: bool) -> None:
    codes, scale = results
    (tokens, inputs), width = x.shape, 128 if grouped else x.shape[1]
    value = x.cpu().float().numpy()
    starts = np.arange(0, inputs, width)
    largest = np.maximum.reduceat(np.abs(value), starts, axis=1)
    factor = (np.float32(448) / largest).repeat(width, axis=1)[:, :inputs]
    assert (codes.dtype, scale.dtype) == (FP8, torch.float32)
    assert scale.shape == ((tokens, len(starts)) if grouped else (tokens,))
    assert (codes.view(torch.uint8).cpu().numpy() == nearest(value * factor)).all()
    assert np.abs(scale.cpu().numpy().reshape(tokens, -1) * 448.0 / largest - 1).max() < 2.0**-22
    assert (np.maximum.reduceat(codes.cpu().float().abs().numpy(), starts, axis=1) == 448).all()


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_of_a_token_is_the_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = activations(*shape, dtype)
    check(x, quantize(x), grouped=False)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_of_a_group_is_the_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = activations(*shape, dtype)
    check(x, quantize(x, True), grouped=True)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_of_the_reference_is_the_nearest(shape: tuple[int, int], dtype: torch.dtype, grouped: bool) -> None:
    x = activations(*shape, dtype)
    check(x, fp8_quant_reference(x, grouped), grouped)


@triton.jit
def _to_fp8_kernel(x, y, SIZE, CAST: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * 65536 + tl.arange(0, 65536)
    value = tl.load(x + place, mask=place < SIZE, other=0)
    tl.store(y + place, to_fp8(value, CAST), mask=place < SIZE)


def interesting() -> Any:
    """Every code, every midpoint of two and their float32 neighbours, all 16-bit floats, powers of two, and more."""
    middle = (VALUES[1:] + VALUES[:-1]) / 2
    exact = np.concatenate((VALUES, middle, 2.0 ** np.arange(-149, 128), [464, 480, np.inf, np.nan])).astype(np.float32)
    near = [exact.view(np.int32) + step for step in (-2, -1, 0, 1, 2)]
    near = [each[each >= 0].view(np.float32) for each in near]
    bits = np.arange(1 << 16, dtype=np.uint32)
    sixteen = [(bits << 16).view(np.float32), bits.astype(np.uint16).view(np.float16).astype(np.float32)]
    random = np.random.default_rng(0)
    scattered = random.integers(100 << 23, 140 << 23, 100_000).astype(np.int32).view(np.float32)
    positive = np.concatenate((*near, *sixteen, scattered))
    return np.concatenate((positive, -positive))


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, that adding to NaN is invalid
@pytest.mark.parametrize("cast", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_conversion_is_right_for_all_codes_midpoints_and_what_lies_next_to_them(cast: bool) -> None:
    if cast and not has_fp8(DEVICE):
        pytest.skip("has no instruction for it")
    values = interesting()
    x = torch.from_numpy(values).to(DEVICE)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    _to_fp8_kernel[(triton.cdiv(len(values), 65536),)](x, codes, len(values), CAST=cast)
    number, codes = ~np.isnan(values), codes.cpu()
    assert (codes.numpy()[number] == nearest(values[number])).all()
    assert (codes.numpy()[~number] & 127 == 127).all()
    by_torch = torch.from_numpy(values).clamp(-448, 448).to(FP8).view(torch.uint8)
    assert torch.equal(codes[number], by_torch[number])


@needs_kernels
@pytest.mark.parametrize("grouped", [False, True])
def test_zeros_and_next_to_nothing_have_a_scale_and_codes_of_zero(grouped: bool) -> None:
    x = torch.zeros(3, 70, device=DEVICE)
    x[1] = 1e-40
    x[2, 5] = -3
    for codes, scale in (quantize(x, grouped), fp8_quant_reference(x, grouped)):
        assert not codes[:2].float().any()
        assert codes[2].float().sum() == -448
        assert (scale > 0).all()
        assert scale.isfinite().all()


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_so_and_stays_in_its_group() -> None:
    x = activations(3, 256)
    expected = quantize(x, True)[0].view(torch.uint8)
    x[1, 7] = torch.nan
    codes = quantize(x, True)[0]
    assert codes[1, 7].isnan()
    rest = torch.ones(3, 256, dtype=torch.bool)
    rest[1, :128] = False
    assert torch.equal(codes.view(torch.uint8)[rest], expected[rest])


@needs_kernels
@pytest.mark.parametrize("inputs", [LONGEST, LONGEST + 1, 131072])
def test_rows_of_any_length(inputs: int) -> None:
    x = activations(1, inputs, torch.float16)
    check(x, quantize(x), grouped=False)
    check(x, quantize(x, True), grouped=True)


def test_no_tokens_give_no_codes() -> None:
    codes, scale = quantize(torch.zeros(0, 130, device=DEVICE), True)
    assert codes.shape == (0, 130)
    assert scale.shape == (0, 2)


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
        fp8_quant.fp8_quant(x)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_operator_meets_the_contract_of_torch_library(grouped: bool) -> None:
    torch.library.opcheck(quantize, (activations(3, 17), grouped))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_compiled_graph_goes_through(backend: str) -> None:
    x = activations(3, 170)
    compiled = torch.compile(lambda x: quantize(x * 2, True), fullgraph=True, backend=backend)
    for got, want in zip(compiled(x), quantize(x * 2, True), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2048, 4096, 5120, 8192, 14336, 28672, 53248])
def test_rows_of_real_size_in_a_captured_graph(inputs: int, dtype: torch.dtype, grouped: bool) -> None:
    x = activations(1025, inputs, dtype)
    quantize(x, grouped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = quantize(x, grouped)
    for _ in range(2):
        x.copy_(x.flip(0))
        graph.replay()
        check(x, results, grouped)


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True])
def test_more_than_2_to_the_31_elements(grouped: bool) -> None:
    x = activations(66000, 32800, torch.float16)
    codes, scale = quantize(x, grouped)
    check(x[-3:], (codes[-3:], scale[-3:]), grouped)
