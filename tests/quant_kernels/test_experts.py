"""Mixtures of experts: pairs are grouped as they should be, and each gets what the formula says of its expert."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import experts, split_k, wna16
from quant_kernels.experts import group_by_expert, most_tiles
from quant_kernels.library import INTERPRETED
from quant_kernels.tuning import Config
from quant_kernels.words import unpack_words

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
CONFIGS = {
    "plain": Config(16, 64),
    "plain and split": Config(16, 32, split_k=2),
    "swapped": Config(32, 64, swap=True),
    "swapped and split": Config(16, 64, split_k=3, swap=True),
}
LAYERS = [(1, 2, 3, 1, 32, 32), (17, 2, 2, 33, 192, 64), (33, 1, 1, 3, 256, 128), (3, 2, 40, 5, 77, 77)]
"""Tokens, top_k, experts, outputs, inputs, group size."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16]
ZEROS = ["symmetric", "integer", "float"]


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(experts, "configuration", lambda *_: config)


def problem(
    tokens: int, top_k: int, num_experts: int, outputs: int, inputs: int, group_size: int,
    dtype: torch.dtype = torch.float32, zero: str = "integer", row_per_pair: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the operator; some pairs have no expert. Activations have a mean, so that a wrong zero shows."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)
    shape = (num_experts, outputs, inputs // group_size)
    codes = torch.randint(-8, 8, (num_experts, outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(dtype)
    zero_point = {
        "symmetric": None,
        "integer": torch.randint(-8, 8, shape, generator=generator),
        "float": torch.rand(shape, generator=generator) * 15 - 8,
    }[zero]
    words, scale, zeros = experts.pack(codes, scale, zero_point)
    x = (torch.randn(tokens * (top_k if row_per_pair else 1), inputs, generator=generator) + 0.5).to(dtype)
    made = {
        "x": x, "words": words, "scale": scale,
        "experts": torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator),
        "routing_weights": torch.rand(tokens, top_k, generator=generator),
        "zero": zeros, "bias": torch.randn(num_experts, outputs, generator=generator).to(dtype),
    }  # fmt: skip
    return {name: None if each is None else each.to(DEVICE) for name, each in made.items()}


def run(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.netsuke.w4a16_experts(**arguments)


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result in float64, expert by expert, and the sum of the magnitudes of its terms."""
    x, words, scale, of_pair, routing, zero, bias = (
        None if each is None else each.cpu() for name, each in arguments.items() if name != "combine"
    )
    (tokens, top_k), (num_experts, groups, outputs), inputs = of_pair.shape, scale.shape, x.shape[1]
    group = torch.arange(inputs) * groups // inputs
    y = torch.zeros(2, tokens, top_k, outputs, dtype=torch.float64)
    for expert in range(num_experts):
        token, rank = (of_pair == expert).nonzero(as_tuple=True)
        codes = unpack_words(words[expert], outputs, inputs).double()
        shifted = codes - (8 if zero is None else zero[expert].double().T[:, group])
        weight = shifted * scale[expert].double().T[:, group]
        rows = x[token if len(x) == tokens else token * top_k + rank].double()
        offset = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias[expert].double()
        factor = 1.0 if routing is None else routing[token, rank].double()[:, None]
        y[0, token, rank] = factor * (rows @ weight.T + offset)
        y[1, token, rank] = factor * (rows.abs() @ weight.abs().T + offset.abs())
    return y[0], y[1]


def check(arguments: dict[str, Any], y: Tensor, swap: bool) -> None:
    """As of `wna16`: within one rounding of the result (the interpreter truncates to bfloat16: two), float32 sums of
    terms up to 150 steps where products are shifted, and a rounding of each weight where weights are."""
    expected, magnitude = exact(arguments)
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    terms = 2.0**-17
    if swap and not INTERPRETED:
        terms += 1.5 * eps
    allowed = 1.01 * rounding * expected.abs() + terms * magnitude
    assert y.dtype == arguments["x"].dtype
    assert y.shape == expected.shape
    assert bool(((y.cpu().double() - expected).abs() <= allowed).all())


CASES = [
    pytest.param(*case, *rest, id=" ".join(map(str, (*case, *rest))))
    for case, *rest in zip(
        product(CONFIGS, LAYERS, ZEROS), cycle([*DTYPES, *DTYPES, DTYPES[0]]), cycle((False, True, False, True, True)),
        strict=False,
    )
]  # fmt: skip
"""Every configuration and layer with all zeros; types, and whether pairs have rows of their own, go through all pairs
with each: their periods have no common factor with these numbers."""


@needs_kernels
@pytest.mark.parametrize(("config", "layer", "zero", "dtype", "row_per_pair"), CASES)
def test_each_pair_gets_the_formula_of_its_expert(
    config: str, layer: tuple[int, ...], zero: str, dtype: torch.dtype, row_per_pair: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, CONFIGS[config])
    arguments = problem(*layer, dtype, zero, row_per_pair)
    check(arguments, run(arguments), CONFIGS[config].swap)


@needs_kernels
def test_without_bias_and_routing_weights_it_is_the_product_alone() -> None:
    arguments = problem(3, 2, 3, 5, 160, 32) | {"bias": None, "routing_weights": None}
    check(arguments, run(arguments), swap=True)


@pytest.mark.parametrize("row_per_pair", [False, True])
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_reference_is_the_formula(layer: tuple[int, ...], zero: str, row_per_pair: bool) -> None:
    for dtype in DTYPES:
        arguments = problem(*layer, dtype, zero, row_per_pair)
        check(arguments, experts.w4a16_experts_reference(**arguments), swap=False)


@needs_kernels
def test_experts_of_any_integer_type_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(17, 3, 5, 20, 64, 32)
    assert torch.equal(run(arguments | {"experts": arguments["experts"].to(torch.int32)}), run(arguments))


@needs_kernels
@pytest.mark.parametrize("config", [CONFIGS["plain and split"], CONFIGS["swapped"]], ids=["plain and split", "swapped"])
@pytest.mark.parametrize("missing", [-1, -(2**31), 3, 4, 2**31 - 1])
def test_experts_that_do_not_exist_give_zeros(missing: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, config)
    arguments = problem(5, 2, 3, 40, 160, 32)
    arguments["experts"] = torch.full((5, 2), missing, device=DEVICE)
    assert torch.equal(run(arguments), torch.zeros(5, 2, 40, device=DEVICE))
    arguments["experts"][1, 1] = 2
    y = run(arguments)
    check(arguments, y, config.swap)
    assert y[1, 1].all()


@needs_kernels
def test_weights_of_experts_without_tokens_are_not_read() -> None:
    arguments = problem(17, 2, 4, 20, 64, 32)
    arguments["experts"].clamp_(0, 3)[arguments["experts"] == 1] = 2
    y = run(arguments)
    for name in ("scale", "zero", "bias"):
        arguments[name][1] = torch.nan
    assert torch.equal(run(arguments), y)


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_lies_beyond_the_last_token_and_input_is_not_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, config)
    arguments = problem(3, 2, 3, 5, 160, 32)
    surrounded = torch.full((5, 160), torch.nan, device=DEVICE)
    surrounded[1:4] = arguments["x"]
    arguments["x"] = surrounded[1:4]
    assert not run(arguments).isnan().any()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combined_is_the_sum_of_pairs(dtype: torch.dtype) -> None:
    arguments = problem(17, 3, 5, 20, 64, 64, dtype)
    for function in (torch.ops.netsuke.w4a16_experts, experts.w4a16_experts_reference):
        y, combined = function(**arguments).double(), function(**arguments, combine=True)
        # One rounding, of sums in float32: torch does not truncate to bfloat16.
        allowed = torch.finfo(dtype).eps / 2 * y.sum(1).abs() + 2.0**-22 * y.abs().sum(1)
        assert combined.dtype == dtype
        assert bool(((combined.double() - y.sum(1)).abs() <= allowed).all())


@needs_kernels
@pytest.mark.parametrize("splits", [2, 9])
def test_split_sums_are_the_same_every_time_and_leave_their_counters_at_0(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Config(16, 32, split_k=splits))
    arguments = problem(5, 3, 2, 33, 640, 128)
    first = run(arguments)
    check(arguments, first, swap=False)
    assert torch.equal(run(arguments), first)
    assert not split_k.workspace(DEVICE, 1, 1)[1].any()


@pytest.mark.parametrize(("tokens", "top_k", "outputs"), [(0, 2, 5), (3, 0, 5), (3, 2, 0)])
def test_nothing_in_gives_nothing_out(tokens: int, top_k: int, outputs: int) -> None:
    words, scale, _ = experts.pack(torch.zeros(2, outputs, 64, dtype=torch.int8), torch.ones(2, outputs, 1))
    x, of_pair = torch.zeros(tokens, 64, dtype=torch.float16), torch.zeros(tokens, top_k, dtype=torch.int64)
    assert experts.w4a16_experts(x, words, scale, of_pair).shape == (tokens, top_k, outputs)
    combined = experts.w4a16_experts(x, words, scale, of_pair, combine=True)
    assert torch.equal(combined, torch.zeros(tokens, outputs, dtype=torch.float16))


def spelled_out(of_pair: Tensor, num_experts: int, block_m: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """`group_by_expert` without the tiles that are empty, in plain Python."""
    kinds = [expert if 0 <= expert < num_experts else num_experts for expert in of_pair.flatten().tolist()]
    order = sorted(range(len(kinds)), key=lambda pair: kinds[pair])
    tiles = []
    for kind in range(num_experts + 1):
        begin, end = (sum(other < bound for other in kinds) for bound in (kind, kind + 1))
        tiles += [(kind, first, min(first + block_m, end)) for first in range(begin, end, block_m)]
    return order, tiles


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_m", [1, 16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(1, 1, 1), (3, 2, 1), (33, 3, 7), (100, 8, 128), (65, 2, 4)]
)
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(
    tokens: int, top_k: int, num_experts: int, block_m: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    for low, high in ((0, num_experts), (-2, num_experts + 2), (num_experts - 1, num_experts), (-1, 0)):
        of_pair = torch.randint(low, high, (tokens, top_k), generator=generator).to(dtype)
        order, tiles = group_by_expert(of_pair.to(DEVICE), num_experts, block_m)
        expected_order, expected_tiles = spelled_out(of_pair, num_experts, block_m)
        assert order.tolist() == expected_order
        assert [tuple(tile) for tile in tiles.tolist() if tile[1] < tile[2]] == expected_tiles
        assert order.dtype == tiles.dtype == torch.int32


def test_no_routing_needs_more_tiles_than_there_are_and_some_needs_all() -> None:
    for pairs, num_experts, block_m in [(1, 1, 16), (5, 3, 4), (9, 2, 4), (64, 1, 16), (17, 40, 8), (100, 7, 16)]:
        most = most_tiles(pairs, num_experts, block_m)
        kinds = min(pairs, num_experts + 1)
        worst = torch.arange(pairs).clamp_max(kinds - 1)[:, None]
        assert len(spelled_out(worst, num_experts, block_m)[1]) == most
        generator = torch.Generator().manual_seed(pairs)
        for _ in range(20):
            of_pair = torch.randint(-1, num_experts, (pairs, 1), generator=generator)
            assert len(spelled_out(of_pair, num_experts, block_m)[1]) <= most


def test_packing_is_that_of_each_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (3, 70, 160), dtype=torch.int8, generator=generator)
    scale, zero_point = torch.rand(3, 70, 5, generator=generator), torch.randint(-8, 8, (3, 70, 5), generator=generator)
    for index in range(3):
        for got, expected in zip(
            experts.pack(codes, scale, zero_point),
            wna16.pack(codes[index], scale[index], zero_point[index], 4),
            strict=True,
        ):
            assert torch.equal(got[index], expected)  # type: ignore[index, arg-type]
    assert experts.pack(codes, scale)[2] is None


HALF = torch.float16
WRONG: dict[str, dict[str, Tensor]] = {
    "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 160, dtype=torch.int8)},
    "x has 4 rows, expected one for each of 3 tokens or of 6 pairs": {"x": torch.zeros(4, 160, dtype=HALF)},
    r"words has shape \[1, 2, 64, 32\], expected \[4, any": {"words": torch.zeros(1, 2, 64, 32, dtype=torch.int16)},
    r"words has shape \[1, 1, 64, 32\], expected \[1, 2, 64": {
        "words": torch.zeros(4, 1, 1, 64, 32, dtype=torch.int16)
    },
    r"words has strides": {"words": torch.zeros(1, 2, 64, 32, 4, dtype=torch.int16).permute(4, 0, 1, 2, 3)},
    "scale has 3 groups, which do not divide the 160 inputs": {"scale": torch.ones(4, 3, 5)},
    r"scale has shape \[5, 5\]": {"scale": torch.ones(5, 5)},
    r"zero has shape \[5, 5\], expected \[4, 5, 5\]": {"zero": torch.ones(5, 5)},
    r"bias has shape \[5\], expected \[4, 5\]": {"bias": torch.zeros(5)},
    "experts is torch.float32, expected torch.int32 or torch.int64": {"experts": torch.zeros(3, 2)},
    r"experts has shape \[3\], expected \[any, any\]": {"experts": torch.zeros(3, dtype=torch.int64)},
    r"routing_weights has shape \[3, 1\], expected \[3, 2\]": {"routing_weights": torch.zeros(3, 1)},
    "routing_weights is torch.float16, expected torch.float32": {"routing_weights": torch.zeros(3, 2, dtype=HALF)},
    "experts is on meta, x on cpu": {"experts": torch.zeros(3, 2, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    arguments = {key: None if each is None else each.cpu() for key, each in problem(3, 2, 4, 5, 160, 32, HALF).items()}
    with pytest.raises(ValueError, match=message):
        experts.w4a16_experts(**arguments | WRONG[message])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wna16, "gpu_of", lambda _: (hopper, 132))
    compiled = {
        (gate.variant.constants["GROUP"], gate.variant.constants["SPLIT"], gate.variant.constants["SWAP"],
         gate.variant.constants["BLOCK_M"], gate.variant.constants["BLOCK_N"], gate.variant.num_warps)
        for gate in experts.gates() if gate.capability == (90 if hopper else 80)
    }  # fmt: skip
    for pairs in (1, 17, 33, 65, 513):
        for group_size in (0, 32, 64, 128):
            config = experts.configuration(pairs, 1, 1024, 1 << 17, group_size, DEVICE)
            swap, warps = config.swap, config.num_warps
            assert (group_size, config.split_k > 1, swap, config.block_m, config.block_n, warps) in compiled


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_blocks_are_as_tall_as_an_expert_has_tokens() -> None:
    def block_m(pairs: int, num_experts: int) -> int:
        return experts.configuration(pairs, num_experts, 1536, 2048, 128, DEVICE).block_m

    assert block_m(8, 128) == 16
    assert block_m(16 * 128, 128) == 16
    assert block_m(17 * 128, 128) == 32
    assert block_m(512 * 8, 128) == 32
    assert block_m(4096 * 8, 128) == 128
    assert experts.configuration(2, 8, 4096, 14336, 128, DEVICE).split_k == 5  # 2 experts · 64 blocks on 132 processors
    assert experts.configuration(1024, 8, 4096, 14336, 128, DEVICE).split_k == 1


def test_the_operator_meets_the_contract_of_torch_library() -> None:
    for combine in (False, True):
        arguments = problem(2, 1, 2, 17, 32, 32)
        torch.library.opcheck(torch.ops.netsuke.w4a16_experts, (*arguments.values(), combine))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem(3, 2, 4, 17, 160, 32, torch.float16)
    compiled = torch.compile(lambda x: run(arguments | {"x": x}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["x"]), run(arguments) * 2)


SHIPPED = list(dict.fromkeys(config for hopper in (True, False) for config in wna16.shipped(4, hopper).values()))

COVERING = [
    (config, row_per_pair, *rest)
    for (config, row_per_pair), *rest in zip(
        product(SHIPPED, (False, True)),
        cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16)),
        cycle((0, 1, 1, 0, 1, 0, 0, 1)),
        cycle((32, 64, 2048, 128, 64)),
        cycle(ZEROS),
        strict=False,
    )
]
"""Every configuration in both types, with both kinds of rows, on both shapes, and in all pairs of these; periods that
have no common factor vary groups and zeros along with them. Each is a compilation, so that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "row_per_pair", "dtype", "more", "group_size", "zero"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    config: Config, row_per_pair: bool, dtype: torch.dtype, more: int, group_size: int, zero: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, replace(config, split_k=3 if config.block_m < 128 else 1))
    tokens, outputs = 2 * config.block_m + more, (700, 768)[more]
    arguments = problem(tokens, 3, 6, outputs, 2048, group_size, dtype, zero, row_per_pair)
    check(arguments, run(arguments), config.swap)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 512])
def test_a_captured_graph_replays_on_new_inputs_and_routing(tokens: int) -> None:
    arguments = problem(tokens, 2, 8, 768, 2048, 128, torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for _ in range(3):
        arguments["x"].normal_()
        arguments["experts"].random_(-1, 9)
        graph.replay()
        check(arguments, y, swap=True)
