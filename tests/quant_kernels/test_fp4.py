"""4-bit float weights times 16-bit activations: what the formula says, for any shape, format and configuration."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import fp4, split_k
from quant_kernels.fp4_words import pack_mxfp4, pack_nvfp4, unpack_mxfp4, unpack_nvfp4
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
LAYERS = [(1, 1, 16), (3, 70, 160), (17, 33, 208), (33, 3, 304)]
"""Tokens, outputs, inputs."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16]
FORMATS = ["nvfp4", "mxfp4"]
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6)


def use(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(fp4, "configuration", lambda *_: config)


def problem(
    form: str, tokens: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    """Arguments of the operator: all codes; scales over all of e4m3, or the binades that float16 takes without loss."""
    generator = torch.Generator().manual_seed(tokens + outputs + inputs)

    def random(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most + 1, shape, dtype=torch.uint8, generator=generator)

    codes = random(0, 255, outputs, inputs // 2)
    if form == "nvfp4":
        scale = random(0, 0x7E, outputs, -(-inputs // 16)).view(torch.float8_e4m3fn)
        made = pack_nvfp4(codes, scale, torch.tensor([300.0]))
    else:
        made = pack_mxfp4(codes, random(104, 128, outputs, -(-inputs // 32)))
    x = (torch.randn(tokens, inputs, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    names = ("x", "words", "scale", "global_scale", "bias")
    return {name: each.to(DEVICE) for name, each in zip(names, (x, *made, bias), strict=True)}


def run(arguments: dict[str, Tensor | None]) -> Tensor:
    return torch.ops.netsuke.w4a16_fp4(**arguments)


def exact(arguments: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The result in float64, from what was stored, and the sum of the magnitudes of its terms."""
    x, words, scale, global_scale, bias = (None if each is None else each.cpu() for each in arguments.values())
    inputs = x.shape[1]
    if len(scale) == -(-inputs // 128):
        packed, stored = unpack_mxfp4(words, scale, global_scale, inputs)
        group_size, s = 32, 2.0 ** (stored.double() - 127)
    else:
        packed, stored, divisor = unpack_nvfp4(words, scale, global_scale, inputs)
        group_size, s = 16, stored.double() / divisor.double()
    codes = torch.stack((packed % 16, packed // 16), dim=2).flatten(1).long()
    weight = torch.tensor(VALUES, dtype=torch.float64)[codes] * s[:, torch.arange(inputs) // group_size]
    x, bias = x.double(), torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def check(arguments: dict[str, Tensor | None], y: Tensor) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), and float32 sums: weights are not
    rounded, whatever the configuration."""
    expected, magnitude = exact(arguments)
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    allowed = 1.01 * rounding * expected.abs() + 2.0**-18 * magnitude
    assert y.dtype == arguments["x"].dtype  # type: ignore[union-attr]
    assert bool(((y.cpu().double() - expected).abs() <= allowed).all())


CASES = [
    pytest.param(*case, dtype, id=f"{' '.join(map(str, case))} {dtype}")
    for case, dtype in zip(product(CONFIGS, LAYERS, FORMATS), cycle([*DTYPES, *DTYPES, DTYPES[0]]), strict=False)
]
"""Every configuration and layer in both formats; types go through all pairs with each: their period has no common
factor with these numbers."""


@needs_kernels
@pytest.mark.parametrize(("config", "layer", "form", "dtype"), CASES)
def test_the_result_is_the_formula(
    config: str, layer: tuple[int, int, int], form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, CONFIGS[config])
    arguments = problem(form, *layer, dtype)
    check(arguments, run(arguments))
    if dtype != torch.float16:  # which has no bits for results as small as they are without a bias
        arguments["bias"] = None
        check(arguments, run(arguments))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_reference_is_the_formula(layer: tuple[int, int, int], form: str) -> None:
    for dtype in DTYPES:
        arguments = problem(form, *layer, dtype)
        check(arguments, fp4.w4a16_fp4_reference(**arguments))  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_code_times_every_scale_is_exact(config: Config, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input at a time comes through to the last bit."""
    use(monkeypatch, config)
    inputs, scales = 144, torch.arange(1, 127) if form == "nvfp4" else torch.arange(104, 129)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scales), inputs // 16)
    packed, stored = codes[:, ::2] | codes[:, 1::2] << 4, scales.to(torch.uint8)[:, None]
    if form == "nvfp4":
        made = pack_nvfp4(packed, stored.repeat(1, inputs // 16).view(torch.float8_e4m3fn), torch.ones(1))
    else:
        made = pack_mxfp4(packed, stored.repeat(1, -(-inputs // 32)))
    x = torch.eye(inputs)[16:32]
    for dtype in DTYPES:
        names = ("x", "words", "scale", "global_scale")
        arguments = {name: each.to(DEVICE) for name, each in zip(names, (x.to(dtype), *made), strict=True)}
        assert torch.equal(run(arguments).cpu().double(), exact(arguments | {"bias": None})[0])


@needs_kernels
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_lies_beyond_the_last_token_and_input_is_not_read(
    config: Config, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, config)
    arguments = problem(form, 3, 5, 160)
    surrounded = torch.full((5, 160), torch.nan, device=DEVICE)
    surrounded[1:4] = arguments["x"]  # type: ignore[assignment]
    arguments["x"] = surrounded[1:4]
    assert not run(arguments).isnan().any()


@needs_kernels
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", [2, 3, 9])
def test_split_sums_are_the_same_every_time_and_leave_their_counters_at_0(
    splits: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Config(16, 32, split_k=splits, swap=True))
    arguments = problem(form, 5, 40, 640)
    first = run(arguments)
    check(arguments, first)
    assert torch.equal(run(arguments), first)
    assert not split_k.workspace(DEVICE, 1, 1)[1].any()


@needs_kernels
def test_a_bias_may_be_of_another_type_than_activations() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = problem("nvfp4", 3, 20, 256, torch.float16)
        arguments["bias"] = arguments["bias"].to(dtype)  # type: ignore[union-attr]
        check(arguments, run(arguments))


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_in_gives_nothing_out(form: str, tokens: int, outputs: int) -> None:
    assert run(problem(form, tokens, outputs, 64, torch.float16)).shape == (tokens, outputs)


HALF = torch.float16
WRONG: dict[str, dict[str, Tensor]] = {
    "x is torch.int8, expected torch.float16 or": {"x": torch.zeros(3, 160, dtype=torch.int8)},
    r"x has shape \[160\], expected \[any, any\]": {"x": torch.zeros(160, dtype=HALF)},
    r"x has strides \(1, 3\)": {"x": torch.zeros(160, 3, dtype=HALF).T},
    "scale has 4 rows: 0 inputs, of which there must be some": {"x": torch.zeros(3, 0, dtype=HALF)},
    r"words has shape \[1, 1, 64, 32\], expected \[1, 2, 64, 32\]": {
        "words": torch.zeros(1, 1, 64, 32, dtype=torch.int16)
    },
    "words is torch.int32, expected torch.int16": {"words": torch.zeros(1, 2, 64, 32, dtype=torch.int32)},
    "scale is torch.uint8, expected torch.int32": {"scale": torch.ones(4, 5, dtype=torch.uint8)},
    "scale has 3 rows: 160 inputs, .* have 2 in MXFP4 and 4 in NVFP4": {"scale": torch.ones(3, 5, dtype=torch.int32)},
    r"global_scale has shape \[\], expected \[1\]": {"global_scale": torch.tensor(1.0)},
    "global_scale is torch.float16": {"global_scale": torch.ones(1, dtype=HALF)},
    r"bias has shape \[4\], expected \[5\]": {"bias": torch.zeros(4)},
    "scale is on meta, x on cpu": {"scale": torch.ones(4, 5, dtype=torch.int32, device="meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    made = problem("nvfp4", 3, 5, 160, HALF)
    arguments = {key: None if each is None else each.cpu() for key, each in made.items()}
    with pytest.raises(ValueError, match=message):
        fp4.w4a16_fp4(**arguments | WRONG[message])  # type: ignore[arg-type]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
def test_sums_are_split_when_there_are_too_few_blocks_for_the_gpu() -> None:
    def splits(tokens: int, outputs: int, inputs: int) -> int:
        return fp4.configuration(tokens, outputs, inputs, 16, DEVICE).split_k

    assert splits(1, 4096, 4096) == 8
    assert splits(1, 4096, 512) == 1
    assert splits(16, 57344, 8192) == 1
    assert splits(4096, 4096, 4096) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the rule of thumb, not of a table")
@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_chosen_is_what_is_compiled_ahead_of_time(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp4, "gpu_of", lambda _: (hopper, 132))
    compiled = {
        (gate.variant.constants["NVFP4"], gate.variant.constants["SPLIT"], gate.variant.constants["SWAP"],
         gate.variant.constants["BLOCK_M"], gate.variant.constants["BLOCK_N"], gate.variant.num_warps)
        for gate in fp4.gates() if gate.capability == (90 if hopper else 80) and "SPLIT" in gate.variant.constants
    }  # fmt: skip
    for tokens in (1, 17, 33, 65, 513):
        for group_size in (16, 32):
            config = fp4.configuration(tokens, 1024, 1 << 17, group_size, DEVICE)
            swap, warps = config.swap, config.num_warps
            assert (group_size == 16, config.split_k > 1, swap, config.block_m, config.block_n, warps) in compiled


@pytest.mark.parametrize("form", FORMATS)
def test_the_operator_meets_the_contract_of_torch_library(form: str) -> None:
    arguments = problem(form, 3, 17, 160)
    torch.library.opcheck(torch.ops.netsuke.w4a16_fp4, tuple(arguments.values()))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem("nvfp4", 3, 17, 160, torch.float16)
    compiled = torch.compile(lambda x: run(arguments | {"x": x}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["x"]), run(arguments) * 2)


PLAIN = Config(16, 64, num_warps=2)
"""Not shipped, but a table may have it."""
SHIPPED = (fp4.FEW, fp4.SOME, fp4.MORE, fp4.MANY, fp4.MANY_AMPERE, fp4.PREFILL, PLAIN)

COVERING = [
    (config, form, *rest)
    for (config, form), *rest in zip(
        product(SHIPPED, FORMATS),
        cycle((1, 4, 4, 1)),
        cycle([(torch.float16, torch.bfloat16)[index] for index in (0, 1, 1, 0, 1, 0, 0, 1)]),
        cycle((0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0)),
        strict=False,
    )
]
"""Every configuration in both formats and types, with and without splits, on both shapes, and in all pairs of these.
Each is a compilation, so that a product is too much."""


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "form", "splits", "dtype", "more"), COVERING, ids=str)
def test_shipped_configurations_on_layers_of_real_size(
    config: Config, form: str, splits: int, dtype: torch.dtype, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(config, split_k=splits))
    arguments = problem(form, config.block_m + more, (1000, 6144)[more], 4096, dtype)
    arguments["x"] /= 64  # type: ignore[operator]
    check(arguments, run(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "form"), list(zip((1, 32, 64, 128, 1024), cycle(FORMATS), strict=False)))
def test_a_captured_graph_replays_on_new_inputs(form: str, tokens: int) -> None:
    arguments = problem(form, tokens, 4096, 4096, torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for _ in range(3):
        arguments["x"].normal_()  # type: ignore[union-attr]
        graph.replay()
        check(arguments, y)


@pytest.mark.gpu
def test_results_of_more_than_2_to_the_31_elements() -> None:
    arguments = problem("nvfp4", 33000, 66000, 128, torch.float16)
    y = run(arguments)
    check(arguments | {"x": arguments["x"][-3:]}, y[-3:])  # type: ignore[index]
