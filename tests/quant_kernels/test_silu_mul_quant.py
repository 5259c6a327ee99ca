"""Gate and quantization in one: every code is the nearest to what float64 makes of the gate."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import silu_mul_quant, token_quant
from quant_kernels.library import INTERPRETED
from quant_kernels.silu_mul_quant import ACTIVATIONS, silu_mul_quant_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # by numpy; 1 / ∞ is right

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(1, 1), (33, 17), (17, 130), (3, 1000), (2, 4097)]
"""Tokens, inputs."""
CASES = [(*case, activation) for case, activation in zip(product(SHAPES, FLOATS), cycle(ACTIVATIONS), strict=False)]
"""Each shape in each type, by turns with either activation, of which both come with each of them."""
HALF = 0.501
"""How far a code may be from the exact quotient."""

quantize = torch.ops.netsuke.silu_mul_quant


@pytest.fixture(params=["read once", "read twice"])
def _passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read twice":
        monkeypatch.setattr(token_quant, "LONGEST", 1)
        monkeypatch.setattr(token_quant, "PART", 256)


def gate_and_up(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, 2 · inputs], gates from nearly shut to wide open."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    both = torch.randn(tokens, 2 * inputs, generator=generator)
    both[:, :inputs] *= 4
    return (both * 10.0 ** torch.linspace(-2, 1, tokens)[:, None]).to(dtype).to(DEVICE)


def check(both: Tensor, activation: str, results: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, scale, sums = results
    gate, up = both.double().chunk(2, dim=1)
    value = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    expected_scale = value.abs().amax(dim=1) / 127
    assert (codes.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    assert (scale / expected_scale - 1).abs().max() < 2.0**-18
    assert (codes.double() - value / expected_scale[:, None]).abs().max() <= HALF
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES, ids=str)
def test_codes_are_the_nearest(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    both = gate_and_up(*shape, dtype)
    check(both, activation, quantize(both, None, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_gives_the_nearest(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    both = gate_and_up(*shape, dtype)
    check(both, activation, silu_mul_quant_reference(both, None, activation))


@needs_kernels
def test_two_tensors_are_as_good_as_one_wherever_their_rows_lie() -> None:
    both = gate_and_up(5, 33)
    gate, up = both.chunk(2, dim=1)
    expected = quantize(both)
    for results in (quantize(gate, up), quantize(gate.contiguous(), up), silu_mul_quant_reference(gate, up)):
        assert torch.equal(results[0], expected[0])


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_shut_and_open_far_beyond_what_an_exponential_holds(activation: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 0.0]], device=DEVICE)
    codes, scale, _ = quantize(gate, torch.ones_like(gate), activation)
    assert codes.tolist() == [[0, 0, 3, 127, 0]]
    assert scale.item() == pytest.approx(1e4 / 127)


@needs_kernels
@pytest.mark.usefixtures("_passes")
def test_rows_of_zeros_have_a_scale_and_no_codes() -> None:
    both = gate_and_up(2, 70)
    both[0, 70:] = 0
    for codes, scale, sums in (quantize(both), silu_mul_quant_reference(both)):
        assert not codes[0].any()
        assert sums[0] == 0
        assert (scale > 0).all()
        assert codes[1].abs().max() == 127


@needs_kernels
def test_the_longest_rows() -> None:
    both = gate_and_up(1, 131072, torch.float16)
    check(both, "silu", quantize(both))


def test_no_tokens_give_no_codes() -> None:
    assert [tuple(each.shape) for each in quantize(torch.zeros(0, 8, device=DEVICE))] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": torch.zeros(2, 8, dtype=torch.int8)}, "gate is torch.int8, expected torch.float16 or"),
        ({"up": torch.zeros(2, 8, dtype=torch.float16)}, "up is torch.float16, expected .* and both of one type"),
        ({"up": torch.zeros(2, 7)}, r"up has shape \[2, 7\], expected \[tokens, inputs\], gate and up the same"),
        ({"up": torch.zeros(8, 2).T}, r"up has strides \(1, 2\): values of a row must be next to each other"),
        ({"up": torch.zeros(2, 8, device="meta")}, "up is on meta, gate on cpu"),
        ({"gate": torch.zeros(2, 7), "up": None}, r"gate has shape \[2, 7\]: without up it holds both halves"),
        ({"gate": torch.zeros(2, 0), "up": None}, r"which leaves rows without values"),
        ({"activation": "relu"}, "activation='relu': can be 'silu' or 'gelu_tanh'"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        silu_mul_quant.silu_mul_quant(**{"gate": torch.zeros(2, 8), "up": torch.zeros(2, 8)} | arguments)


@pytest.mark.parametrize("halves", [1, 2])
def test_the_operator_meets_the_contract_of_torch_library(halves: int) -> None:
    both = gate_and_up(3, 17)
    torch.library.opcheck(quantize, (both,) if halves == 2 else both.contiguous().chunk(2, dim=1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_compiled_graph_goes_through(backend: str) -> None:
    both = gate_and_up(3, 17)
    compiled = torch.compile(lambda both: quantize(both * 2), fullgraph=True, backend=backend)
    for got, want in zip(compiled(both), quantize(both * 2), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2048, 5632, 11008, 14336, 28672, 53248])
def test_rows_of_real_size_in_a_captured_graph(inputs: int, dtype: torch.dtype, activation: str) -> None:
    both = gate_and_up(257, inputs, dtype)
    quantize(both, None, activation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = quantize(both, None, activation)
    for _ in range(2):
        both.copy_(both.flip(0))
        graph.replay()
        check(both, activation, results)
