"""Attention of many queries over a quantized KV cache: what the reference says, whatever queries see and tiles hold."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import kv_prefill
from quant_kernels.kv_append import kv_append_reference
from quant_kernels.kv_planes import KVFormat
from quant_kernels.kv_reference import kv_decode_reference
from quant_kernels.library import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
DTYPE = torch.float32 if INTERPRETED else torch.float16
FORMATS = {
    "kv8": (KVFormat(8), KVFormat(8)),
    "fp8": (KVFormat(8, levels="fp8"), KVFormat(8, levels="fp8")),
    "kv4": (KVFormat(4, "channel"), KVFormat(4, group_size=32)),
    "kv4, one scale": (KVFormat(4), KVFormat(4)),
    "kv2": (KVFormat(2, "channel"), KVFormat(2, group_size=32)),
    "k8v2": (KVFormat(8), KVFormat(2)),
    "keys in groups": (KVFormat(4, group_size=32), KVFormat(8)),
}
SHAPES = [(64, 2, 1), (96, 1, 4), (128, 1, 8)]
"""Channels, heads of keys, and heads of queries for each of these."""


def problem(
    name: str, shape: tuple[int, int, int], lengths: tuple[int, ...], queries: int,
    recent: tuple[int, ...] | None = None, block_tokens: int | None = None, first: tuple[int, ...] | None = None,
    dtype: torch.dtype = DTYPE, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the operator. Keys and values have means, so that a wrong minimum shows. What is not in use is NaN,
    or any code; blocks are in any order."""
    generator = torch.Generator().manual_seed(sum(lengths) + queries)
    (head_dim, kv_heads, group), batch = shape, len(lengths)
    room = max(1, -(-max(lengths) // 64)) * 64
    columns, sequences = (1, batch) if block_tokens is None else (-(-room // block_tokens), 0)
    sequences = sequences or batch * columns + 1
    table = torch.randperm(sequences, generator=generator)[: batch * columns].view(batch, columns).to(torch.int32)
    table = torch.arange(batch, dtype=torch.int32)[:, None] if block_tokens is None else table

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, head_dim, generator=generator) * 2.0 ** torch.linspace(-2, 1, head_dim) + 0.4
        return x.to(dtype)

    arguments: dict[str, Any] = {
        "q": torch.randn(batch, kv_heads * group, queries, head_dim, generator=generator).to(dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32), "softmax_scale": head_dim**-0.5,
    }  # fmt: skip
    for side, of_side in zip("kv", FORMATS[name], strict=True):
        planes = of_side.new(sequences, kv_heads, block_tokens or room, head_dim, dtype, "cpu")
        planes.codes.random_(0, 256, generator=generator)
        if of_side.levels == "fp8":
            planes.scale.copy_(torch.linspace(0.01, 0.015, kv_heads))
        for part in planes[1:] if of_side.levels == "int" else ():
            if part is not None:
                part.fill_(torch.nan)
        for b, length in enumerate(lengths):
            count = -(-length // 32) * 32 if of_side.per == "channel" else length
            kv_append_reference(normal(1, kv_heads, count), *planes, torch.tensor([0]).int(), table[b : b + 1])
        arguments |= {f"{side}_{part}": each for part, each in planes._asdict().items()}
    if block_tokens is not None:
        arguments["block_table"] = table
    if recent is not None:
        for side in ("k_recent", "v_recent"):
            arguments[side] = normal(batch, kv_heads, max(recent) + 3)
            for b, count in enumerate(recent):
                arguments[side][b, :, count:] = torch.nan
        arguments["recent_lengths"] = torch.tensor(recent, dtype=torch.int32)
    if first is not None:
        arguments["first"] = torch.tensor(first, dtype=torch.int32)
    arguments = {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in arguments.items()}
    return arguments | others


def run(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.netsuke.kv_prefill(**arguments)


def check(arguments: dict[str, Any], y: Tensor) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), and float32 sums of products with
    offsets; on a GPU what rounding weights, keys and values to 16 bits makes of it. No value is much beyond 8."""
    wide = {name: arguments[name].float() for name in ("q", "k_recent", "v_recent") if name in arguments}
    reference = kv_decode_reference(**arguments | wide)
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    of_weights = 4e-5 if INTERPRETED else 2.0**-9 if y.dtype == torch.float16 else 2.0**-8
    allowed = 1.01 * rounding * reference.abs() + 8 * of_weights
    assert (y.dtype, y.shape) == (arguments["q"].dtype, arguments["q"].shape)
    error = (y.float() - reference).abs()
    assert bool((error <= allowed).all()), float((error - allowed).max())


CASES = [*zip(FORMATS, cycle(SHAPES), cycle([13, 16, 8]), strict=False)]
MASKS: dict[str, dict[str, Any]] = {
    "a prompt": {"lengths": (70,), "queries": 70},
    "tiles without a mask": {"lengths": (200, 131), "queries": 12},
    "fewer tokens than queries": {"lengths": (7, 0), "queries": 17},
    "padding": {"lengths": (80, 40), "queries": 20, "first": (70, 3)},
    "padding of all that some see": {"lengths": (30, 20), "queries": 20, "first": (25, 60)},
    "a sliding window": {"lengths": (150, 20), "queries": 20, "sliding_window": 37},
    "a window of one": {"lengths": (65, 9), "queries": 9, "sliding_window": 1},
    "a window that is never full": {"lengths": (40, 9), "queries": 9, "sliding_window": 500},
    "slots": {"lengths": (64, 32), "queries": 20, "recent": (45, 20)},
    "slots that are sinks too": {"lengths": (64, 0), "queries": 20, "recent": (39, 4), "num_sinks": 4},
    "slots and no others": {"lengths": (0, 0), "queries": 11, "recent": (35, 9), "num_sinks": 2},
    "sinks out of sight": {"lengths": (96, 32), "queries": 11, "recent": (45, 19), "num_sinks": 3, "sliding_window": 9},
    "sinks in sight": {"lengths": (64, 32), "queries": 40, "recent": (5, 6), "num_sinks": 3, "sliding_window": 66},
    "capped logits": {"lengths": (80, 30), "queries": 11, "recent": (3, 5), "soft_cap": 3.0},
    "blocks": {"lengths": (150, 64), "queries": 20, "block_tokens": 32},
    "large blocks": {"lengths": (150, 64), "queries": 20, "block_tokens": 64, "sliding_window": 70, "first": (9, 0)},
    "blocks of odd size": {"lengths": (140, 97), "queries": 9, "block_tokens": 96, "recent": (9, 1), "num_sinks": 1},
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("name", "shape", "queries"), CASES, ids=str)
def test_formats(name: str, shape: tuple[int, int, int], queries: int) -> None:
    arguments = problem(name, shape, (77, 33), queries, recent=(5, 2), num_sinks=1)
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("mask", MASKS)
def test_what_queries_see(mask: str) -> None:
    name, shape = ("kv4", (64, 1, 2)) if len(mask) % 4 == 0 else ("kv8", (64, 1, 4))
    arguments = problem(name, shape, **MASKS[mask])
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("heads", [1, 3, 4, 8])
@pytest.mark.parametrize("queries", [1, 31, 66])
def test_rows_of_any_number(queries: int, heads: int) -> None:
    arguments = problem("kv8", (32, 1, heads), (queries + 40,), queries)
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_queries_scales_and_slots_may_have_16_bits(name: str, dtype: torch.dtype) -> None:
    arguments = problem(name, (64, 1, 2), (66,), 10, recent=(7,), num_sinks=1, dtype=dtype)
    check(arguments, run(arguments))


@needs_kernels
def test_chunks_of_a_prompt_are_the_prompt() -> None:
    arguments = problem("kv8", (64, 1, 2), (90,), 90)
    whole = run(arguments)
    for start, end in ((0, 50), (50, 90)):
        lengths = torch.full_like(arguments["lengths"], end)
        part = run(arguments | {"q": arguments["q"][:, :, start:end].contiguous(), "lengths": lengths})
        allowed = 2e-5 if INTERPRETED else 2.0**-8
        torch.testing.assert_close(part, whole[:, :, start:end], rtol=1e-3, atol=allowed)


@needs_kernels
def test_logits_that_differ_by_far_more_than_floats_span() -> None:
    arguments = problem("kv8", (64, 1, 4), (64, 40), 9, recent=(3, 0)) | {"softmax_scale": 20.0}
    allowed = 0.05 if INTERPRETED else 0.5  # roundings of logits are as much larger
    torch.testing.assert_close(run(arguments), kv_decode_reference(**arguments), rtol=0, atol=allowed)


@needs_kernels
def test_there_may_be_no_room_and_no_sequence() -> None:
    arguments = problem("kv4", (64, 1, 2), (0, 0), 12, recent=(15, 3))
    for name in ("k_codes", "k_scale", "k_minimum", "v_codes", "v_scale", "v_minimum"):
        arguments[name] = arguments[name][:, :, :0].contiguous()
    check(arguments, run(arguments))
    nothing = {name: each[:0] for name, each in arguments.items() if isinstance(each, Tensor)}
    assert run(arguments | nothing).shape == (0, 2, 12, 64)


def test_what_does_not_fit_is_named() -> None:
    arguments = problem("kv8", (64, 1, 2), (40,), 9, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lengths has shape \[2\], expected \[1\]"):
        kv_prefill.kv_prefill(**arguments | {"lengths": torch.zeros(2, dtype=torch.int32, device=DEVICE)})
    with pytest.raises(ValueError, match="q is torch.float64, expected torch.float16"):
        kv_prefill.kv_prefill(**arguments | {"q": arguments["q"].double()})
    with pytest.raises(ValueError, match="2³¹ numbers or more for each of 1 heads of keys. Give fewer queries"):
        kv_prefill.kv_prefill(
            **{name: each.to("meta") if isinstance(each, Tensor) else each for name, each in arguments.items()}
            | {"q": torch.zeros(1, 2, 1 << 24, 64, device="meta")}
        )


def test_the_operator_meets_the_contract_of_torch_library() -> None:
    torch.library.opcheck(torch.ops.netsuke.kv_prefill, (), problem("kv8", (32, 1, 2), (9,), 9, recent=(2,)))


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem("kv8", (32, 1, 2), (33,), 9)
    compiled = torch.compile(lambda q: run(arguments | {"q": q}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["q"]), run(arguments) * 2)


REAL = [
    pytest.param(name, (head_dim, 4, group), more, dtype, id=f"{name} {head_dim} {more}")
    for name, head_dim, group, more, dtype in zip(
        [*FORMATS] * 3,
        cycle((128, 64, 256, 128, 96)),
        cycle((4, 8, 1)),
        cycle((
            {"queries": 1000}, {"queries": 300, "recent": (400, 304), "num_sinks": 4},
            {"queries": 512, "block_tokens": 64}, {"queries": 700, "sliding_window": 1024, "soft_cap": 30.0},
        )),
        cycle((torch.bfloat16, torch.float16, torch.bfloat16)),
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "more", "dtype"), REAL)
def test_prompts_of_real_size(name: str, shape: tuple[int, int, int], more: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = problem(name, shape, (5000, 2048), dtype=dtype, **more)
    y = run(arguments)
    check(arguments, y)
    assert torch.equal(run(arguments), y)


@pytest.mark.gpu
def test_a_captured_graph_replays_as_the_cache_grows() -> None:
    arguments = problem("kv8", (128, 8, 4), (4096, 4000), 256, dtype=torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for lengths in ([4096, 4000], [300, 4000], [0, 256]):
        arguments["lengths"].copy_(torch.tensor(lengths))
        arguments["q"].normal_()
        graph.replay()
        check(arguments, y)
