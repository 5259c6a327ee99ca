"""Residual, norm and quantization in one: the same codes as one after the other, and the sums that products need."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import norm_quant, token_quant
from quant_kernels.library import INTERPRETED
from quant_kernels.norm_quant import norm_quant_reference, norm_sums_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(1, 1), (33, 17), (17, 130), (3, 1000), (2, 4097)]
"""Tokens, inputs."""
EPSILON = 1e-5
HALF = 0.5 + 2.0**-14
"""How far a code may be from the exact quotient: half a step, and what float32 makes of the quotient."""


@pytest.fixture(params=["read once", "read twice"])
def _passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read twice":
        monkeypatch.setattr(token_quant, "LONGEST", 1)
        monkeypatch.setattr(token_quant, "PART", 256)


def problem(tokens: int, inputs: int, dtype: torch.dtype, *, residual: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + inputs)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = 10.0 ** torch.linspace(-3, 2, tokens)[:, None]
    made = {
        "x": random(tokens, inputs) * size,
        "weight": random(inputs),
        "residual": random(tokens, inputs) * size if residual else None,
    }
    tensors = {name: None if each is None else each.to(dtype).to(DEVICE) for name, each in made.items()}
    return tensors | {"epsilon": EPSILON, "offset": 1.0 if inputs % 2 else 0.0}


def alternating(shapes: list[tuple[int, int]]) -> list[Any]:
    """Each shape in each type, by turns without and with a residual, of which both come with each of them."""
    return [(*case, residual) for case, residual in zip(product(shapes, FLOATS), cycle((False, True)), strict=False)]


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: each.clone() if isinstance(each, Tensor) else each for name, each in arguments.items()}


def run(operator: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.netsuke, operator)(**arguments)


def exact(before: dict[str, Any], after: dict[str, Any]) -> Tensor:
    """y in float64, of the residual as it was rounded; that it was rounded well is checked here."""
    stream = after["x"] if after["residual"] is None else after["residual"]
    if after["residual"] is not None:
        total = before["x"].double() + before["residual"].double()
        bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 7 if INTERPRETED else 8}[stream.dtype]
        allowed = 1.001 * 2.0**-bits * total.abs() + torch.finfo(torch.float16).tiny * 2.0**-10
        assert ((stream.double() - total).abs() <= allowed).all()
    stream = stream.double()
    root = (stream.square().mean(dim=1, keepdim=True) + before["epsilon"]).sqrt()
    return stream / root * (before["weight"].double() + before["offset"])


def check_codes(before: dict[str, Any], after: dict[str, Any], results: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, scale, sums = results
    y = exact(before, after)
    expected_scale = y.abs().amax(dim=1) / 127
    assert (codes.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    assert (scale / expected_scale - 1).abs().max() < 2.0**-20
    assert (codes.double() - y / expected_scale[:, None]).abs().max() <= HALF
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


def check_sums(before: dict[str, Any], after: dict[str, Any], results: tuple[Tensor, Tensor]) -> None:
    y, sums = results
    group_size = before["group_size"]
    expected = exact(before, after)
    bits = {torch.float32: 19, torch.float16: 11, torch.bfloat16: 7 if INTERPRETED else 8}[y.dtype]
    allowed = 1.001 * 2.0**-bits * expected.abs() + torch.finfo(torch.float16).tiny * 2.0**-10
    assert y.dtype == before["x"].dtype
    assert ((y.double() - expected).abs() <= allowed).all()
    grouped = y.double().view(len(y), -1, group_size)
    assert (sums.dtype, sums.shape) == (torch.float32, (y.shape[1] // group_size, len(y)))
    error = (sums.T.double() - grouped.sum(dim=2)).abs()
    assert (error <= 2.0**-21 * grouped.abs().sum(dim=2)).all()


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize(("shape", "dtype", "residual"), alternating(SHAPES), ids=str)
def test_codes_are_the_nearest(shape: tuple[int, int], dtype: torch.dtype, residual: bool) -> None:
    arguments = problem(*shape, dtype, residual=residual)
    before = copied(arguments)
    check_codes(before, arguments, run("norm_quant", arguments))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_gives_the_nearest(shape: tuple[int, int], dtype: torch.dtype, residual: bool) -> None:
    arguments = problem(*shape, dtype, residual=residual)
    before = copied(arguments)
    check_codes(before, arguments, norm_quant_reference(**arguments))


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize(
    ("row", "dtype", "residual"), alternating([(32, 32), (320, 64), (1152, 128), (768, 256)]), ids=str
)
def test_the_norm_and_its_sums(row: tuple[int, int], dtype: torch.dtype, residual: bool) -> None:
    inputs, group_size = row
    arguments = problem(3, inputs, dtype, residual=residual) | {"group_size": group_size}
    before, reference = copied(arguments), copied(arguments)
    check_sums(before, arguments, run("norm_sums", arguments))
    check_sums(before, reference, norm_sums_reference(**reference))


@needs_kernels
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_are_those_of_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    arguments = problem(17, 1000, dtype, residual=True)
    same = copied(arguments)
    assert torch.equal(run("norm_quant", arguments)[0], norm_quant_reference(**same)[0])
    assert torch.equal(arguments["residual"], same["residual"])


@needs_kernels
def test_the_residual_may_be_wider_than_the_activations() -> None:
    arguments = problem(3, 130, torch.float16, residual=True)
    arguments["residual"] = arguments["residual"].float()
    before = copied(arguments)
    check_codes(before, arguments, run("norm_quant", arguments))
    assert torch.equal(arguments["residual"], before["residual"] + before["x"].float())


@needs_kernels
@pytest.mark.usefixtures("_passes")
def test_halves_go_to_the_even_neighbour() -> None:
    halves = torch.arange(-126.5, 127)
    x = torch.cat((torch.tensor([127.0]), halves))[None].to(DEVICE)
    codes, *_ = run("norm_quant", {"x": x, "weight": torch.ones_like(x[0]), "residual": None, "epsilon": EPSILON})
    below = halves.floor()
    assert torch.equal(codes[0, 1:].cpu(), torch.where(below % 2 == 0, below, below + 1).to(torch.int8))


@needs_kernels
@pytest.mark.usefixtures("_passes")
def test_rows_of_zeros_have_a_scale_and_no_codes() -> None:
    x = torch.zeros(2, 70, device=DEVICE)
    x[1, 5] = -3
    arguments = {"x": x, "weight": torch.ones(70, device=DEVICE), "residual": None, "epsilon": EPSILON}
    for codes, scale, sums in (run("norm_quant", arguments), norm_quant_reference(**arguments)):
        assert not codes[0].any()
        assert (scale > 0).all()
        assert sums.tolist() == [0, -127]


@needs_kernels
def test_the_longest_rows() -> None:
    arguments = problem(1, 131072, torch.float16, residual=True)
    before = copied(arguments)
    check_codes(before, arguments, run("norm_quant", arguments))


@pytest.mark.parametrize("operator", ["norm_quant", "norm_sums"])
def test_no_tokens_give_nothing(operator: str) -> None:
    arguments = problem(0, 64, torch.float32, residual=True)
    results = run(operator, arguments | ({"group_size": 32} if operator == "norm_sums" else {}))
    assert [tuple(each.shape) for each in results] == (
        [(0, 64), (2, 0)] if operator == "norm_sums" else [(0, 64), (0,), (0,)]
    )


WRONG = {
    "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 130, dtype=torch.int8)},
    r"weight has shape \[129\], expected \[130\]": {"weight": torch.zeros(129)},
    r"residual has shape \[2, 130\], expected \[3, 130\]": {"residual": torch.zeros(2, 130)},
    r"residual has strides \(1, 3\), which are not contiguous": {"residual": torch.zeros(130, 3).T},
    "weight is on meta, x on cpu": {"weight": torch.zeros(130, device="meta")},
    "epsilon=0.0: must be positive": {"epsilon": 0.0},
    "epsilon=1e-50: must be positive": {"epsilon": 1e-50},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    arguments = {"x": torch.zeros(3, 130), "weight": torch.zeros(130), "residual": None, "epsilon": EPSILON}
    with pytest.raises(ValueError, match=message):
        norm_quant.norm_quant(**arguments | WRONG[message])


@pytest.mark.parametrize("group_size", [0, 48, 128])
def test_groups_that_do_not_fit_are_named(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size={group_size}: can be 32, 64, 128, 256 where it divides the 96"):
        norm_quant.norm_sums(torch.zeros(3, 96), torch.zeros(96), None, EPSILON, 0.0, group_size)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("operator", ["norm_quant", "norm_sums"])
def test_the_operators_meet_the_contract_of_torch_library(operator: str, residual: bool) -> None:
    arguments = problem(3, 64, torch.float32, residual=residual)
    arguments |= {"group_size": 32} if operator == "norm_sums" else {}
    torch.library.opcheck(getattr(torch.ops.netsuke, operator), (), arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_compiled_graph_goes_through_and_keeps_the_residual(backend: str) -> None:
    arguments = problem(3, 17, torch.float32, residual=True)
    same = copied(arguments)

    def halved(x: Tensor, residual: Tensor, **others: Any) -> Any:
        codes, *_ = run("norm_quant", {"x": x / 2, "residual": residual} | others)
        return codes, residual * 2

    compiled = torch.compile(halved, fullgraph=True, backend=backend)
    for got, want in zip(compiled(**arguments), halved(**same), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(arguments["residual"], same["residual"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2048, 4096, 5120, 8192, 16384, 28672, 53248])
def test_rows_of_real_size_in_a_captured_graph(inputs: int, dtype: torch.dtype) -> None:
    arguments = problem(257, inputs, dtype, residual=True)
    run("norm_quant", arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run("norm_quant", arguments)
    for _ in range(2):
        arguments["x"].copy_(arguments["x"].flip(0))
        before = copied(arguments)
        graph.replay()
        check_codes(before, arguments, results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [2048, 5120, 8192, 53248])
def test_sums_of_rows_of_real_size(inputs: int, dtype: torch.dtype) -> None:
    arguments = problem(257, inputs, dtype, residual=True) | {"group_size": 128}
    before = copied(arguments)
    check_sums(before, arguments, run("norm_sums", arguments))
