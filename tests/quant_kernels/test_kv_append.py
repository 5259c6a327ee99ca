"""New tokens of a cache: the bits of `quantize`, where they belong, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import kv_append
from quant_kernels.kv_append import kv_append_reference
from quant_kernels.kv_planes import FP8, KVFormat, Planes, dequantize, quantize, unpack_codes
from quant_kernels.library import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs a GPU or the interpreter")
FORMATS = {
    "int8": KVFormat(8),
    "fp8": KVFormat(8, levels="fp8"),
    "int4": KVFormat(4),
    "int4 in groups": KVFormat(4, group_size=32),
    "int4 per channel": KVFormat(4, "channel"),
    "int2": KVFormat(2),
    "int2 in groups": KVFormat(2, group_size=32),
    "int2 per channel": KVFormat(2, "channel"),
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
of_tokens = pytest.mark.parametrize("format", [each for each in FORMATS.values() if each.per == "token"],
                                    ids=[name for name, each in FORMATS.items() if each.per == "token"])  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WAYS = {"kernel": pytest.param(torch.ops.netsuke.kv_append, marks=needs_kernels), "reference": kv_append_reference}
every_way = pytest.mark.parametrize("append", WAYS.values(), ids=WAYS)
HEADS = 2

Append = Callable[..., None]


def tokens(count: int, head_dim: int, dtype: torch.dtype, batch: int = 2, heads: int = HEADS) -> Tensor:
    """Of channels of very different size, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(count + head_dim)
    x = torch.randn(batch, heads, count, head_dim, generator=generator) + 0.3
    return (x * 10.0 ** torch.linspace(-2, 1, head_dim)).to(dtype).to(DEVICE)


def cache(
    format: KVFormat, room: int, head_dim: int, dtype: torch.dtype, sequences: int = 2, heads: int = HEADS
) -> Planes:
    """Full of what nobody would write; scales of fp8 are given, though, and too small for some tokens."""
    made = format.new(sequences, heads, room, head_dim, dtype, DEVICE)
    made.codes.fill_(77)
    if format.levels == "fp8":
        made.scale.copy_(torch.linspace(0.03, 0.05, heads))
    for part in made[1:] if format.levels == "int" else ():
        if part is not None:
            part.fill_(-77)
    return made


def copied(planes: Planes) -> Planes:
    return Planes(*(None if part is None else part.clone() for part in planes))


def written(planes: Planes, x: Tensor, format: KVFormat, places: dict[tuple[int, int], tuple[int, int]]) -> Planes:
    """A copy with tokens of x in it, put there one by one. places: {(sequence of x, token): (sequence, place)}."""
    static = planes.scale.cpu() if format.levels == "fp8" else None
    new, result = quantize(x.cpu(), format, planes.scale.dtype, static), copied(planes)
    for (row, token), (sequence, place) in places.items():
        result.codes[sequence, :, place] = new.codes[row, :, token].to(DEVICE)
        shared = 32 if format.per == "channel" else 1
        for part, added in zip(result[1:], new[1:], strict=True) if format.levels == "int" else ():
            if part is not None and added is not None:
                part[sequence, :, place // shared] = added[row, :, token // shared].to(DEVICE)
    return result


def same(planes: Planes, expected: Planes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(planes, expected, strict=True) if a is not None and b is not None)


def on_device(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def counts(format: KVFormat) -> tuple[int, ...]:
    return (32, 64) if format.per == "channel" else (1, 17)


@every_way
@pytest.mark.parametrize(("dtype", "head_dim"), [*zip(DTYPES, (64, 96, 128), strict=True), (torch.float16, 256)])
@every_format
def test_tokens_are_written_as_quantize_has_them(
    format: KVFormat, dtype: torch.dtype, head_dim: int, append: Append
) -> None:
    for count in counts(format):
        x, planes = tokens(count, head_dim, dtype), cache(format, 128, head_dim, dtype)
        starts = (32, 0) if format.per == "channel" else (128 - count, 5)
        places = {(row, token): (row, start + token) for row, start in enumerate(starts) for token in range(count)}
        expected = written(planes, x, format, places)
        append(x, *planes, on_device(*starts))
        assert same(planes, expected)


@every_way
@every_format
def test_blocks_in_any_order_hold_them(format: KVFormat, append: Append) -> None:
    count = 64 if format.per == "channel" else 45
    table = on_device([6, 0, 3, 2], [1, 7, 4, 5])
    x, planes = tokens(count, 64, torch.float16), cache(format, 32, 64, torch.float16, sequences=9)
    starts = (32, 0) if format.per == "channel" else (31, 50)
    places = {(row, token): (int(table[row, (start + token) // 32]), (start + token) % 32)
              for row, start in enumerate(starts) for token in range(count)}  # fmt: skip
    expected = written(planes, x, format, places)
    append(x, *planes, on_device(*starts), table)
    assert same(planes, expected)


@every_way
@every_format
def test_a_table_of_one_column_picks_sequences(format: KVFormat, append: Append) -> None:
    count = min(counts(format))
    x, planes = tokens(count, 64, torch.bfloat16), cache(format, 64, 64, torch.bfloat16, sequences=5)
    places = {(row, token): ((4, 1)[row], (0, 32)[row] + token) for row in range(2) for token in range(count)}
    expected = written(planes, x, format, places)
    append(x, *planes, on_device(0, 32), on_device([4], [1]))
    assert same(planes, expected)


@every_way
@of_tokens
def test_what_has_no_place_is_left_out(format: KVFormat, append: Append) -> None:
    for table in (None, on_device([2], [0], [1])):
        x, planes = tokens(5, 64, torch.float16, batch=3), cache(format, 32, 64, torch.float16, sequences=3)
        rows = (2, 0, 1) if table is not None else (0, 1, 2)
        places = {(row, token): (rows[row], start + token) for row, start in enumerate((30, -2, -5))
                  for token in range(5) if 0 <= start + token < 32}  # fmt: skip
        expected = written(planes, x, format, places)
        append(x, *planes, on_device(30, -2, -5), table)
        assert len(places) == 5
        assert same(planes, expected)


@every_way
@every_format
def test_groups_past_the_room_are_left_out_whole(format: KVFormat, append: Append) -> None:
    planes = cache(format, 64, 64, torch.float16)
    expected = copied(planes)
    append(tokens(32, 64, torch.float16), *planes, on_device(64, -32))
    assert same(planes, expected)


@every_way
@every_format
def test_tokens_may_lie_as_a_projection_leaves_them(format: KVFormat, append: Append) -> None:
    count = max(3, min(counts(format)))
    x, planes = tokens(count, 64, torch.float16), cache(format, 32, 64, torch.float16)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), x.repeat(2, 1, 1, 2)[1:3, :, :, :64]):
        assert not view.is_contiguous()
        expected = written(planes, view, format, {(row, i): (row, i) for row in range(2) for i in range(count)})
        append(view, *planes, on_device(0, 0))
        assert same(planes, expected)


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@every_format
def test_scales_have_the_type_of_the_cache(format: KVFormat, dtype: torch.dtype, append: Append) -> None:
    count = min(counts(format))
    x, planes = tokens(count, 64, torch.float32), cache(format, 32, 64, dtype)
    expected = written(planes, x, format, {(row, token): (row, token) for row in range(2) for token in range(count)})
    append(x, *planes, on_device(0, 0))
    assert same(planes, expected)


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@every_format
def test_what_does_not_vary_has_a_scale_of_0_and_comes_back(
    format: KVFormat, dtype: torch.dtype, append: Append
) -> None:
    """As its minimum; where there is none, zeros do."""
    if format.levels == "fp8":
        pytest.skip("has scales of its own")
    constant = torch.tensor([0.0, 0.0] if format.symmetric else [-3.25, 7.0], device=DEVICE)
    x = constant[:, None, None, None].to(dtype).repeat(1, 1, min(counts(format)), 96)
    planes = cache(format, 32, 96, dtype, heads=1)
    append(x, *planes, on_device(0, 0))
    value = dequantize(planes, format)[:, :, : x.shape[2]]
    assert torch.equal(value, x.float())
    assert not planes.scale[:, :, 0].any()
    assert not planes.codes[:, :, 0].any()


@every_way
@pytest.mark.parametrize("bits", [8, 4])
def test_halves_go_to_the_even_neighbour(bits: int, append: Append) -> None:
    low, high = (-127.0, 127.0) if bits == 8 else (0.0, 15.0)
    halves = torch.arange(low + 0.5, high)
    x = torch.cat((torch.tensor([low, high]), halves, torch.zeros(6))).to(DEVICE)[
        None, None, None, : 256 if bits == 8 else 16
    ]
    planes = KVFormat(bits).new(1, 1, 32, x.shape[3], torch.float32, DEVICE)
    append(x, *planes, on_device(7))
    below = halves.floor()
    codes = unpack_codes(planes.codes[0, 0, 7].cpu(), bits)
    codes = (codes.view(torch.int8) if bits == 8 else codes)[2 : 2 + len(halves)]
    assert planes.scale[0, 0, 7] == 1
    assert codes.tolist() == torch.where(below % 2 == 0, below, below + 1)[: len(codes)].tolist()


@every_way
def test_fp8_keeps_to_its_largest_and_to_scales_of_0(append: Append) -> None:
    planes = FORMATS["fp8"].new(1, 3, 32, 64, torch.float32, DEVICE)
    planes.scale.copy_(torch.tensor([2.0, 1.0, 0.0]))
    x = torch.tensor([17.0, -1e6, 2.0**-9, 448.0], device=DEVICE).repeat(16).expand(1, 3, 1, 64)
    append(x, *planes, on_device(3))
    codes = planes.codes.view(FP8)[0, :, 3, :4].float().tolist()
    assert codes == [[8, -448, 0, 224], [16, -448, 2.0**-9, 448], [0, 0, 0, 0]]
    assert planes.scale.tolist() == [2, 1, 0]


@every_way
def test_neither_tokens_nor_sequences_need_be_there(append: Append) -> None:
    for batch, count in ((0, 3), (2, 0)):
        planes = cache(FORMATS["int4"], 32, 64, torch.float16, sequences=batch)
        expected = copied(planes)
        append(tokens(count, 64, torch.float16, batch), *planes, on_device(*[0] * batch))
        assert same(planes, expected)


INT4 = FORMATS["int4"].new(2, HEADS, 32, 64, torch.float16, "cpu")
GOOD = {"x": torch.zeros(2, HEADS, 3, 64), "cache_codes": INT4.codes, "cache_scale": INT4.scale,
        "cache_minimum": INT4.minimum, "starts": torch.zeros(2, dtype=torch.int32)}  # fmt: skip
PER_CHANNEL = {
    f"cache_{name}": part
    for name, part in FORMATS["int4 per channel"].new(2, HEADS, 32, 64, torch.float16, "cpu")._asdict().items()
}
WRONG: dict[str, dict[str, Any]] = {
    "x is torch.int8 of shape": {"x": torch.zeros(2, HEADS, 3, 64, dtype=torch.int8)},
    r"x is torch.float32 of shape \[2, 3, 64\] and strides": {"x": torch.zeros(2, 3, 64)},
    "expected floats .* with contiguous channels": {"x": torch.zeros(2, HEADS, 64, 3).transpose(2, 3)},
    "head_dim=60 is not a multiple of 8": {"x": torch.zeros(2, HEADS, 3, 60)},
    r"cache_codes has shape \[2, 2, 32, 32\], expected \[2, 4, any, any\]": {"x": torch.zeros(2, 4, 3, 64)},
    r"cache_codes has shape \[2, 2, 32, 32\], expected \[1, 2, any, any\]": {"x": torch.zeros(1, HEADS, 3, 64)},
    "cache_minimum is missing: 4 bits": {"cache_minimum": None},
    "cache_minimum is torch.float32, cache_scale torch.float16": {"cache_minimum": torch.zeros(2, HEADS, 32, 1)},
    r"starts has shape \[3\], expected \[2\]": {"starts": torch.zeros(3, dtype=torch.int32)},
    "starts is torch.int64": {"starts": torch.zeros(2, dtype=torch.int64)},
    r"block_table has shape \[3, 1\], expected \[2, any\]": {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
    "starts is on meta, x on cpu": {"starts": torch.zeros(2, dtype=torch.int32, device="meta")},
    "3 tokens are no multiple of 32, which share a scale": PER_CHANNEL,
}


@pytest.mark.parametrize("append", [kv_append.kv_append, kv_append_reference])
@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str, append: Append) -> None:
    with pytest.raises(ValueError, match=message):
        append(**GOOD | WRONG[message])


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_the_operator_meets_the_contract_of_torch_library(name: str) -> None:
    planes = cache(FORMATS[name], 32, 64, torch.float16)
    torch.library.opcheck(torch.ops.netsuke.kv_append, (tokens(3, 64, torch.float16), *planes, on_device(1, 2)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_a_compiled_graph_goes_through_and_keeps_the_cache(backend: str) -> None:
    x, planes = tokens(3, 64, torch.float16), cache(FORMATS["int4"], 32, 64, torch.float16)
    expected, starts = copied(planes), on_device(4, 9)

    def step(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        torch.ops.netsuke.kv_append(x * 2, codes, scale, minimum, starts)
        return scale + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, *planes), step(x, *expected))
    assert same(planes, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@every_format
def test_blocks_of_real_size_in_a_captured_graph(format: KVFormat, head_dim: int, dtype: torch.dtype) -> None:
    if head_dim % (format.group_size or 8):
        pytest.skip("has no groups")
    x = tokens(1024, head_dim, dtype, heads=8)
    table = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(2, 32).to(torch.int32).to(DEVICE)
    planes, starts = cache(format, 64, head_dim, dtype, sequences=64, heads=8), on_device(0, 0)
    torch.ops.netsuke.kv_append(x, *planes, starts, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.netsuke.kv_append(x, *planes, starts, table)
    for first in (0, 1024, 512):
        x.copy_(x.flip(2))
        starts.fill_(first)
        expected = Planes(*(None if part is None else part.cpu() for part in planes))
        graph.replay()
        kv_append_reference(x.cpu(), *expected, starts.cpu(), table.cpu())
        assert same(Planes(*(None if part is None else part.cpu() for part in planes)), expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_codes() -> None:
    planes = FORMATS["int8"].new(2, 8, 1 << 20, 160, torch.float16, DEVICE)
    x = tokens(33, 160, torch.float16, heads=8)
    torch.ops.netsuke.kv_append(x, *planes, on_device(7, (1 << 20) - 33))
    expected = quantize(x.cpu(), FORMATS["int8"])
    assert torch.equal(planes.codes[1, :, -33:].cpu(), expected.codes[1])
    assert torch.equal(planes.scale[0, :, 7:40].cpu(), expected.scale[0])
