"""fp8 weights times fp8 or 16-bit activations: what the formula says, however scales are laid out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant_kernels import fp8, split_k
from quant_kernels.fp8_quant import fp8_quant_reference, has_fp8
from quant_kernels.library import INTERPRETED
from quant_kernels.tuning import Config

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
OPERATORS = ["fp8", "w8a16_fp8"]
if DEVICE.type == "cuda" and not has_fp8(DEVICE):
    OPERATORS.remove("fp8")
CONFIGS = {
    "plain": Config(16, 64),
    "plain and split": Config(32, 128, split_k=3),
    "swapped": Config(32, 32, swap=True),
    "swapped and split": Config(16, 128, split_k=2, swap=True),
    "large": Config(64, 256, swap=True),
}
SIZES = [(1, 1, 1), (3, 17, 33), (17, 140, 128), (33, 70, 384), (2, 130, 700)]
"""Tokens, outputs, inputs."""
SCALED = ["rows", "all", "groups"]
"""A scale per token and channel, for all, or per 128 inputs and 128 × 128 weights."""
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float16, torch.bfloat16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16)


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(fp8, "configuration", lambda *_: config)


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    """Any but NaN, subnormals, both zeros and ±448 among them."""
    code = torch.randint(0, 127, shape, dtype=torch.uint8, generator=generator)
    return (code | torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) << 7).view(FP8)


def problem(
    operator: str, tokens: int, outputs: int, inputs: int, scaled: str = "rows", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of an operator; scales of the weight have both signs."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)
    groups = triton.cdiv(inputs, 128)
    shapes = {
        "rows": ((tokens,), (outputs,)), "all": ((1,), (1,)),
        "groups": ((tokens, groups), (triton.cdiv(outputs, 128), groups)),
    }[scaled]  # fmt: skip
    weight = codes(generator, outputs, inputs)
    x_scale = (torch.rand(shapes[0], generator=generator) + 0.1) / 64
    scale = torch.randn(shapes[1], generator=generator) / 16
    bias = torch.randn(outputs, generator=generator)
    if operator == "fp8":
        made = {"x": codes(generator, tokens, inputs), "x_scale": x_scale, "weight": weight, "scale": scale,
                "bias": bias, "dtype": dtype}  # fmt: skip
    else:
        x = torch.randn(tokens, inputs, generator=generator).to(dtype)
        made = {"x": x, "words": fp8.pack_words(weight), "scale": scale, "bias": bias}
    return {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in made.items()}


def run(operator: str, arguments: dict[str, Any]) -> Tensor:
    return getattr(torch.ops.netsuke, operator)(**arguments)


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A scale for every element: of one, of rows, or of groups of 128 columns (and rows)."""
    if scale.ndim == 1:
        return scale.cpu().double()[:, None].expand(rows, columns)
    row = torch.arange(rows) // (1 if len(scale) == rows else 128)
    return scale.cpu().double()[row][:, torch.arange(columns) // 128]


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The formula in float64, element by element, and the sum of the magnitudes of its terms."""
    x = arguments["x"].cpu().double()
    inputs = x.shape[1]
    weight = (fp8.unpack_words(arguments["words"], inputs) if "words" in arguments else arguments["weight"]).cpu()
    weight = weight.double() * spread(arguments["scale"], *weight.shape)
    if "x_scale" in arguments:
        x = x * spread(arguments["x_scale"], *x.shape)
    bias = torch.zeros(len(weight)) if arguments["bias"] is None else arguments["bias"].cpu()
    return x @ weight.T + bias.double(), x.abs() @ weight.abs().T + bias.double().abs()


def check(arguments: dict[str, Any], y: Tensor) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), and sums of terms: in float32,
    or, where Hopper adds up 128 products of fp8, with 13 bits after the point of the largest."""
    expected, magnitude = exact(arguments)
    dtype = arguments.get("dtype", arguments["x"].dtype)
    rounding = torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)
    terms = 2.0**-20 if INTERPRETED or "words" in arguments else 2.0**-13
    allowed = 1.01 * rounding * expected.abs() + terms * magnitude + torch.finfo(torch.float16).tiny
    worst = ((y.cpu().double() - expected).abs() / allowed).max()
    assert y.dtype == dtype
    assert worst <= 1, f"{worst:.2f} times the error that rounding explains"


CASES = [
    pytest.param(*case, *rest, id=" ".join(map(str, (*case, *rest))))
    for case, *rest in zip(
        product(OPERATORS, CONFIGS, SIZES), cycle(SCALED), cycle([*DTYPES, *DTYPES, DTYPES[0]]), strict=False
    )
]
"""Every configuration and size of both operators; scales and types go through all pairs with each, and with each other:
their periods have no common factor with these numbers."""


@needs_kernels
@pytest.mark.parametrize(("operator", "name", "size", "scaled", "dtype"), CASES)
def test_the_result_is_the_formula(
    operator: str, name: str, size: tuple[int, int, int], scaled: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = CONFIGS[name]
    use(monkeypatch, replace(config, block_n=128) if scaled == "groups" else config)
    arguments = problem(operator, *size, scaled, dtype)
    check(arguments, run(operator, arguments))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_the_formula(operator: str, size: tuple[int, int, int], scaled: str) -> None:
    arguments = problem(operator, *size, scaled)
    check(arguments, getattr(fp8, f"{operator}_reference")(**arguments))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_results_and_bias_of_any_type(operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS["swapped and split"])
    arguments = problem(operator, 17, 40, 256, dtype=dtype)
    check(arguments, run(operator, arguments | {"bias": arguments["bias"].to(torch.float32)}))
    arguments["bias"] = arguments["bias"].to(dtype)
    check(arguments, run(operator, arguments))
    arguments["bias"] = None
    check(arguments, run(operator, arguments))


@needs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_split_sums_are_the_same_every_time_and_leave_their_counters_at_0(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = problem(operator, 9, 40, 1100, "groups")
    for splits in (2, 3, 8, 11):
        use(monkeypatch, Config(16, 64, split_k=splits))
        first = run(operator, arguments)
        check(arguments, first)
        assert torch.equal(run(operator, arguments), first)
    assert not any(counters.any() for kept in split_k._WORKSPACES.values() for _, counters in kept)


@needs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_lies_beyond_the_last_row_and_input_is_not_read(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS["plain and split"])
    arguments = problem(operator, 3, 5, 200)
    for name in {"x", "weight"} & arguments.keys():
        rows = len(arguments[name])
        surrounded = torch.full((rows + 2, 200), torch.nan).to(arguments[name].dtype).to(DEVICE)
        surrounded[1:-1] = arguments[name]
        arguments[name] = surrounded[1:-1]
    assert not run(operator, arguments).isnan().any()


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, that products with NaN are invalid
@pytest.mark.parametrize("nan", [0x7F, 0xFF])
@pytest.mark.parametrize("scaled", SCALED)
def test_codes_that_are_not_numbers_make_their_results_so(
    scaled: str, nan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fp8" not in OPERATORS:
        pytest.skip("has no products of fp8")
    use(monkeypatch, CONFIGS["swapped and split"])
    arguments = problem("fp8", 3, 5, 300, scaled)
    arguments["x"].view(torch.uint8)[1, 290] = nan
    arguments["weight"].view(torch.uint8)[4, 7] = nan
    for y in (run("fp8", arguments), fp8.fp8_reference(**arguments)):
        expected = torch.zeros(3, 5, dtype=torch.bool)
        expected[1] = expected[:, 4] = True
        assert torch.equal(y.isnan().cpu(), expected)


def test_packing_refuses_what_is_not_a_number() -> None:
    for code in (0x7F, 0xFF):
        weight = torch.zeros(3, 130, dtype=torch.uint8)
        weight[2, 129] = code
        with pytest.raises(ValueError, match="weight has codes 0x7f or 0xff, which are NaN"):
            fp8.pack_words(weight.view(FP8))


@pytest.mark.parametrize("size", [(1, 1), (3, 64), (5, 130), (2, 300)])
def test_packing_keeps_every_code(size: tuple[int, int]) -> None:
    weight = codes(torch.Generator().manual_seed(0), *size)
    words = fp8.pack_words(weight)
    assert words.shape == (size[0], -(-size[1] // 128) * 64)
    assert torch.equal(fp8.unpack_words(words, size[1]).view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("grouped", [False, True])
def test_activations_quantized_on_the_way_come_close_to_the_float_product(grouped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 512, generator=generator), torch.randn(256, 512, generator=generator)
    quantized, x_scale = fp8_quant_reference(x, grouped)
    if grouped:
        squares = weight.view(2, 128, 4, 128)
        scale = squares.abs().amax(dim=(1, 3)) / 448
        w = (squares / scale[:, None, :, None]).view(256, 512).to(FP8)
    else:
        w, scale = fp8_quant_reference(weight)
    expected = x @ weight.T
    results = [run("w8a16_fp8", {"x": x.half().to(DEVICE), "words": fp8.pack_words(w).to(DEVICE),
                                 "scale": scale.to(DEVICE)})]  # fmt: skip
    if "fp8" in OPERATORS:
        results.append(fp8.fp8_reference(quantized, x_scale, w, scale, None, torch.float32))
    for y in results:
        # Three bits of mantissa: off by 2⁻⁴ at most, by about 2⁻⁵ on average, and twice where both are quantized.
        error = (y.cpu().float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 2.0**-5 * 2**0.5


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens_give_no_rows(operator: str) -> None:
    assert run(operator, problem(operator, 0, 5, 64, "all")).shape == (0, 5)


WRONG: dict[str, dict[str, dict[str, Any]]] = {
    "fp8": {
        "x is torch.uint8, expected torch.float8_e4m3fn": {"x": torch.zeros(3, 130, dtype=torch.uint8)},
        r"x has strides \(1, 3\)": {"x": torch.zeros(130, 3).to(FP8).T},
        "leaves rows without values": {"x": torch.zeros(3, 0).to(FP8), "weight": torch.zeros(5, 0).to(FP8)},
        r"weight has shape \[5, 65\], expected \[any, 130\]": {"weight": torch.zeros(5, 65).to(FP8)},
        r"x_scale has shape \[2\], expected \[3\]": {"x_scale": torch.ones(2)},
        r"x_scale has shape \[3\], expected \[3, 2\]": {"scale": torch.ones(1, 2)},
        "x_scale is torch.float16": {"x_scale": torch.ones(3, dtype=torch.float16)},
        "dtype=torch.int8: results are torch.float16": {"dtype": torch.int8},
    },
    "w8a16_fp8": {
        "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 130, dtype=torch.int8)},
        r"words has shape \[5, 64\], expected \[any, 128\]": {"words": torch.zeros(5, 64, dtype=torch.int16)},
        "words is torch.uint8, expected torch.int16": {"words": torch.zeros(5, 128, dtype=torch.uint8)},
    },
}
FOR_BOTH: dict[str, dict[str, Any]] = {
    "scale is torch.float64": {"scale": torch.ones(5, dtype=torch.float64)},
    r"scale has shape \[4\], expected \[5\]": {"scale": torch.ones(4)},
    r"scale has shape \[1, 1\], expected \[1, 2\]": {"scale": torch.ones(1, 1)},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "scale is on meta, x on cpu": {"scale": torch.ones(5, device="meta")},
}


@pytest.mark.parametrize(
    ("operator", "message"), [(name, words) for name in WRONG for words in (WRONG[name] | FOR_BOTH)]
)
def test_what_does_not_fit_is_named(operator: str, message: str) -> None:
    arguments = problem(operator, 3, 5, 130, dtype=torch.float16)
    arguments = {key: each.cpu() if isinstance(each, Tensor) else each for key, each in arguments.items()}
    with pytest.raises(ValueError, match=message):
        getattr(fp8, operator)(**arguments | (WRONG[operator] | FOR_BOTH)[message])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu() -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return fp8.configuration(tokens, outputs, inputs, True, False, DEVICE).split_k

    assert splits(1, 4096, 4096) == 4
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(words: bool, grouped: bool) -> None:
    compiled = [
        Config(constants["BLOCK_M"], constants["BLOCK_N"], 128, constants["SPLIT"], variant.num_warps,
               variant.num_stages, constants["SWAP"])
        for variant, constants in ((gate.variant, gate.variant.constants) for gate in fp8.gates())
        if (constants["WORDS"], constants["GROUPED"]) == (words, grouped)
    ]  # fmt: skip
    for tokens in (1, 16, 17, 32, 33, 64, 65, 128, 512, 513, 4096):
        config = fp8.configuration(tokens, 1024, 1 << 17, words, grouped, DEVICE)
        split = config.split_k > 1 or (tokens > 512 and config != fp8.PREFILL)  # gates are of the case with more to do
        assert replace(config, split_k=split) in compiled


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_meet_the_contract_of_torch_library(operator: str, scaled: str) -> None:
    arguments = problem(operator, 3, 17, 130, scaled)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # To see whether arguments have changed torch compares them, which it cannot for fp8.
    utilities = checks[1:] if operator == "fp8" else checks
    torch.library.opcheck(getattr(torch.ops.netsuke, operator), tuple(arguments.values()), test_utils=utilities)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_graph_goes_through(operator: str) -> None:
    arguments = problem(operator, 3, 17, 130, dtype=torch.float16)

    def doubled(**arguments: Any) -> Tensor:
        return run(operator, arguments) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), doubled(**arguments))


SHIPPED = {
    "fp8": (fp8.FEW, fp8.SOME, fp8.MORE, fp8.MANY, fp8.PREFILL),
    "w8a16_fp8": (fp8.FEW_16, fp8.SOME_16, fp8.MORE_16, fp8.MANY_16),
}

COVERING = [
    (*case, *rest)
    for case, *rest in zip(
        [
            (operator, config, splits)
            for operator in OPERATORS
            for config in SHIPPED[operator]
            for splits in ((1,) if config == fp8.PREFILL else (1, 4))
        ],
        cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16)),
        cycle((0, 1, 1, 0, 1, 0, 0, 1)),
        cycle(("groups", "rows", "all")),  # PREFILL, which is not for groups, meets the last
        strict=False,
    )
]
"""Every configuration with and without splits, with types, shapes and kinds of scales varied along with them. Each is a
compilation, so that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "config", "splits", "dtype", "more", "scaled"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    operator: str, config: Config, splits: int, dtype: torch.dtype, more: int, scaled: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use(monkeypatch, replace(config, split_k=splits))
    outputs, inputs = ((1000, 14336), (6144, 4224))[more]
    arguments = problem(operator, config.block_m + more, outputs, inputs, scaled, dtype)
    arguments["scale"] /= 64
    check(arguments, run(operator, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_captured_graph_replays_on_new_inputs(operator: str, tokens: int) -> None:
    arguments = problem(operator, tokens, 4096, 4096, "groups", torch.bfloat16)
    run(operator, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(operator, arguments)
    for _ in range(3):
        arguments["x"].copy_(torch.randn(arguments["x"].shape))
        graph.replay()
        check(arguments, y)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_results_of_more_than_2_to_the_31_elements(operator: str) -> None:
    arguments = problem(operator, 33000, 66000, 128, dtype=torch.bfloat16)
    y = run(operator, arguments)
    check({name: each[-3:] if name in ("x", "x_scale") else each for name, each in arguments.items()}, y[-3:])


def emulate(code: str, words: Any) -> tuple[Any, Any]:
    """What the assembly `code` makes of 32-bit `words` in $2: $0 and $1."""
    registers = {"$2": words}
    for line in code.strip("{}\n").split(";")[:-1]:
        name, target, *sources = re.findall(r"[\w.$]+", line)
        if name == ".reg":
            continue
        a, *rest = (registers[each] if each in registers else np.uint32(int(each, 0)) for each in sources)
        if name == "lop3.b32":
            assert rest[2] == 0xEA  # a & b | c
            value = a & rest[0] | rest[1]
        elif name == "fma.rn.bf16x2":
            low, high = (fused(*(each >> shift & 0xFFFF for each in (a, *rest))) for shift in (0, 16))
            value = low | high << 16
        elif name == "mov.b32":
            value = a
        else:
            value = {"and.b32": np.bitwise_and, "shl.b32": np.left_shift, "shr.b32": np.right_shift}[name](a, rest[0])
        registers[target] = value
    return registers["$0"], registers["$1"]


def fused(*operands: Any) -> Any:
    """a · b + c of bfloat16 numbers, given and returned as bits, none of which is rounded."""
    a, b, c = ((each << 16).view(np.float32).astype(np.float64) for each in operands)
    bits = (a * b + c).astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return bits >> 16


@pytest.mark.parametrize("half", [0, 16], ids=["low half", "high half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_assembly_turns_each_of_all_words_into_its_values(dtype: torch.dtype, half: int) -> None:
    """Runs the very text, both words of a register at once: the other one is the complement."""
    words = np.arange(1 << 16, dtype=np.uint32)
    assembly, factor = (fp8.FLOAT16_ASSEMBLY, 256) if dtype == torch.float16 else (fp8.BFLOAT16_ASSEMBLY, 1)
    made = emulate(assembly.value, words << half | (words ^ 0xFFFF) << (16 - half))
    stored = fp8.unpack_words(torch.from_numpy(words.astype(np.int16))[:, None].expand(-1, 64), 128)
    for bits, column in zip(made, (0, 64), strict=True):
        value = torch.from_numpy((bits >> half & 0xFFFF).astype(np.int16)).view(dtype).double() * factor
        expected = stored[:, column].double()
        number = ~expected.isnan()
        assert torch.equal(value[number], expected[number])
        assert torch.equal(value[number].signbit(), expected[number].signbit())


@triton.jit
def _unpack_kernel(words, values, DTYPE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    low, high = fp8.unpack_halves(tl.load(words + place), DTYPE, ASM)
    tl.store(values + 2 * place, low.to(tl.float32))
    tl.store(values + 2 * place + 1, high.to(tl.float32))


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "asm"),
    [(tl.float32, False), *(pytest.param(dtype, asm, marks=pytest.mark.gpu, id=f"{dtype} {asm}")
                            for dtype in (tl.float16, tl.bfloat16) for asm in (False, True))],
)  # fmt: skip
def test_a_kernel_turns_each_of_all_words_into_its_values(dtype: tl.dtype, asm: bool) -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = torch.empty(1 << 16, 2, device=DEVICE)
    _unpack_kernel[(64,)](words.to(DEVICE), values, DTYPE=dtype, ASM=asm)
    stored = fp8.unpack_words(words[:, None].expand(-1, 64), 128)[:, [0, 64]].double()
    number = ~stored.isnan()
    factor = 256 if asm and dtype == tl.float16 else 1
    assert torch.equal(values.cpu().double()[number] * factor, stored[number])


FRESH_SUMS = """
from quant_kernels import fp8, gate
for each in fp8.gates():
    constants = each.variant.constants
    if each.representative and not constants["WORDS"] and not constants["GROUPED"]:
        sums = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * each.variant.num_warps)
        print(gate.compile_nvidia(each.variant, each.capability).loop["FADD"] >= sums)
"""


@pytest.mark.slow
def test_sums_of_128_products_are_added_up_by_float32_instructions(compiled_kernels: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(compiled_kernels)}
    done = subprocess.run([sys.executable, "-c", FRESH_SUMS], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stdout + done.stderr
