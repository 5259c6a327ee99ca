"""4-bit weights times 8-bit activations: integer sums are exact, and only the final formula rounds."""

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

from quant_kernels import split_k, w4a8
from quant_kernels.byte_planes import (
    dequantize_progressive,
    pack_channels,
    quantize_progressive,
    unpack_bytes,
)
from quant_kernels.library import INTERPRETED
from quant_kernels.tuning import Config

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
CONFIGS = {
    "plain": Config(16, 32),
    "swapped": Config(32, 32, swap=True),
    "two blocks a step": Config(16, 32, block_k=256),
    "split": Config(16, 32, split_k=3),
    "swapped and split": Config(16, 64, block_k=256, split_k=2, swap=True),
}
SIZES = [(1, 1, 1), (1, 48, 512), (3, 17, 33), (17, 40, 128), (33, 70, 384), (2, 33, 700)]
"""Tokens, outputs, inputs."""
OPERATORS = ("w4a8", "w4a8_grouped")
FLOAT32 = 2.0**-24
"""Relative error of one rounding."""


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(w4a8, "configuration", lambda *_: config)


def problem(operator: str, tokens: int, outputs: int, inputs: int, mean: int = 0) -> dict[str, Any]:
    """Arguments of an operator, codes over the whole grid, float scales of both signs."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = torch.randint(max(-128, mean - 128), 128, (tokens, inputs), dtype=torch.int8, generator=generator)
    made: dict[str, Any] = {"x": x, "x_scale": random(tokens).abs() + 0.1}
    if operator == "w4a8":
        codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
        zero_point = torch.randint(-8, 8, (outputs,), generator=generator)
        made["x_sum"] = x.sum(dim=1, dtype=torch.int32)
        made["weight"], made["scale"], made["zero_scaled"] = pack_channels(codes, random(outputs), zero_point)
    else:
        made["weight"], made["scale"], made["groups"] = quantize_progressive(random(outputs, inputs))
    made |= {"bias": random(outputs), "dtype": torch.float32}
    return {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in made.items()}


def run(operator: str, arguments: dict[str, Any]) -> Tensor:
    return getattr(torch.ops.netsuke, operator)(**arguments)


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result in float64, from unpacked codes, and the sum of the magnitudes of its terms."""
    a = {name: each.double() if isinstance(each, Tensor) else each for name, each in arguments.items()}
    inputs = a["x"].shape[1]
    if "groups" in arguments:
        values = dequantize_progressive(arguments["weight"], arguments["groups"], inputs).double()
        zeros = a["x"].new_zeros(())
    else:
        values = unpack_bytes(arguments["weight"], inputs).double()
        zeros = a["x_sum"][:, None] * a["zero_scaled"]
    products = a["x"] @ values.T * a["scale"]
    bias = a["x"].new_zeros(()) if a["bias"] is None else a["bias"]
    scale = a["x_scale"][:, None]
    return scale * (products - zeros) + bias, scale * (products.abs() + zeros.abs()) + bias.abs()


def check(operator: str, arguments: dict[str, Any], y: Tensor) -> None:
    """Between y and the exact result lie at most six roundings of float32 and one to the type of the result."""
    expected, magnitude = exact(arguments)
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 7 if INTERPRETED else 8}[arguments["dtype"]]
    allowed = 6 * FLOAT32 * magnitude + 2.0**-bits * expected.abs() + torch.finfo(torch.float16).tiny
    worst = ((y.double() - expected).abs() / allowed).max()
    assert y.dtype == arguments["dtype"]
    assert worst <= 1, f"{operator}: {worst:.2f} times the error that rounding explains"


@needs_kernels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_final_formula_rounds(
    operator: str, size: tuple[int, int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(operator, *size)
    check(operator, arguments, run(operator, arguments))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_the_explicit_product(operator: str, size: tuple[int, int, int]) -> None:
    arguments = problem(operator, *size)
    check(operator, arguments, getattr(w4a8, f"{operator}_reference")(**arguments))


@needs_kernels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_sums_are_exact_to_the_last_integer(operator: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(operator, 5, 33, 384, mean=100)
    ones = {"x_scale": torch.ones(5), "scale": torch.ones(33), "zero_scaled": torch.full((33,), 8.0)}
    arguments |= {key: each.to(DEVICE) for key, each in ones.items() if key in arguments} | {"bias": None}
    y = run(operator, arguments)
    assert torch.equal(y.double(), exact(arguments)[0])


@needs_kernels
def test_the_largest_sum_that_is_let_in_does_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Config(16, 16, block_k=1024))
    inputs = w4a8.MAX_INPUTS_GROUPED
    arguments = problem("w4a8_grouped", 1, 1, inputs)
    arguments["x"].fill_(-128)
    arguments["weight"].zero_()
    arguments["groups"].zero_()  # offset + 128 = 0
    assert inputs * 128 * 128 > 2**31 - 2**15
    check("w4a8_grouped", arguments, run("w4a8_grouped", arguments))


@needs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_splitting_the_sums_changes_no_bit(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(operator, 9, 40, 1024)
    results = []
    for splits in (1, 2, 3, 8, 11):
        use(monkeypatch, Config(16, 32, split_k=splits))
        results.append(run(operator, arguments))
    assert all(torch.equal(each, results[0]) for each in results)
    assert not any(counters.any() for kept in split_k._WORKSPACES.values() for _, counters in kept)


@needs_kernels
@pytest.mark.parametrize("name", ["plain", "swapped and split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_results_and_bias_of_16_bits(
    operator: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, CONFIGS[name])
    arguments = problem(operator, 17, 40, 256)
    arguments |= {"dtype": dtype, "bias": arguments["bias"].to(dtype), "x_scale": arguments["x_scale"] / 64}
    check(operator, arguments, run(operator, arguments))


@needs_kernels
def test_row_sums_may_be_float(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONFIGS["plain"])
    arguments = problem("w4a8", 3, 17, 100)
    assert torch.equal(run("w4a8", arguments), run("w4a8", arguments | {"x_sum": arguments["x_sum"].float()}))


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens_give_no_rows(operator: str) -> None:
    arguments = problem(operator, 0, 5, 64)
    assert run(operator, arguments).shape == (0, 5)


WRONG = {
    "x is torch.float32, expected torch.int8": {"x": torch.zeros(3, 130)},
    r"x has shape \[130\], expected \[any, any\]": {"x": torch.zeros(130, dtype=torch.int8)},
    r"x has strides \(1, 3\), which are not contiguous": {"x": torch.zeros(130, 3, dtype=torch.int8).T},
    "x has 0 inputs": {"x": torch.zeros(3, 0, dtype=torch.int8)},
    r"weight has shape \[5, 65\], expected \[any, 128\]": {"weight": torch.zeros(5, 65, dtype=torch.uint8)},
    "weight is torch.int8, expected torch.uint8": {"weight": torch.zeros(5, 128, dtype=torch.int8)},
    r"x_scale has shape \[3, 1\], expected \[3\]": {"x_scale": torch.ones(3, 1)},
    "scale is torch.float64": {"scale": torch.ones(5, dtype=torch.float64)},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "dtype=torch.int8: results are torch.float16": {"dtype": torch.int8},
    "scale is on meta, x on cpu": {"scale": torch.ones(5, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_does_not_fit_is_named(operator: str, message: str) -> None:
    arguments = {
        key: each.cpu() if isinstance(each, Tensor) else each for key, each in problem(operator, 3, 5, 130).items()
    }
    with pytest.raises(ValueError, match=message):
        getattr(w4a8, operator)(**arguments | WRONG[message])


def test_groups_and_row_sums_that_do_not_fit_are_named() -> None:
    channels, groups = problem("w4a8", 3, 5, 130), problem("w4a8_grouped", 3, 5, 130)
    with pytest.raises(ValueError, match=r"x_sum has shape \[2\], expected \[3\]"):
        w4a8.w4a8(**channels | {"x_sum": torch.zeros(2, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"groups has shape \[5, 2\], expected \[2, 5\]"):
        w4a8.w4a8_grouped(**groups | {"groups": groups["groups"].T.contiguous()})


def test_layers_whose_sums_could_overflow_are_refused() -> None:
    inputs = w4a8.MAX_INPUTS_GROUPED + 1
    arguments = problem("w4a8_grouped", 1, 1, 1) | {"x": torch.zeros(1, inputs, dtype=torch.int8)}
    with pytest.raises(ValueError, match="beyond which sums overflow"):
        w4a8.w4a8_grouped(**arguments)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu() -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return w4a8.configuration(tokens, outputs, inputs, False, DEVICE).split_k

    assert splits(1, 4096, 4096) == 4
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_meet_the_contract_of_torch_library(operator: str) -> None:
    arguments = problem(operator, 3, 17, 130)
    torch.library.opcheck(getattr(torch.ops.netsuke, operator), tuple(arguments.values()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_graph_goes_through(operator: str) -> None:
    arguments = problem(operator, 3, 17, 130)

    def doubled(**arguments: Any) -> Tensor:
        return run(operator, arguments) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), doubled(**arguments))


COVERING = [
    (*case, *rest)
    for case, *rest in zip(
        [
            (operator, config, splits)
            for operator in OPERATORS
            for config in (w4a8.FEW, w4a8.SOME, w4a8.MORE, w4a8.MANY, w4a8.PREFILL)
            for splits in ((1,) if config == w4a8.PREFILL else (1, 4))
        ],
        cycle((torch.float16, torch.bfloat16, torch.float32)),
        cycle((0, 1, 1, 0, 1, 0, 0, 1)),
        strict=False,
    )
]
"""Every configuration with and without splits, with types and shapes varied along with them. Each is a compilation, so
that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "config", "splits", "dtype", "more"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    operator: str, config: Config, splits: int, dtype: torch.dtype, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(config, split_k=splits))
    outputs, inputs = ((1000, 14336), (6144, 4224))[more]
    arguments = problem(operator, config.block_m + more, outputs, inputs) | {"dtype": dtype}
    arguments["x_scale"] /= inputs
    check(operator, arguments, run(operator, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_captured_graph_replays_on_new_inputs(operator: str, tokens: int) -> None:
    arguments = problem(operator, tokens, 4096, 4096)
    run(operator, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(operator, arguments)
    for _ in range(3):
        arguments["x"].random_(-128, 128)
        if operator == "w4a8":
            arguments["x_sum"].copy_(arguments["x"].sum(dim=1))
        graph.replay()
        check(operator, arguments, y)


@pytest.mark.gpu
def test_results_of_more_than_2_to_the_31_elements() -> None:
    arguments = problem("w4a8", 33000, 66000, 128) | {"dtype": torch.float16}
    arguments["x_scale"] /= 1024
    y = run("w4a8", arguments)
    last = {name: each[-3:] if name in ("x", "x_scale", "x_sum") else each for name, each in arguments.items()}
    check("w4a8", last, y[-3:])


def emulate(code: str, *operands: Any) -> Any:
    """What the assembly `code` computes: operands $1, $2, … as arrays of 32 bits, $0."""
    registers = {f"${index}": np.uint64(value) for index, value in enumerate(operands, start=1)}
    for line in re.sub(r"[{}]|\.reg[^;]*;", "", code).split(";")[:-1]:
        name, result, *sources = re.findall(r"[\w.$]+", line)
        a, b, *c = (registers[source] if source in registers else np.uint64(int(source, 0)) for source in sources)
        if name == "and.b32":
            value = a & b
        elif name == "xor.b32":
            value = a ^ b
        elif name == "shr.b32":
            value = a >> b
        elif name == "mad.lo.u32":
            value = a * b + c[0]
        elif name == "prmt.b32":
            eight = a | b << np.uint64(32)
            value = sum(
                (eight >> (c[0] >> np.uint64(4 * i) & np.uint64(7)) * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
                for i in range(4)
            )
        else:
            raise NotImplementedError(name)
        registers[result] = value & np.uint64(0xFFFFFFFF)
    return registers["$0"]


def bytes_of(word: Any) -> Any:
    return np.stack([word >> np.uint64(8 * i) & np.uint64(255) for i in range(4)], axis=-1)


def word_of(four: Any) -> Any:
    return sum(np.asarray(each).astype(np.uint64) << np.uint64(8 * i) for i, each in enumerate(four))


def test_assembly_takes_the_nibbles_out_of_every_byte_in_every_place() -> None:
    byte = np.arange(256)
    for place, others in product(range(4), (0x00, 0xFF, 0x5A)):
        four = [byte if i == place else np.full(256, others) for i in range(4)]
        for code, expected in ((w4a8.LOW, byte & 15), (w4a8.HIGH, byte >> 4)):
            taken = bytes_of(emulate(code.value, word_of(four)))
            assert (taken[:, place] == expected).all()
            rest = np.delete(taken, place, axis=1)
            assert (rest == (others & 15 if code is w4a8.LOW else others >> 4)).all()


def test_assembly_widens_every_code_scale_and_offset_that_fit_int8_without_touching_its_neighbours() -> None:
    scale, offset = np.meshgrid(np.arange(1, 18), np.arange(-128, 128), indexing="ij")
    groups = word_of([scale, offset + 128, 18 - scale, 127 - offset])
    for code, high_scale in ((w4a8.OFFSET_LOW, False), (w4a8.OFFSET_HIGH, True)):
        expected = 127 - offset if high_scale else offset + 128
        assert (bytes_of(emulate(code.value, groups)) == expected[..., None]).all()
    repeated = emulate(w4a8.OFFSET_LOW.value, groups)
    lowest = np.zeros_like(scale)
    highest = np.clip((127 - offset) // scale, 0, 15)
    for place, code in product(range(4), range(16)):
        fits = scale * code + offset <= 127
        for others in (lowest, highest):
            four = [np.full_like(scale, code) if i == place else others for i in range(4)]
            widened = bytes_of(emulate(w4a8.WIDEN.value, word_of(four), scale, 0, 0, 0, repeated)).astype(np.int8)
            for i in range(4):
                assert (widened[..., i] == scale * four[i] + offset)[fits].all()


LAYOUTS = """
import re
from triton.backends.compiler import GPUTarget
from quant_kernels import gate, w4a8
for each in w4a8.gates():
    if each.variant.constants["GROUPED"] and each.variant.constants["BLOCK_M"] in (16, 64):
        code = gate._compile(each.variant, GPUTarget("cuda", each.capability, 32)).asm["ttgir"]
        for layout in re.findall(r"mad\\.lo.*-> tensor<\\d+x64xi8, (.*?)>(?: loc|$)", code, re.M):
            named = re.search(rf"^{layout} = (.*)$", code, re.M) if layout.startswith("#linear") else None
            print(named[1] if named else layout)
"""


@pytest.mark.slow
def test_the_four_codes_that_share_a_register_are_neighbours_in_a_row(compiled_kernels: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(compiled_kernels)}
    done = subprocess.run([sys.executable, "-c", LAYOUTS], env=environment, capture_output=True, text=True)
    layouts = done.stdout.splitlines()
    assert len(layouts) >= 8, done.stderr
    for layout in layouts:
        assert "kWidth = 4" in layout or "register = [[0, 1], [0, 2]," in layout
