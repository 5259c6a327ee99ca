"""Attention over a quantized KV cache: what the reference says of every format, shape and kind of mask."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import kv_decode
from quant_kernels.kv_planes import KVFormat, Planes, dequantize, quantize
from quant_kernels.kv_reference import kv_decode_reference
from quant_kernels.library import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
DTYPE = torch.float32 if INTERPRETED else torch.float16
FORMATS = kv_decode.SCHEMES | {
    "2 bits, one scale": (KVFormat(2), KVFormat(2)),
    "keys in groups": (KVFormat(4, group_size=32), KVFormat(8)),
}
SHAPES = [(64, 2, 1), (96, 1, 4), (128, 1, 8), (256, 1, 4)]
"""Channels, heads of keys, and heads of queries for each of these."""
LENGTHS = (45, 0, 1)


def problem(
    name: str = "kv4", shape: tuple[int, int, int] = (64, 1, 4), lengths: tuple[int, ...] = LENGTHS, queries: int = 1,
    recent: tuple[int, ...] | None = None, block_tokens: int | None = None, first: tuple[int, ...] | None = None,
    dtype: torch.dtype = DTYPE, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the operator. Channels differ in size, and have means, so that a wrong minimum shows; some do not
    vary, nor does one token. What is not in use is NaN, or any code."""
    generator = torch.Generator().manual_seed(sum(lengths) + shape[0])
    (head_dim, kv_heads, group), batch = shape, len(lengths)
    room = max(1, -(-max(lengths) // 32)) * 32

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, head_dim, generator=generator) * 2.0 ** torch.linspace(-2, 1, head_dim) + 0.4
        x[..., 5] = 0.75
        return x.to(dtype)

    formats, planes = FORMATS[name], []
    for side in formats:
        x = normal(batch, kv_heads, room)
        x[:, :, 7] = -0.5
        scale = x.float().abs().amax(dim=(0, 2, 3)) / 448 if side.levels == "fp8" else None
        planes.append(spoiled(quantize(x, side, dtype, scale), side, lengths, generator))
    table = None
    if block_tokens is not None:
        table, planes = in_blocks(planes, block_tokens, lengths, generator)
    arguments: dict[str, Any] = {
        "q": torch.randn(batch, kv_heads * group, queries, head_dim, generator=generator).to(dtype),
        "k_codes": planes[0].codes, "k_scale": planes[0].scale, "k_minimum": planes[0].minimum,
        "v_codes": planes[1].codes, "v_scale": planes[1].scale, "v_minimum": planes[1].minimum,
        "lengths": torch.tensor(lengths, dtype=torch.int32), "softmax_scale": head_dim**-0.5, "block_table": table,
    }  # fmt: skip
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


def spoiled(planes: Planes, format: KVFormat, lengths: tuple[int, ...], generator: torch.Generator) -> Planes:
    """With any codes past the end of sequences, and NaN for scales and minima."""
    planes = Planes(*(None if part is None else part.clone() for part in planes))
    for b, length in enumerate(lengths):
        rest = planes.codes[b, :, length:]
        rest.copy_(torch.randint(0, 256, rest.shape, dtype=torch.uint8, generator=generator))
        if format.levels == "int":
            unused = -(-length // 32) if format.per == "channel" else length
            planes.scale[b, :, unused:] = torch.nan
            if planes.minimum is not None:
                planes.minimum[b, :, unused:] = torch.nan
    return planes


def in_blocks(
    sides: list[Planes], block_tokens: int, lengths: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, list[Planes]]:
    """A block table with blocks in any order, and the sides in these. The last block is of no one, and spoiled."""
    batch, _, room, _ = sides[0].codes.shape
    columns = -(-room // block_tokens)
    table = torch.randperm(batch * columns, generator=generator).view(batch, columns).to(torch.int32)

    def blocks(part: Tensor | None) -> Tensor | None:
        if part is None or part.ndim == 1:
            return part
        each = block_tokens * part.shape[2] // room
        made = part.new_full((batch * columns + 1, part.shape[1], each, part.shape[3]), 255)
        made = made * torch.nan if part.is_floating_point() else made
        for b in range(batch):
            for block, own in zip(table[b].tolist(), part[b].split(each, dim=1), strict=True):
                made[block, :, : own.shape[1]] = own
        return made

    made = [Planes(*map(blocks, planes)) for planes in sides]
    for b, length in enumerate(lengths):
        table[b, -(-length // block_tokens) :] = batch * columns
    return table, made


def run(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.netsuke.kv_decode(**arguments)


def exact(arguments: dict[str, Any], name: str) -> Tensor:
    """In float64, of whole sequences."""
    a = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in arguments.items()}
    batch, heads, queries, head_dim = a["q"].shape
    sides = []
    for side, of_side in zip("kv", FORMATS[name], strict=True):
        planes = Planes(a[f"{side}_codes"], a[f"{side}_scale"], a[f"{side}_minimum"])
        sides.append(dequantize(planes, of_side, torch.float64))
    y = torch.zeros(batch, heads, queries, head_dim, dtype=torch.float64)
    for b, length in enumerate(a["lengths"].tolist()):
        sequences = []
        for side, stored in zip("kv", sides, strict=True):
            quantized = stored[b] if a["block_table"] is None else torch.cat([*stored[a["block_table"][b].long()]], 1)
            slots = a.get(f"{side}_recent")
            slots = quantized[:, :0] if slots is None else slots[b, :, : a["recent_lengths"][b]].double()
            sinks = a.get("num_sinks", 0)
            sequence = torch.cat([slots[:, :sinks], quantized[:, :length], slots[:, sinks:]], dim=1)
            sequences.append(sequence.repeat_interleave(heads // len(sequence), 0))
        k, v = sequences
        token = torch.arange(k.shape[1])
        newest = token.numel() - queries + torch.arange(queries)[:, None]
        visible = token <= newest
        if a.get("first") is not None:
            visible &= token >= a["first"][b]
        if a.get("sliding_window") is not None:
            visible &= token > newest - a["sliding_window"]
        logits = a["q"][b].double() @ k.transpose(1, 2) * a["softmax_scale"]
        if a.get("soft_cap") is not None:
            logits = a["soft_cap"] * (logits / a["soft_cap"]).tanh()
        y[b] = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0) @ v
    return y


def check(arguments: dict[str, Any], y: Tensor) -> None:
    """Within one rounding of the result (the interpreter truncates to bfloat16: two), and float32 sums of products with
    offsets; on a GPU what rounding weights, keys and values to float16 makes of it. No value is much beyond 6."""
    reference = kv_decode_reference(**arguments | {"q": arguments["q"].float()} | exactly(arguments)).cpu()
    eps = torch.finfo(y.dtype).eps
    rounding = eps if INTERPRETED and y.dtype == torch.bfloat16 else eps / 2
    allowed = 1.01 * rounding * reference.abs() + 6 * (2e-5 if INTERPRETED else 2.0**-9)
    assert y.dtype == arguments["q"].dtype
    assert y.shape == arguments["q"].shape
    error = (y.cpu().float() - reference).abs()
    assert bool((error <= allowed).all()), float((error - allowed).max())


def exactly(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Slots in float32, which have the type of queries."""
    return {name: arguments[name].float() for name in ("k_recent", "v_recent") if arguments.get(name) is not None}


def pairs(*others: dict[str, Any]) -> list[Any]:
    """Each format, with one after the other of shapes and of these, which have no common period."""
    cases = zip(FORMATS, cycle(SHAPES[::-1]), cycle(others), strict=False)
    return [pytest.param(name, shape, more, id=f"{name} {shape} {more}") for name, shape, more in cases]


MASKS: list[dict[str, Any]] = [
    {"recent": (20, 4, 9), "num_sinks": 4},
    {"recent": (135, 2, 0), "sliding_window": 40, "num_sinks": 2, "lengths": (70, 5, 0)},
    {"soft_cap": 3.0, "lengths": (33, 64, 5), "first": (2, 34, 0)},
    {"queries": 3, "recent": (7, 3, 2), "num_sinks": 2, "lengths": (41, 1, 0), "first": (0, 2, 1)},
    {"block_tokens": 32, "lengths": (90, 64, 0), "soft_cap": 30.0},
    {"sliding_window": 1, "queries": 2, "lengths": (33, 2, 32)},
    {"block_tokens": 64, "recent": (0, 5, 2), "lengths": (65, 1, 64), "sliding_window": 20},
]
CASES = [*pairs({}), *pairs(*MASKS)]


@needs_kernels
@pytest.mark.parametrize(("name", "shape", "more"), CASES)
def test_the_result_is_that_of_the_reference(name: str, shape: tuple[int, int, int], more: dict[str, Any]) -> None:
    arguments = problem(name, shape, **more)
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_the_offset_of_four_bits_costs_what_float32_loses_of_it(shape: tuple[int, int, int]) -> None:
    """Products of codes plus 1024 are summed and the offset is taken off afterwards, so results are as far off as that
    is rounded: more than `check` allows with 128 channels and 8 heads."""
    arguments = problem("4 bits, one scale", shape, dtype=torch.float32 if INTERPRETED else torch.float16)
    error = (run(arguments).double().cpu() - exact(arguments, "4 bits, one scale")).abs().max()
    assert error <= 6 * (1024 * 2.0**-24 if INTERPRETED else 2.0**-9)


@pytest.mark.parametrize(("name", "shape", "more"), CASES)
def test_the_reference_is_the_formula(name: str, shape: tuple[int, int, int], more: dict[str, Any]) -> None:
    arguments = problem(name, shape, dtype=torch.float32, **more)
    y = kv_decode_reference(**arguments).double().cpu()
    torch.testing.assert_close(y, exact(arguments, name), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_queries_scales_and_slots_may_have_16_bits(name: str, dtype: torch.dtype) -> None:
    arguments = problem(name, lengths=(33, 1), dtype=dtype, recent=(3, 0))
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("queries", [4, kv_decode.MOST_QUERIES])
def test_queries_of_all_heads_may_take_more_than_one_program(queries: int) -> None:
    arguments = problem("4 bits, one scale", (32, 1, 5), (9,), queries)
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_splits_change_nothing_but_roundings_and_are_the_same_every_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = problem(name, (32, 1, 2), (97, 1), recent=(2, 4), num_sinks=2)
    whole = run(arguments)
    monkeypatch.setattr(kv_decode, "SHORTEST", 1)
    for splits in (2, 6):
        monkeypatch.setattr(kv_decode, "num_splits", lambda *_, splits=splits: splits)
        y = run(arguments)
        check(arguments, y)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-4 if INTERPRETED else 4e-3)
    run(problem(name, (32, 1, 2), (1,)))
    assert torch.equal(run(arguments), y)


@needs_kernels
def test_a_batch_is_its_sequences_one_by_one() -> None:
    together = run(problem("kv8", lengths=(40, 7), recent=(3, 5)))
    arguments = problem("kv8", lengths=(40, 7), recent=(3, 5))
    for b in range(2):
        alone = {
            name: each[b : b + 1] if isinstance(each, Tensor) and each.ndim and name != "block_table" else each
            for name, each in arguments.items()
        }
        torch.testing.assert_close(run(alone), together[b : b + 1], rtol=0, atol=0)


@needs_kernels
def test_logits_that_differ_by_far_more_than_floats_span() -> None:
    arguments = problem("kv8", lengths=(64, 40), recent=(3, 0)) | {"softmax_scale": 100.0}
    check(arguments, run(arguments))


@needs_kernels
@pytest.mark.parametrize("name", ["kv8", "kv4", "kv2-rotated", "4 bits, one scale"])
def test_keys_and_values_of_nothing_but_zeros_give_zeros(name: str) -> None:
    arguments = problem(name, lengths=(40,))
    for part in ("k_codes", "k_scale", "k_minimum", "v_codes", "v_scale", "v_minimum"):
        if arguments[part] is not None:
            arguments[part].zero_()
    assert not run(arguments).any()


@needs_kernels
def test_there_may_be_no_room_at_all() -> None:
    arguments = problem("kv4", lengths=(0, 0), recent=(5, 0))
    for name, rows in zip(("k_codes", "k_scale", "k_minimum", "v_codes", "v_scale", "v_minimum"), cycle([0])):
        arguments[name] = arguments[name][:, :, rows:0].contiguous()
    check(arguments, run(arguments))
    nothing = {name: each[:0] for name, each in arguments.items() if isinstance(each, Tensor)}
    assert run(arguments | nothing).shape == (0, 4, 1, 64)


ROOM = torch.zeros(3, 1, 64, 64, dtype=torch.uint8)
WRONG: dict[str, dict[str, Any]] = {
    "q has 9 queries of a sequence, at most 8 can be": {"q": torch.zeros(3, 4, 9, 64)},
    "q is torch.int8, expected torch.float16 or": {"q": torch.zeros(3, 4, 1, 64, dtype=torch.int8)},
    "q has 3 heads and 1 queries, expected a multiple of the 2 heads": {
        "q": torch.zeros(3, 3, 1, 64), "k_codes": ROOM.repeat(1, 2, 1, 1), "k_scale": torch.ones(3, 2, 64, 1),
        "v_codes": ROOM.repeat(1, 2, 1, 1), "v_scale": torch.ones(3, 2, 64, 1),
    },
    "bits=10: keys and values have 8, 4 or 2": {"q": torch.zeros(3, 4, 1, 48)},
    r"q has shape \[3, 4, 64\], expected \[any, any, any, any\]": {"q": torch.zeros(3, 4, 64)},
    r"q has strides": {"q": torch.zeros(3, 64, 1, 4).transpose(1, 3)},
    "lengths is torch.int64, expected torch.int32": {"lengths": torch.zeros(3, dtype=torch.int64)},
    r"lengths has shape \[2\], expected \[3\]": {"lengths": torch.zeros(2, dtype=torch.int32)},
    "lengths is on meta, x on cpu": {"lengths": torch.zeros(3, dtype=torch.int32, device="meta")},
    "first is torch.bool, expected torch.int32": {"first": torch.zeros(3, dtype=torch.bool)},
    r"v_codes has shape \[3, 1, 32, 64\], k_codes \[3, 1, 64, 64\]": {
        "v_codes": ROOM[:, :, 32:].contiguous(), "v_scale": torch.ones(3, 1, 32, 1),
    },
    "k_codes has room for 63 tokens, expected a multiple of 32": {
        f"{side}_{part}": each for side in "kv"
        for part, each in (("codes", ROOM[:, :, 1:].contiguous()), ("scale", torch.ones(3, 1, 63, 1)))
    },
    "k_codes is of 3 sequences, q of 2. Blocks need a block_table": {
        "q": torch.zeros(2, 4, 1, 64), "lengths": torch.zeros(2, dtype=torch.int32),
    },
    "block_table is torch.int64": {"block_table": torch.zeros(3, 2, dtype=torch.int64)},
    "recent_lengths are given in part": {"k_recent": torch.zeros(3, 1, 5, 64), "v_recent": torch.zeros(3, 1, 5, 64)},
    "k_recent is torch.float16, expected torch.float32": {
        "k_recent": torch.zeros(3, 1, 5, 64, dtype=torch.float16), "v_recent": torch.zeros(3, 1, 5, 64),
        "recent_lengths": torch.zeros(3, dtype=torch.int32),
    },
    "v_minimum is given: 8 bits are symmetric": {"v_minimum": torch.ones(3, 1, 64, 1)},
    "v_scale is per channel, which keys can have": {
        "v_codes": ROOM[..., :32].contiguous(),
        "v_scale": torch.ones(3, 1, 2, 64), "v_minimum": torch.ones(3, 1, 2, 64),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    arguments = problem("kv8", dtype=torch.float32)
    arguments = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in arguments.items()}
    with pytest.raises(ValueError, match=message):
        kv_decode.kv_decode(**arguments | WRONG[message])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes float32")
def test_queries_in_float32_are_for_the_interpreter() -> None:
    with pytest.raises(ValueError, match="q is torch.float32, expected torch.float16 or torch.bfloat16"):
        kv_decode.kv_decode(**problem("kv8", dtype=torch.float32))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the processors of an H100")
def test_tokens_are_split_until_processors_are_busy_and_no_further() -> None:
    def splits(tiles: int, tokens: int) -> int:
        return kv_decode.num_splits(tiles, tokens, DEVICE)

    assert splits(8, 131072) == 128
    assert splits(64, 131072) == 17
    assert splits(64, 1024) == 4
    assert splits(4096, 131072) == 1
    assert splits(1, 32) == 1


def test_the_operator_meets_the_contract_of_torch_library() -> None:
    arguments = problem("kv8", (32, 1, 2), (1,), recent=(2,))
    torch.library.opcheck(torch.ops.netsuke.kv_decode, (), arguments)


def test_a_compiled_graph_goes_through() -> None:
    arguments = problem("kv8", (32, 1, 2), (33,))
    compiled = torch.compile(lambda q: run(arguments | {"q": q}) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["q"]), run(arguments) * 2)


REAL = [
    pytest.param(name, (head_dim, 4, group), {"lengths": (5000, 777, 1), **more}, dtype, id=f"{name} {head_dim} {more}")
    for name, head_dim, group, more, dtype in zip(
        [*FORMATS] * 3,
        cycle((128, 64, 256, 128, 96, 128, 128)),
        cycle((4, 8, 1)),
        cycle((
            {}, {"recent": (150, 128, 77), "num_sinks": 4}, {"block_tokens": 64, "queries": 5},
            {"sliding_window": 1024, "soft_cap": 30.0}, {"recent": (200, 4, 0), "first": (9, 0, 0), "queries": 8},
        )),
        cycle((torch.bfloat16, torch.float16)),
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "more", "dtype"), REAL)
def test_caches_of_real_size(name: str, shape: tuple[int, int, int], more: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = problem(name, shape, dtype=dtype, **more)
    y = run(arguments)
    check(arguments, y)
    assert torch.equal(run(arguments), y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_a_captured_graph_replays_as_the_cache_grows(name: str) -> None:
    arguments = problem(name, (128, 8, 4), (4096, 4000), recent=(160, 160), num_sinks=4, dtype=torch.bfloat16)
    run(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(arguments)
    for lengths in ([4096, 4000], [64, 4000], [0, 32]):
        arguments["lengths"].copy_(torch.tensor(lengths))
        arguments["q"].normal_()
        graph.replay()
        check(arguments, y)


@pytest.mark.gpu
def test_a_cache_of_more_than_2_to_the_31_bytes() -> None:
    arguments = problem("kv8", (128, 2, 4), (64,), dtype=torch.bfloat16)
    tokens = (1 << 23) + 32
    for side in "kv":
        codes, scale = arguments[f"{side}_codes"], arguments[f"{side}_scale"]
        room = torch.zeros(1, 2, tokens, 128, dtype=torch.uint8, device=DEVICE)
        scales = torch.zeros(1, 2, tokens, 1, dtype=scale.dtype, device=DEVICE)
        room[:, :, -64:], scales[:, :, -64:] = codes, scale
        arguments |= {f"{side}_codes": room, f"{side}_scale": scales}
    arguments["lengths"].fill_(tokens)
    check(arguments, run(arguments))
    arguments["sliding_window"] = 64
    check(arguments, run(arguments))
