"""What a quantized cache holds comes back to half a step, in the bytes that are promised, and never as NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_kernels.kv_planes import FP8, KVFormat, Planes, dequantize, format_of, pack_codes, quantize, unpack_codes

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
WHOLE = {name: each for name, each in FORMATS.items() if each.levels == "int"}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
every_whole_format = pytest.mark.parametrize("format", WHOLE.values(), ids=WHOLE)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS = 3


def cache(tokens: int = 64, head_dim: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two sequences of three heads, with channels of very different size and a mean that is not 0."""
    generator = torch.Generator().manual_seed(tokens + head_dim)
    x = torch.randn(2, HEADS, tokens, head_dim, generator=generator) + 0.3
    return (x * 10.0 ** torch.linspace(-2, 1, head_dim)).to(dtype)


def stored(x: Tensor, format: KVFormat, dtype: torch.dtype | None = None) -> Planes:
    scale = x.float().abs().amax(dim=(0, 2, 3)) / 448 if format.levels == "fp8" else None
    return quantize(x, format, dtype, scale)


def spread(numbers: Tensor, like: Tensor, format: KVFormat) -> Tensor:
    """A number of each group for each element that has it."""
    if format.levels == "fp8":
        return numbers[:, None, None].expand(like.shape[1:])
    dim = 2 if format.per == "channel" else 3
    return numbers.repeat_interleave(like.shape[dim] // numbers.shape[dim], dim)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_codes_come_back_as_they_went_in(head_dim: int, bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, 5, head_dim), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, 5, head_dim * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes.to(torch.uint8))


def test_a_byte_has_one_code_of_each_plane() -> None:
    codes = torch.randint(0, 4, (96,), generator=torch.Generator().manual_seed(0))
    of_four, of_two = pack_codes(codes, 4).int(), pack_codes(codes, 2).int()
    assert [of_four[7] & 15, of_four[7] >> 4] == [codes[7], codes[7 + 48]]
    assert [of_two[7] >> 2 * i & 3 for i in range(4)] == codes[7::24].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 96, 128])
@every_whole_format
def test_a_value_comes_back_to_half_a_step(format: KVFormat, head_dim: int, dtype: torch.dtype) -> None:
    """More where the scale, rounded to its type, no longer spans the group: by half an ulp for each step."""
    x = cache(96, head_dim, dtype)
    planes = stored(x, format)
    step = spread(planes.scale.double(), x, format)
    most = (127 if format.symmetric else (1 << format.bits) - 1) * torch.finfo(dtype).eps / 2
    assert (step > 0).all()
    error = (dequantize(planes, format, torch.float64) - x.double()).abs()
    assert (error <= (0.501 + most) * step).all()


@every_whole_format
def test_codes_use_all_their_bits(format: KVFormat) -> None:
    codes = unpack_codes(stored(cache(), format).codes, format.bits)
    if format.symmetric:
        assert [extreme.item() for extreme in codes.view(torch.int8).aminmax()] == [-127, 127]
    else:
        assert codes.unique().tolist() == list(range(1 << format.bits))


@every_format
def test_quantizing_what_was_quantized_changes_nothing(format: KVFormat) -> None:
    planes = stored(cache(), format)
    value = dequantize(planes, format)
    again = quantize(value, format, static_scale=planes.scale if format.levels == "fp8" else None)
    torch.testing.assert_close(dequantize(again, format), value, rtol=1e-6, atol=1e-6)


def test_fp8_rounds_to_the_nearest_of_its_values_and_keeps_to_the_largest() -> None:
    scale = torch.tensor([0.5, 1.0, 2.0])
    x = torch.tensor([1.0, 17.0, 1e6, -1e6, 2.0**-9, 0.0, 448.0, -3.0]).expand(2, HEADS, 5, 8) * scale[:, None, None]
    planes = quantize(x, FORMATS["fp8"], static_scale=scale)
    expected = torch.tensor([1.0, 16.0, 448.0, -448.0, 2.0**-9, 0.0, 448.0, -3.0]) * scale[:, None, None]
    assert torch.equal(dequantize(planes, FORMATS["fp8"]), expected.expand_as(x))
    assert torch.equal(planes.codes.view(FP8)[0, 1, 0].float(), expected[1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@every_whole_format
def test_what_does_not_vary_has_no_nan_and_comes_back(format: KVFormat, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -3.25, 1e-7, 7.0])[:, None, None, None].expand(4, HEADS, 32, 64).to(dtype)
    planes = stored(x, format)
    assert planes.scale.isfinite().all()
    value = dequantize(planes, format, torch.float64)
    allowed = 2e-7 + x.double().abs() * torch.finfo(dtype).eps if format.symmetric else torch.zeros(1)
    assert ((value - x.double()).abs() <= allowed).all()


def test_a_static_scale_of_0_gives_zeros() -> None:
    planes = quantize(torch.zeros(1, 2, 3, 32), FORMATS["fp8"], static_scale=torch.zeros(2))
    assert not dequantize(planes, FORMATS["fp8"]).any()


def test_scales_per_channel_do_not_see_each_other() -> None:
    per_channel, x = FORMATS["int4 per channel"], cache()
    larger = x.clone()
    larger[..., 5] *= 1000
    before, after = (dequantize(stored(each, per_channel), per_channel) for each in (x, larger))
    others = torch.arange(64) != 5
    assert torch.equal(before[..., others], after[..., others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@every_format
def test_bytes_are_as_many_as_the_format_says(format: KVFormat, head_dim: int, dtype: torch.dtype) -> None:
    planes = stored(cache(64, head_dim, dtype), format)
    of_static_scales = planes.scale.nbytes if format.levels == "fp8" else 0
    assert planes.nbytes - of_static_scales == 2 * HEADS * 64 * format.token_bytes(head_dim, dtype)
    room = format.new(2, HEADS, 64, head_dim, dtype, "cpu")
    assert [each.shape for each in room[:2]] == [each.shape for each in planes[:2]]
    assert not dequantize(room, format).any()


def test_bytes_of_a_token_of_llama() -> None:
    sides = {name: each.token_bytes(128, torch.bfloat16) for name, each in FORMATS.items()}
    assert sides == {
        "int8": 130, "fp8": 128, "int4": 68, "int4 in groups": 80, "int4 per channel": 80,
        "int2": 36, "int2 in groups": 48, "int2 per channel": 48,
    }  # fmt: skip


@every_format
def test_the_format_is_seen_from_what_is_stored(format: KVFormat) -> None:
    for head_dim in (64, 96, 128):
        for tokens in (0, 32, 64):
            assert format_of("k", format.new(2, HEADS, tokens, head_dim, torch.float16, "cpu"), head_dim) == format


@every_format
def test_views_of_another_order_are_stored_in_this_one(format: KVFormat) -> None:
    x = cache(64)
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    planes = stored(view, format)
    assert format_of("k", planes, 64) == format
    assert torch.equal(planes.codes, stored(x, format).codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits=3: keys and values have 8, 4 or 2"),
        ({"bits": 8, "per": "channel"}, "per='channel', group_size=None: 8 bits have one scale for all channels"),
        ({"bits": 8, "group_size": 32}, "per='token', group_size=32: 8 bits have one scale for all channels"),
        ({"bits": 4, "levels": "fp8"}, "levels='fp8' have 8 bits, not 4"),
        ({"bits": 4, "per": "channel", "group_size": 32}, "group_size=32: with per='channel' no channels share"),
        ({"bits": 4, "group_size": 64}, "group_size=64: scales are of 32 channels or of all"),
    ],
)
def test_a_format_that_is_none_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVFormat(**arguments)  # type: ignore[arg-type]


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens are no multiple of 32, which share a scale per channel"):
        quantize(cache(33), FORMATS["int4 per channel"])
    with pytest.raises(ValueError, match="head_dim=80 is not a multiple of 32"):
        quantize(cache(32, 80), FORMATS["int4 in groups"])
    with pytest.raises(ValueError, match="head_dim=12 is not a multiple of 8"):
        FORMATS["int4"].token_bytes(12, torch.float16)


@pytest.mark.parametrize(("name", "scale"), [("int8", torch.ones(HEADS)), ("fp8", None)])
def test_a_static_scale_where_there_is_none_is_refused(name: str, scale: Tensor | None) -> None:
    with pytest.raises(ValueError, match="static_scale is for fp8"):
        quantize(cache(), FORMATS[name], static_scale=scale)


INT4, INT8 = (FORMATS[name].new(2, HEADS, 32, 64, torch.float16, "cpu") for name in ("int4", "int8"))
WRONG = {
    "k_codes is torch.int8, expected torch.uint8": INT4._replace(codes=INT4.codes.view(torch.int8)),
    r"k_codes has shape \[3, 32, 32\], expected \[any, any, any, any\]": INT4._replace(codes=INT4.codes[0]),
    "bits=6: keys and values have 8, 4 or 2": INT4._replace(codes=torch.zeros(2, HEADS, 32, 48, dtype=torch.uint8)),
    "group_size=21: scales are of 32 channels": INT4._replace(scale=torch.ones(2, HEADS, 32, 3)),
    r"k_scale has shape \[2, 3, 31, 1\], expected \[2, 3, 32, 1\]": INT4._replace(scale=torch.ones(2, HEADS, 31, 1)),
    "k_scale is torch.float64": INT4._replace(scale=INT4.scale.double()),
    r"k_minimum has shape \[2, 3, 1, 64\], expected \[2, 3, 32, 1\]": INT4._replace(minimum=torch.ones(2, 3, 1, 64)),
    "k_minimum is missing: 4 bits are counted from one": INT4._replace(minimum=None),
    "k_minimum is given: 8 bits are symmetric": INT8._replace(minimum=INT8.scale),
    "k_scale has strides": INT4._replace(scale=torch.ones(2, 32, HEADS, 1, dtype=torch.float16).transpose(1, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_stored_so_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of("k", WRONG[message], 64)


def test_bytes_of_fp8_are_what_torch_takes_them_for() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    finite = expected.isfinite()
    assert finite.sum() == 254
    planes = Planes(codes.view(1, 1, 1, 256), torch.ones(1), None)
    assert torch.equal(dequantize(planes, KVFormat(8, levels="fp8")).flatten()[finite], expected[finite])
