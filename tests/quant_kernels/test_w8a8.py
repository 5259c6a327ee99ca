"""8-bit weights times 8-bit activations: integer sums are exact, and only the scales and the bias round."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import split_k, w8a8
from quant_kernels.library import INTERPRETED
from quant_kernels.token_quant import token_quant_reference
from quant_kernels.tuning import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
CONFIGS = {
    "plain": Config(16, 32),
    "swapped": Config(32, 32, swap=True),
    "long steps": Config(16, 32, block_k=256),
    "split": Config(16, 32, split_k=3),
    "swapped and split": Config(16, 64, block_k=256, split_k=2, swap=True),
}
SIZES = [(1, 1, 1), (1, 48, 512), (3, 17, 33), (17, 40, 128), (33, 70, 384), (2, 33, 700)]
"""Tokens, outputs, inputs."""
QUANTIZED = ["per token", "static", "per token, asymmetric", "static, asymmetric"]
FLOAT32 = 2.0**-24
"""Relative error of one rounding."""


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(w8a8, "configuration", lambda *_: config)


def problem(tokens: int, outputs: int, inputs: int, quantized: str = "per token, asymmetric") -> dict[str, Any]:
    """Arguments of the operator, codes over the whole grid, float scales of both signs."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

    scales = 1 if "static" in quantized else tokens
    weight, asymmetric = codes(outputs, inputs), "asymmetric" in quantized
    made = {
        "x": codes(tokens, inputs),
        "x_scale": torch.rand(scales, generator=generator) + 0.1,
        "weight": weight,
        "scale": torch.randn(outputs, generator=generator),
        "x_zero": codes(scales).to(torch.int32) if asymmetric else None,
        "weight_sums": weight.sum(dim=1, dtype=torch.int32) if asymmetric else None,
        "bias": torch.randn(outputs, generator=generator),
        "dtype": torch.float32,
    }
    return {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in made.items()}


def run(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.netsuke.w8a8(**arguments)


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The formula in float64, and the sum of the magnitudes that are added to give it."""
    a = {name: each.cpu().double() if isinstance(each, Tensor) else each for name, each in arguments.items()}
    zero = 0 if a["x_zero"] is None else a["x_zero"].expand(len(a["x"]))[:, None]
    bias = 0 if a["bias"] is None else a["bias"]
    product = a["x_scale"].expand(len(a["x"]))[:, None] * a["scale"] * ((a["x"] - zero) @ a["weight"].T)
    return product + bias, product.abs() + abs(bias)


def check(arguments: dict[str, Any], y: Tensor) -> None:
    """Between y and the formula lie at most four roundings of float32 and one to the type of the result."""
    expected, magnitude = exact(arguments)
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 7 if INTERPRETED else 8}[arguments["dtype"]]
    allowed = 4 * FLOAT32 * magnitude + 1.01 * 2.0**-bits * expected.abs() + torch.finfo(torch.float16).tiny
    worst = ((y.cpu().double() - expected).abs() / allowed).max()
    assert y.dtype == arguments["dtype"]
    assert worst <= 1, f"{worst:.2f} times the error that rounding explains"


CASES = [*zip([*product(CONFIGS, SIZES)] * 2, cycle([*QUANTIZED, *QUANTIZED[:3]]), strict=False)]
"""Every configuration and size twice; kinds of activations, with a period of seven, go through all pairs with each."""


@needs_kernels
@pytest.mark.parametrize(("name", "size", "quantized"), [(*case, quantized) for case, quantized in CASES], ids=str)
def test_only_scales_and_bias_round(
    name: str, size: tuple[int, int, int], quantized: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(*size, quantized)
    check(arguments, run(arguments))


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_reference_is_the_formula(size: tuple[int, int, int], quantized: str) -> None:
    arguments = problem(*size, quantized)
    check(arguments, w8a8.w8a8_reference(**arguments))


@needs_kernels
@pytest.mark.parametrize("quantized", ["static", "static, asymmetric"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sums_are_exact_to_the_last_integer(name: str, quantized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(5, 33, 384, quantized)
    arguments |= {"x_scale": torch.ones(1, device=DEVICE), "scale": torch.ones(33, device=DEVICE), "bias": None}
    assert torch.equal(run(arguments).double().cpu(), exact(arguments)[0])


@needs_kernels
@pytest.mark.parametrize(("x", "zero", "inputs"), [(-128, None, w8a8.MAX_INPUTS), (-128, 127, w8a8.MAX_INPUTS_ZERO)])
def test_the_largest_sum_that_is_let_in_does_not_overflow(
    x: int, zero: int | None, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Config(16, 16, block_k=1024))
    arguments = problem(1, 1, inputs, "static" if zero is None else "static, asymmetric")
    arguments["x"].fill_(x)
    arguments["weight"].fill_(-128)
    if zero is not None:
        arguments["x_zero"].fill_(zero)
        arguments["weight_sums"].fill_(-128 * inputs)
    assert inputs * 128 * (128 + (zero or 0)) > 2**31 - 2**15
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("swap", [False, True])
def test_splitting_the_sums_changes_no_bit(swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(9, 40, 1024)
    results = []
    for splits in (1, 2, 3, 8, 11):
        use(monkeypatch, Config(16, 32, split_k=splits, swap=swap))
        results.append(run(arguments))
    assert all(torch.equal(each, results[0]) for each in results)
    assert not any(counters.any() for kept in split_k._WORKSPACES.values() for _, counters in kept)


@needs_kernels
@pytest.mark.parametrize("name", ["plain", "swapped and split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_and_bias_of_16_bits(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(17, 40, 256)
    arguments |= {"dtype": dtype, "bias": arguments["bias"].to(dtype), "x_scale": arguments["x_scale"] / 256}
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("name", ["plain", "swapped and split"])
def test_what_lies_beyond_the_last_row_and_input_is_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(3, 5, 150)
    expected = run(arguments)
    for key in ("x", "weight"):
        surrounded = torch.full((7, 150), 99, dtype=torch.int8, device=DEVICE)
        surrounded[1 : 1 + len(arguments[key])] = arguments[key]
        arguments[key] = surrounded[1 : 1 + len(arguments[key])]
    assert torch.equal(run(arguments), expected)


def test_activations_quantized_per_token_come_close_to_the_float_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 512, generator=generator), torch.randn(33, 512, generator=generator)
    codes, scale, _ = token_quant_reference(weight)
    quantized, x_scale, _ = token_quant_reference(x)
    y = run({
        "x": quantized.to(DEVICE), "x_scale": x_scale.to(DEVICE), "weight": codes.to(DEVICE), "scale": scale.to(DEVICE),
        "x_zero": None, "weight_sums": None, "bias": None, "dtype": torch.float32,
    })  # fmt: skip
    # A code is off by at most half a step, so a term x · w by (x_step · |w| + w_step · |x|) / 2, and a little more.
    allowed = 0.51 * (x_scale[:, None] * weight.abs().sum(1) + scale * x.abs().sum(1)[:, None])
    error = (y.cpu() - x @ weight.T).abs()
    assert bool((error <= allowed).all())
    assert error.square().mean().sqrt() < 0.02 * 512**0.5


def test_no_tokens_give_no_rows() -> None:
    assert run(problem(0, 5, 64, "static")).shape == (0, 5)


WRONG: dict[str, dict[str, Any]] = {
    "x is torch.float32, expected torch.int8": {"x": torch.zeros(3, 130)},
    r"x has shape \[130\], expected \[any, any\]": {"x": torch.zeros(130, dtype=torch.int8)},
    r"x has strides \(1, 3\), which are not contiguous": {"x": torch.zeros(130, 3, dtype=torch.int8).T},
    "x has 0 inputs": {"x": torch.zeros(3, 0, dtype=torch.int8)},
    "x has 70000 inputs: 1 to 65793 are possible": {"x": torch.zeros(3, 70000, dtype=torch.int8)},
    r"weight has shape \[5, 65\], expected \[any, 130\]": {"weight": torch.zeros(5, 65, dtype=torch.int8)},
    "weight is torch.uint8, expected torch.int8": {"weight": torch.zeros(5, 130, dtype=torch.uint8)},
    r"x_scale has shape \[3, 1\], expected \[3\]": {"x_scale": torch.ones(3, 1)},
    r"x_scale has shape \[2\], expected \[3\]": {"x_scale": torch.ones(2)},
    "scale is torch.float64": {"scale": torch.ones(5, dtype=torch.float64)},
    r"x_zero has shape \[2\], expected \[3\]": {"x_zero": torch.zeros(2, dtype=torch.int32)},
    "x_zero is torch.float32, expected torch.int32": {"x_zero": torch.zeros(3)},
    "weight_sums is torch.float32, expected torch.int32": {"weight_sums": torch.zeros(5)},
    "x_zero and weight_sums need each other": {"weight_sums": None},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "dtype=torch.int8: results are torch.float16": {"dtype": torch.int8},
    "scale is on meta, x on cpu": {"scale": torch.ones(5, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    made = problem(3, 5, 130)
    arguments: dict[str, Any] = {key: each.cpu() if isinstance(each, Tensor) else each for key, each in made.items()}
    with pytest.raises(ValueError, match=message):
        w8a8.w8a8(**arguments | WRONG[message])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu() -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return w8a8.configuration(tokens, outputs, inputs, DEVICE).split_k

    assert splits(1, 4096, 4096) == 4
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8, "gpu_of", lambda _: (hopper, 132))
    compiled = [config for config, _ in w8a8.RECORDED[90 if hopper else 80]]
    for tokens in (1, 16, 17, 32, 33, 64, 65, 128, 512, 513, 4096):
        assert replace(w8a8.configuration(tokens, 1024, 1 << 16, DEVICE), split_k=1) in compiled


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_the_operator_meets_the_contract_of_torch_library(quantized: str) -> None:
    torch.library.opcheck(torch.ops.netsuke.w8a8, tuple(problem(3, 17, 130, quantized).values()))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem(3, 17, 130)

    def doubled(**arguments: Any) -> Tensor:
        return run(arguments) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), doubled(**arguments))


SHIPPED = (w8a8.FEW, w8a8.SOME, w8a8.MORE, w8a8.MANY, w8a8.MANY_AMPERE, w8a8.PREFILL)

COVERING = [
    (*case, *rest)
    for case, *rest in zip(
        [(config, splits) for config in SHIPPED for splits in ((1,) if config == w8a8.PREFILL else (1, 4))],
        cycle((torch.float16, torch.bfloat16, torch.float32)),
        cycle((0, 1, 1, 0, 1, 0, 0, 1)),
        cycle((*QUANTIZED, QUANTIZED[-1])),  # five, so that each comes with and without splits
        strict=False,
    )
]
"""Every configuration with and without splits, with types, shapes and kinds of activations varied along with them. Each
is a compilation, so that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "splits", "dtype", "more", "quantized"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    config: Config, splits: int, dtype: torch.dtype, more: int, quantized: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(config, split_k=splits))
    outputs, inputs = ((1000, 14336), (6144, 4224))[more]
    arguments = problem(config.block_m + more, outputs, inputs, quantized) | {"dtype": dtype}
    arguments["x_scale"] /= inputs
    check(arguments, run(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 64, 128, 1024])
def test_a_captured_graph_replays_on_new_inputs(tokens: int) -> None:
    arguments = problem(tokens, 4096, 4096)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for _ in range(3):
        arguments["x"].random_(-128, 128)
        arguments["x_zero"].random_(-128, 128)
        graph.replay()
        check(arguments, y)


@pytest.mark.gpu
def test_results_of_more_than_2_to_the_31_elements() -> None:
    arguments = problem(33000, 66000, 128) | {"dtype": torch.float16}
    arguments["x_scale"] /= 1024
    y = run(arguments)
    last = {name: each[-3:] if name in ("x", "x_scale", "x_zero") else each for name, each in arguments.items()}
    check(last, y[-3:])
