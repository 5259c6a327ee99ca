"""8-bit weights times 16-bit activations: what the formula says, for any shape, group and configuration."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import split_k, w8a16
from quant_kernels.library import INTERPRETED
from quant_kernels.tuning import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
CONFIGS = {
    "plain": Config(16, 64),
    "plain and split": Config(16, 32, split_k=2),
    "swapped": Config(32, 64, swap=True),
    "swapped and split": Config(16, 64, split_k=3, swap=True),
}
LAYERS = [(1, 1, 32, 32), (3, 70, 160, 32), (17, 33, 192, 64), (33, 3, 384, 128), (2, 40, 512, 256), (5, 66, 77, 77)]
"""Tokens, outputs, inputs, group size."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16]
ZEROS = ["symmetric", "integer", "float"]


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(w8a16, "configuration", lambda *_: config)


def problem(
    tokens: int, outputs: int, inputs: int, group_size: int, dtype: torch.dtype = torch.float32, zero: str = "integer"
) -> dict[str, Tensor | None]:
    """Arguments of the operator; activations have a mean, so that a wrong zero point shows."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)
    shape = (outputs, inputs // group_size)
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.002 + 0.001).to(dtype)
    zero_point = {
        "symmetric": None,
        "integer": torch.randint(-128, 128, shape, generator=generator),
        "float": torch.rand(shape, generator=generator) * 255 - 128,
    }[zero]
    weight, scale, zeros = w8a16.pack(codes, scale, zero_point)
    x = (torch.randn(tokens, inputs, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    made = {"x": x, "weight": weight, "scale": scale, "zero": zeros, "bias": bias}
    return {name: None if each is None else each.to(DEVICE) for name, each in made.items()}


def run(arguments: dict[str, Tensor | None]) -> Tensor:
    return torch.ops.netsuke.w8a16(**arguments)


def exact(arguments: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The result in float64, element by element, and the sum of the magnitudes of its terms."""
    x, weight, scale, zero, bias = (None if each is None else each.cpu() for each in arguments.values())
    (groups, outputs), inputs = scale.shape, x.shape[1]
    group = torch.arange(inputs) * groups // inputs
    shifted = w8a16.unpack(weight, inputs).double() - (0 if zero is None else zero.double().T[:, group])
    weight = shifted * scale.double().T[:, group]
    x, bias = x.double(), torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def check(arguments: dict[str, Tensor | None], y: Tensor, swap: bool) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), float32 sums, of terms up to 128
    steps where products are shifted (tensor cores truncate them), and a rounding of each weight where weights are."""
    expected, magnitude = exact(arguments)
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    terms = 2.0**-17 if INTERPRETED else 2.0**-15
    if swap and not INTERPRETED:
        terms += 1.5 * eps
    allowed = 1.01 * rounding * expected.abs() + terms * magnitude
    assert y.dtype == arguments["x"].dtype  # type: ignore[union-attr]
    assert bool(((y.cpu().double() - expected).abs() <= allowed).all())


CASES = [
    pytest.param(*case, dtype, bias, id=f"{' '.join(map(str, case))} {dtype} {bias}")
    for case, dtype, bias in zip(
        product(CONFIGS, LAYERS, ZEROS), cycle([*DTYPES, *DTYPES, DTYPES[0]]), cycle((True, True, False, True, False)),
        strict=False,
    )
]  # fmt: skip
"""Every configuration and layer with all zeros; types, and whether there is a bias, go through all pairs with each:
their periods have no common factor with these numbers."""


@needs_kernels
@pytest.mark.parametrize(("config", "layer", "zero", "dtype", "bias"), CASES)
def test_the_result_is_the_formula(
    config: str, layer: tuple[int, int, int, int], zero: str, dtype: torch.dtype, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, CONFIGS[config])
    arguments = problem(*layer, dtype, zero)
    if not bias:
        arguments["bias"] = None
    check(arguments, run(arguments), CONFIGS[config].swap)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_reference_is_the_formula(layer: tuple[int, int, int, int], zero: str) -> None:
    for dtype in DTYPES:
        arguments = problem(*layer, dtype, zero)
        check(arguments, w8a16.w8a16_reference(**arguments), swap=False)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_lies_beyond_the_last_token_and_input_is_not_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, config)
    arguments = problem(3, 5, 160, 32)
    surrounded = torch.full((5, 160), torch.nan, device=DEVICE)
    surrounded[1:4] = arguments["x"]  # type: ignore[assignment]
    arguments["x"] = surrounded[1:4]
    assert not run(arguments).isnan().any()


@needs_kernels
@pytest.mark.parametrize("splits", [2, 3, 9])
def test_split_sums_are_the_same_every_time_and_leave_their_counters_at_0(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Config(16, 32, split_k=splits))
    arguments = problem(3, 33, 768, 256)
    first = run(arguments)
    check(arguments, first, swap=False)
    assert torch.equal(run(arguments), first)
    assert not split_k.workspace(DEVICE, 1, 1)[1].any()


@needs_kernels
def test_scales_and_zeros_may_be_of_another_type_than_activations() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = problem(3, 20, 256, 64, torch.float16)
        arguments |= {name: arguments[name].to(dtype) for name in ("scale", "zero", "bias")}  # type: ignore[union-attr]
        check(arguments, run(arguments), swap=False)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_packing_keeps_the_weight(bits: int) -> None:
    limit = 1 << bits - 1
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-limit, limit, (5, 64), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-limit, limit, (5, 2), dtype=torch.int32, generator=generator)
    scale = torch.rand(5, 2, generator=generator)
    weight = w8a16.w8a16_reference(torch.eye(64), *w8a16.pack(codes, scale, zero_point)).T
    expected = (codes - zero_point.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_inputs_that_are_32_apart_are_neighbours_in_a_row_and_its_rest_is_zero() -> None:
    codes = torch.arange(1, 101, dtype=torch.int8).repeat(3, 1)
    weight, _, _ = w8a16.pack(codes, torch.ones(3, 1))
    assert weight.shape == (3, 128)
    assert weight.is_contiguous()
    assert weight[1, :4].tolist() == [1, 33, 2, 34]
    assert weight[1, 64:74].tolist() == [65, 97, 66, 98, 67, 99, 68, 100, 69, 0]
    assert torch.equal(w8a16.unpack(weight, 100), codes)


def test_zero_points_that_are_floats_keep_their_type() -> None:
    scale = torch.ones(2, 1, dtype=torch.bfloat16)
    _, _, zero = w8a16.pack(torch.zeros(2, 32, dtype=torch.int8), scale, torch.tensor([[100.37], [-3.5]]))
    assert zero is not None
    assert torch.equal(zero, torch.tensor([[100.37, -3.5]]))


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(tokens: int, outputs: int) -> None:
    weight, scale, _ = w8a16.pack(torch.zeros(outputs, 64, dtype=torch.int8), torch.ones(outputs, 1))
    assert w8a16.w8a16(torch.zeros(tokens, 64, dtype=torch.float16), weight, scale).shape == (tokens, outputs)


HALF = torch.float16
WRONG: dict[str, dict[str, Tensor]] = {
    "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 160, dtype=torch.int8)},
    r"x has shape \[160\], expected \[any, any\]": {"x": torch.zeros(160, dtype=HALF)},
    r"x has strides \(1, 3\)": {"x": torch.zeros(160, 3, dtype=HALF).T},
    r"weight has shape \[5, 160\], expected \[5, 256\]": {"weight": torch.zeros(5, 160, dtype=torch.int8)},
    "weight is torch.uint8, expected torch.int8": {"weight": torch.zeros(5, 256, dtype=torch.uint8)},
    "scale is torch.float64": {"scale": torch.ones(5, 5, dtype=torch.float64)},
    "scale has 3 groups, which do not divide the 160 inputs": {"scale": torch.ones(3, 5)},
    "scale has groups of 80 inputs: 32, 64, multiples of 128 or all 160": {"scale": torch.ones(2, 5)},
    r"zero has shape \[5\], expected \[5, 5\]": {"zero": torch.ones(5)},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "scale is on meta, x on cpu": {"scale": torch.ones(5, 5, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    arguments = {key: None if each is None else each.cpu() for key, each in problem(3, 5, 160, 32, HALF).items()}
    with pytest.raises(ValueError, match=message):
        w8a16.w8a16(**arguments | WRONG[message])  # type: ignore[arg-type]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu() -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return w8a16.configuration(tokens, outputs, inputs, 128, DEVICE).split_k

    assert splits(1, 4096, 4096) == 8
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a16, "gpu_of", lambda _: (hopper, 132))
    compiled = {
        (gate.variant.constants["GROUP"], gate.variant.constants["SPLIT"], gate.variant.constants["SWAP"],
         gate.variant.constants["BLOCK_M"], gate.variant.constants["BLOCK_N"], gate.variant.num_warps)
        for gate in w8a16.gates() if gate.capability == (90 if hopper else 80)
    }  # fmt: skip
    for tokens in (1, 17, 33, 65, 513):
        for group_size in (0, 32, 64, 128):
            config = w8a16.configuration(tokens, 1024, 1 << 17, group_size, DEVICE)
            swap, warps = config.swap, config.num_warps
            assert (group_size, config.split_k > 1, swap, config.block_m, config.block_n, warps) in compiled


def test_the_operator_meets_the_contract_of_torch_library() -> None:
    arguments = problem(3, 17, 160, 32)
    torch.library.opcheck(torch.ops.netsuke.w8a16, tuple(arguments.values()))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem(3, 17, 160, 32, torch.float16)
    compiled = torch.compile(lambda x: run(arguments | {"x": x}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["x"]), run(arguments) * 2)


SHIPPED = (w8a16.FEW, w8a16.FEW_GROUPS_OF_32, w8a16.SOME, w8a16.MORE, w8a16.MANY, w8a16.MANY_AMPERE, w8a16.PREFILL)

COVERING = [
    (config, splits, *rest)
    for (config, splits), *rest in zip(
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
@pytest.mark.parametrize(("config", "splits", "dtype", "more", "group_size", "zero"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    config: Config, splits: int, dtype: torch.dtype, more: int, group_size: int, zero: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, replace(config, split_k=splits))
    arguments = problem(config.block_m + more, (1000, 6144)[more], 4096, group_size, dtype, zero)
    check(arguments, run(arguments), config.swap)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 64, 128, 1024])
def test_a_captured_graph_replays_on_new_inputs(tokens: int) -> None:
    arguments = problem(tokens, 4096, 4096, 128, torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for _ in range(3):
        arguments["x"].normal_()  # type: ignore[union-attr]
        graph.replay()
        check(arguments, y, swap=tokens > 16)


@pytest.mark.gpu
def test_results_of_more_than_2_to_the_31_elements() -> None:
    arguments = problem(33000, 66000, 128, 128, torch.float16)
    y = run(arguments)
    check(arguments | {"x": arguments["x"][-3:]}, y[-3:], swap=True)  # type: ignore[index]


ALL_WORDS = np.arange(1 << 16, dtype=np.uint32)


@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_assembly_turns_both_bytes_of_each_of_all_words_into_their_codes(dtype: torch.dtype, half: int) -> None:
    """Runs the very text, both words of a register at once: the other one is the complement."""
    assembly = w8a16.BFLOAT16_ASSEMBLY if dtype is torch.bfloat16 else w8a16.FLOAT16_ASSEMBLY
    low, high = emulate(assembly.value, ALL_WORDS << half | (ALL_WORDS ^ 0xFFFF) << (16 - half), dtype)
    np.testing.assert_array_equal(low[:, half // 16], (ALL_WORDS & 0xFF).astype(np.uint8).view(np.int8))
    np.testing.assert_array_equal(high[:, half // 16], (ALL_WORDS >> 8).astype(np.uint8).view(np.int8))


def emulate(assembly: str, words: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The two outputs of PTX as exact values [words, 2], before the rounding that none of them needs."""
    registers = {"$2": words}
    values = {}
    lines = [line for line in assembly.splitlines() if line.endswith(";") and not line.startswith(".reg")]
    for name, target, *operands in (re.findall(r"[\w.$]+", line) for line in lines):
        sources = [registers[each] if each in registers else np.uint32(int(each, 0)) for each in operands]
        if name == "mov.b32":
            registers[target] = np.full_like(words, sources[0])
        elif name == "shr.b32":
            registers[target] = sources[0] >> sources[1]
        elif name == "lop3.b32":
            registers[target] = lop3(*sources)
        elif name == "fma.rn.bf16x2":
            a, b, c = (floats(each, torch.bfloat16) for each in sources)
            values[target] = a * b + c
        elif name == "add.rn.f16x2":
            values[target] = floats(sources[0], torch.float16) + floats(sources[1], torch.float16)
        else:
            raise NotImplementedError(name)
    assert all(bool((torch.from_numpy(each).to(dtype).double().numpy() == each).all()) for each in values.values())
    return values["$0"], values["$1"]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit of the table is the result for one combination of bits of a, b and c."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            terms = [value if row >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def floats(register: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Both halves of a register, [words, 2] in float64."""
    halves = np.stack((register & np.uint32(0xFFFF), register >> np.uint32(16)), axis=1).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(dtype).double().numpy()
