"""Weights of 2, 3 or 4 bits times 16-bit activations: what the formula says, for any shape, group and configuration."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import split_k, wna16
from quant_kernels.library import INTERPRETED
from quant_kernels.packed_codes import BITS, unpack_codes
from quant_kernels.tuning import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
CONFIGS = {
    "plain": Config(16, 64),
    "plain and split": Config(16, 32, split_k=2),
    "swapped": Config(32, 64, swap=True),
    "swapped and split": Config(16, 64, split_k=3, swap=True),
}
LAYERS = [
    (1, 1, 32, 32), (3, 70, 160, 32), (17, 65, 192, 64), (33, 1, 384, 128), (2, 40, 512, 256), (3, 5, 768, 384),
    (2, 3, 256, 64), (5, 130, 77, 77),
]  # fmt: skip
"""Tokens, outputs, inputs, group size."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16]
ZEROS = ["symmetric", "integer", "float"]
Arguments = dict[str, Any]
every_width = pytest.mark.parametrize("bits", BITS)


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(wna16, "configuration", lambda *_: config)


def problem(
    bits: int, tokens: int, outputs: int, inputs: int, group_size: int, dtype: torch.dtype = torch.float32,
    zero: str = "integer",
) -> Arguments:  # fmt: skip
    """Arguments of the operator; activations have a mean, so that a wrong zero point shows."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)
    shape, middle = (outputs, inputs // group_size), 1 << bits - 1
    codes = torch.randint(-middle, middle, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(dtype)
    zero_point = {
        "symmetric": None,
        "integer": torch.randint(-middle, middle, shape, generator=generator),
        "float": torch.rand(shape, generator=generator) * (2 * middle - 1) - middle,
    }[zero]
    words, scale, zeros = wna16.pack(codes, scale, zero_point, bits)
    x = (torch.randn(tokens, inputs, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    made = {"x": x, "words": words, "scale": scale, "bits": bits, "zero": zeros, "bias": bias}
    return moved(made, DEVICE)


def moved(arguments: Arguments, device: torch.device | str) -> Arguments:
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in arguments.items()}


def run(arguments: Arguments) -> Tensor:
    return torch.ops.netsuke.wna16(**arguments)


def exact(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The result in float64, element by element, and the sum of the magnitudes of its terms."""
    x, words, scale, bits, zero, bias = moved(arguments, "cpu").values()
    (groups, outputs), inputs = scale.shape, x.shape[1]
    group = torch.arange(inputs) * groups // inputs
    codes = unpack_codes(words, outputs, inputs, bits).double()
    weight = (codes - (1 << bits - 1 if zero is None else zero.double().T[:, group])) * scale.double().T[:, group]
    x, bias = x.double(), torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def check(arguments: Arguments, y: Tensor, swap: bool) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), float32 sums of terms up to 150
    steps where products are shifted, and a rounding of each weight where weights are."""
    expected, magnitude = exact(arguments)
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    terms = 2.0**-17
    if swap and not INTERPRETED:
        terms += 1.5 * eps
    allowed = 1.01 * rounding * expected.abs() + terms * magnitude
    assert y.dtype == arguments["x"].dtype
    assert bool(((y.cpu().double() - expected).abs() <= allowed).all())


CASES = [
    pytest.param(*case, zero, dtype, bias, id=f"{' '.join(map(str, case))} {zero} {dtype} {bias}")
    for case, (zero, dtype), bias in zip(
        product(BITS, CONFIGS, LAYERS), cycle(product(ZEROS, DTYPES)), cycle((True, True, False, True, False)),
        strict=False,
    )
]  # fmt: skip
"""Every width, configuration and layer; zeros with types, and whether there is a bias, go through all pairs with each:
their periods have no common factor with the number of layers."""


@needs_kernels
@pytest.mark.parametrize(("bits", "config", "layer", "zero", "dtype", "bias"), CASES)
def test_the_result_is_the_formula(
    bits: int, config: str, layer: tuple[int, int, int, int], zero: str, dtype: torch.dtype, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, CONFIGS[config])
    arguments = problem(bits, *layer, dtype, zero)
    if not bias:
        arguments["bias"] = None
    check(arguments, run(arguments), CONFIGS[config].swap)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@every_width
def test_the_reference_is_the_formula(bits: int, layer: tuple[int, int, int, int], zero: str) -> None:
    for dtype in DTYPES:
        arguments = problem(bits, *layer, dtype, zero)
        check(arguments, wna16.wna16_reference(**arguments), swap=False)


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@every_width
def test_what_lies_beyond_the_last_token_and_input_is_not_read(
    bits: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, config)
    arguments = problem(bits, 3, 5, 160, 32)
    surrounded = torch.full((5, 160), torch.nan, device=DEVICE)
    surrounded[1:4] = arguments["x"]
    arguments["x"] = surrounded[1:4]
    assert not run(arguments).isnan().any()


@needs_kernels
@pytest.mark.parametrize("splits", [2, 9])
@every_width
def test_split_sums_are_the_same_every_time_and_leave_their_counters_at_0(
    bits: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Config(16, 32, split_k=splits))
    arguments = problem(bits, 3, 40, 640, 64)
    first = run(arguments)
    check(arguments, first, swap=False)
    assert torch.equal(run(arguments), first)
    assert not split_k.workspace(DEVICE, 1, 1)[1].any()


@needs_kernels
@every_width
def test_scales_and_zeros_may_be_of_another_type_than_activations(bits: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = problem(bits, 3, 20, 256, 64, torch.float16)
        arguments |= {name: arguments[name].to(dtype) for name in ("scale", "zero", "bias")}
        check(arguments, run(arguments), swap=False)


@every_width
def test_packing_keeps_the_weight(bits: int) -> None:
    limit = 1 << bits - 1
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-limit, limit, (5, 64), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-limit, limit, (5, 2), dtype=torch.int8, generator=generator)
    scale = torch.rand(5, 2, generator=generator)
    words, scales, zeros = wna16.pack(codes, scale, zero_point, bits)
    weight = wna16.wna16_reference(torch.eye(64), words, scales, bits, zeros).T
    expected = (codes - zero_point.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 5), (3, 0), (0, 0)])
@every_width
def test_nothing_in_gives_nothing_out(bits: int, tokens: int, outputs: int) -> None:
    words, scale, _ = wna16.pack(torch.zeros(outputs, 64, dtype=torch.int8), torch.ones(outputs, 1), None, bits)
    assert wna16.wna16(torch.zeros(tokens, 64, dtype=torch.float16), words, scale, bits).shape == (tokens, outputs)


HALF = torch.float16
WRONG: dict[str, Arguments] = {
    "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 160, dtype=torch.int8)},
    r"x has shape \[160\], expected \[any, any\]": {"x": torch.zeros(160, dtype=HALF)},
    r"x has strides \(1, 3\)": {"x": torch.zeros(160, 3, dtype=HALF).T},
    r"words has shape \[1, 1, 64, 32\], expected \[1, 2, 64, 32\]": {
        "words": torch.zeros(1, 1, 64, 32, dtype=torch.int16)
    },
    r"words has shape \[1, 2, 64, 32\], expected \[1, 1, 96, 32\]": {"bits": 3},
    "bits=5: words hold codes of 2 to 4 bits": {"bits": 5},
    "words is torch.int32, expected torch.int16": {"words": torch.zeros(1, 2, 64, 32, dtype=torch.int32)},
    "scale is torch.float64": {"scale": torch.ones(5, 5, dtype=torch.float64)},
    "scale has 3 groups, which do not divide the 160 inputs": {"scale": torch.ones(3, 5)},
    "scale has groups of 80 inputs: 32, 64, multiples of 128 or all 160": {"scale": torch.ones(2, 5)},
    r"zero has shape \[5\], expected \[5, 5\]": {"zero": torch.ones(5)},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "scale is on meta, x on cpu": {"scale": torch.ones(5, 5, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    arguments = moved(problem(4, 3, 5, 160, 32, HALF), "cpu")
    with pytest.raises(ValueError, match=message):
        wna16.wna16(**arguments | WRONG[message])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize(("bits", "most"), [(2, 4), (3, 6), (4, 8)])
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu(bits: int, most: int) -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return wna16.configuration(tokens, outputs, inputs, 128, bits, DEVICE).split_k

    assert splits(1, 4096, 4096) == most
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("hopper", [False, True])
@every_width
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(
    bits: int, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wna16, "gpu_of", lambda _: (hopper, 132))
    compiled = {
        (gate.variant.constants["GROUP"], gate.variant.constants["SPLIT"], gate.variant.constants["SWAP"],
         gate.variant.constants["BLOCK_M"], gate.variant.constants["BLOCK_N"], gate.variant.num_warps)
        for gate in wna16.gates()
        if gate.capability == (90 if hopper else 80) and gate.variant.constants["BITS"] == bits
    }  # fmt: skip
    for tokens in (1, 17, 33, 65, 513):
        for group_size in (0, 32, 64, 128):
            config = wna16.configuration(tokens, 1024, 1 << 17, group_size, bits, DEVICE)
            swap, warps = config.swap, config.num_warps
            assert (group_size, config.split_k > 1, swap, config.block_m, config.block_n, warps) in compiled


@every_width
def test_the_operator_meets_the_contract_of_torch_library(bits: int) -> None:
    arguments = problem(bits, 3, 17, 160, 32)
    torch.library.opcheck(torch.ops.netsuke.wna16, tuple(arguments.values()))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem(3, 3, 17, 160, 32, torch.float16)
    compiled = torch.compile(lambda x: run(arguments | {"x": x}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["x"]), run(arguments) * 2)


SHIPPED = dict.fromkeys((bits, config) for bits, hopper in product(BITS, (True, False))
                        for config in wna16.shipped(bits, hopper).values())  # fmt: skip

COVERING = [
    (bits, config, splits, *rest)
    for ((bits, config), splits), *rest in zip(
        product(SHIPPED, (1, 4)),
        cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16)),
        cycle((0, 1, 1, 0, 1, 0, 0, 1)),
        cycle((32, 64, 4096, 128, 64)),
        cycle(ZEROS),
        strict=False,
    )
]
"""Every configuration in both types, with and without splits, on both shapes, and in all pairs of these; periods that
have no common factor vary groups and zeros along with them. Each is a compilation, so that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "config", "splits", "dtype", "more", "group_size", "zero"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    bits: int, config: Config, splits: int, dtype: torch.dtype, more: int, group_size: int, zero: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, replace(config, split_k=splits))
    arguments = problem(bits, config.block_m + more, (1000, 6144)[more], 4096, group_size, dtype, zero)
    check(arguments, run(arguments), config.swap)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 64, 128, 1024])
@every_width
def test_a_captured_graph_replays_on_new_inputs(bits: int, tokens: int) -> None:
    arguments = problem(bits, tokens, 4096, 4096, 128, torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for _ in range(3):
        arguments["x"].normal_()
        graph.replay()
        check(arguments, y, swap=tokens > 16)


@pytest.mark.gpu
@every_width
def test_results_of_more_than_2_to_the_31_elements(bits: int) -> None:
    arguments = problem(bits, 33000, 66000, 128, 128, torch.float16)
    y = run(arguments)
    check(arguments | {"x": arguments["x"][-3:]}, y[-3:], swap=True)
