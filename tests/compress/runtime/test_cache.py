"""A packed layer holds what it was given, to what its scheme makes of it, through all that decoding does to a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, Gemma2Config, Gemma3nTextConfig, Llama4TextConfig, LlamaConfig, MambaConfig

from compress.core.kv import KV_SCHEMES, KVScheme
from compress.errors import RequestError
from compress.runtime.attention import packed_attention
from compress.runtime.cache import PackedLayer, QuantizedCache, turned
from compress.runtime.side import Side, kv_format, read
from compress.runtime.storage import with_room
from quant_kernels.kv_planes import Planes, dequantize, quantize

HEADS, D = 2, 32
FLOATS = KV_SCHEMES["kv4"].sinks + KV_SCHEMES["kv4"].window
WINDOWED = [name for name, scheme in KV_SCHEMES.items() if scheme.window]
every_scheme = pytest.mark.parametrize("scheme", KV_SCHEMES.values(), ids=KV_SCHEMES)
every_storage = pytest.mark.parametrize("block_tokens", [None, 64], ids=["contiguous", "paged"])


def states(tokens: int, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float32, head_dim: int = D) -> Tensor:
    """Keys, or values, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, HEADS, tokens, head_dim, generator=generator) + 0.4).to(dtype)


def filled(scheme: KVScheme, keys: Tensor, values: Tensor, sliding_window: int | None = None) -> PackedLayer:
    layer = PackedLayer(scheme, sliding_window)
    layer.update(keys, values)
    layer.pack([0] * len(keys))
    return layer


def planes_of(layer: PackedLayer, side: Side, row: int) -> Planes:
    """Those of the quantized tokens of one sequence."""
    tokens, table = layer.num_quantized[row], layer.storage.block_table
    lines = torch.tensor([[row]]) if table is None else table[row : row + 1]
    parts = {name: read(part, 0, tokens // shared, lines)[0] for name, part, shared in side.parts()}
    return side.planes._replace(**parts)


def held(layer: PackedLayer, row: int = 0) -> list[Tensor]:
    """Keys and values [kv_heads, tokens, D] of all tokens of a sequence that are there, as they are read."""
    sinks, recent = layer.scheme.sinks, layer.num_recent[row]
    return [
        torch.cat((side.slots[row, :, : min(sinks, recent)],
                   dequantize(planes_of(layer, side, row), side.format),
                   side.slots[row, :, sinks:recent]), dim=1)
        for side in layer.sides
    ]  # fmt: skip


def expected(scheme: KVScheme, keys: Tensor, values: Tensor, quantized: int) -> list[Tensor]:
    """The same of one sequence, from the tokens themselves."""
    begin, end = scheme.sinks, scheme.sinks + quantized
    sides = (turned(keys) if scheme.rotated else keys, scheme.keys), (values, scheme.values)
    read = []
    for x, grid in sides:
        static = torch.ones(HEADS) if scheme.static else None
        planes = quantize(x[0, :, begin:end], kv_format(grid), static_scale=static)
        read.append(torch.cat((x[0, :, :begin], dequantize(planes, kv_format(grid)), x[0, :, end:]), dim=1))
    return read


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To the rounding of a rotation, which depends on how many tokens are turned at once."""
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=2e-6)


@every_scheme
def test_arithmetic_and_kernels_count_the_same_bytes(scheme: KVScheme) -> None:
    for itemsize, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        per_side = [kv_format(grid).token_bytes(128, dtype) for grid in (scheme.keys, scheme.values)]
        assert scheme.token_bytes(128, itemsize) == sum(per_side)


@every_scheme
def test_a_prompt_and_the_tokens_after_it_are_quantized_once_and_stay_so(scheme: KVScheme) -> None:
    keys, values = states(240), states(240, 1)
    layer = filled(scheme, keys[:, :, :190], values[:, :, :190])
    assert layer.num_quantized == [scheme.num_quantized(190)]
    for start, end in ((190, 191), (191, 196), (196, 197), (197, 239), (239, 240)):
        assert layer.update(keys[:, :, start:end], values[:, :, start:end]) == (layer, layer)
        assert layer.num_quantized == [scheme.num_quantized(start if scheme.window else end)]
    assert layer.get_seq_length() == 240
    assert_same(held(layer), expected(scheme, keys, values, scheme.num_quantized(239 if scheme.window else 240)))


@every_scheme
@pytest.mark.parametrize("tokens", [1, 3, 5, 131, 132])
def test_a_prompt_shorter_than_a_window_is_held_too(scheme: KVScheme, tokens: int) -> None:
    keys, values = states(tokens + 1), states(tokens + 1, 1)
    layer = filled(scheme, keys[:, :, :tokens], values[:, :, :tokens])
    layer.update(keys[:, :, tokens:], values[:, :, tokens:])
    assert_same(held(layer), expected(scheme, keys, values, 0 if scheme.window else tokens + 1))


@every_storage
@every_scheme
def test_sequences_of_a_batch_are_held_as_each_would_be_alone(scheme: KVScheme, block_tokens: int | None) -> None:
    keys, values, padding = states(230, batch=3), states(230, 1, batch=3), [0, 41, 228]
    layer = PackedLayer(scheme, block_tokens=block_tokens)
    layer.update(keys[:, :, :229], values[:, :, :229])
    layer.pack(padding)
    for _ in range(40):
        layer.update(keys[:, :, 229:], values[:, :, 229:])
    for row, columns in enumerate(padding):
        alone = filled(scheme, keys[row : row + 1, :, columns:229], values[row : row + 1, :, columns:229])
        for _ in range(40):
            alone.update(keys[row : row + 1, :, 229:], values[row : row + 1, :, 229:])
        assert_same(held(layer, row), held(alone))


@pytest.mark.parametrize(("name", "sliding_window"), [*((name, None) for name in KV_SCHEMES), ("kv8", 90), ("kv4", 90)])
def test_a_token_sees_the_same_whatever_comes_with_it(name: str, sliding_window: int | None) -> None:
    keys, values, query = states(420, batch=2), states(420, 1, batch=2), states(420, 2, batch=2)
    seen = []
    for steps in ([*[1] * 70, 200], [1, 6, 262, 1], [270]):
        layer, at, outputs = PackedLayer(KV_SCHEMES[name], sliding_window), 150, []
        layer.update(keys[:, :, :at], values[:, :, :at])
        layer.pack([0, 23])
        for step in steps:
            layer.update(keys[:, :, at : at + step], values[:, :, at : at + step])
            outputs.append(packed_attention(query[:, :, at : at + step], layer, 0.5))
            at += step
        seen.append(torch.cat(outputs, dim=2))
    for each in seen[1:]:
        torch.testing.assert_close(each, seen[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_scheme
def test_bytes_are_what_the_scheme_says_and_room_is_bounded(scheme: KVScheme, dtype: torch.dtype) -> None:
    tokens, head_dim = 1500, 128
    layer = PackedLayer(scheme)
    layer.update(states(1100, batch=2, dtype=dtype, head_dim=head_dim), states(1100, 1, 2, dtype, head_dim))
    for _ in range(4):
        layer.update(states(100, 2, 2, dtype, head_dim), states(100, 3, 2, dtype, head_dim))
    layer.update(states(0, 2, 2, dtype, head_dim), states(0, 3, 2, dtype, head_dim))
    stated = 2 * HEADS * scheme.num_bytes(tokens, head_dim, dtype.itemsize)
    measured = layer.nbytes - layer.room_nbytes
    assert measured == pytest.approx(stated, rel=0.001)
    spare = 2 * HEADS * (with_room(tokens) - tokens) * scheme.token_bytes(head_dim, dtype.itemsize)
    slots = 2 * HEADS * 96 * 2 * head_dim * dtype.itemsize if scheme.window else 0
    assert layer.room_nbytes <= spare + slots
    tensors = [part for side in layer.sides for part in (side.slots, *side.planes) if part is not None]
    assert layer.nbytes == sum(part.untyped_storage().nbytes() for part in tensors)


@every_scheme
def test_few_steps_copy_what_is_there(scheme: KVScheme) -> None:
    layer = filled(scheme, states(300), states(300))
    places: set[tuple[int, ...]] = set()
    for _ in range(200):
        layer.update(states(1), states(1))
        places.add(tuple(side.planes.codes.data_ptr() for side in layer.sides))
        places.add(tuple(side.slots.data_ptr() for side in layer.sides))
    assert len(places) <= 6


def test_what_a_long_run_of_tokens_took_in_full_precision_is_given_back() -> None:
    layer = filled(KV_SCHEMES["kv4"], states(200), states(200))
    layer.update(states(700), states(700))
    assert layer.sides[0].num_slots > 700
    layer.update(states(1), states(1))
    assert layer.sides[0].num_slots <= FLOATS + 32


@every_scheme
@pytest.mark.parametrize("constant", [0.0, 7.3, -1e4])
def test_what_is_constant_comes_back_and_is_no_nan(scheme: KVScheme, constant: float) -> None:
    keys, values = states(200), states(200, 1)
    keys[..., 3] = constant
    values[:, 0] = constant
    layer = filled(scheme, keys, values)
    y = packed_attention(torch.ones(1, HEADS, 1, D), layer, 0.1)
    assert y.isfinite().all()
    if scheme.keys.rows == 32:
        assert torch.equal(held(layer)[0][..., 3], keys[0, ..., 3])


@pytest.mark.parametrize("name", ["kv4", "kv2"])
def test_keys_per_channel_do_not_feel_a_channel_that_is_large(name: str) -> None:
    keys, values, query = states(200), states(200, 1), states(1, 2)
    large, small = torch.ones(D), torch.ones(D)
    large[5], small[5] = 64, 1 / 64
    scheme, other = KV_SCHEMES[name], KV_SCHEMES[f"{name}-rotated"]
    y, scaled = (
        packed_attention(query * small_or_not, filled(scheme, keys * large_or_not, values), 0.2)
        for large_or_not, small_or_not in ((1, 1), (large, small))
    )
    assert torch.equal(y, scaled)
    spread = packed_attention(query * small, filled(other, keys * large, values), 0.2)
    assert not torch.allclose(spread, packed_attention(query, filled(other, keys, values), 0.2), atol=1e-3)


def test_calibrated_scales_are_those_that_are_used() -> None:
    keys, values = 100 * states(20), states(20, 1)
    scales = torch.tensor([1.5, 0.5]), torch.tensor([0.01, 0.02])
    layer = PackedLayer(KV_SCHEMES["fp8"], scales=scales)
    layer.update(keys, values)
    layer.pack([0])
    for side, x, scale in zip(layer.sides, (keys, values), scales, strict=True):
        assert torch.equal(planes_of(layer, side, 0).codes, quantize(x[0], side.format, static_scale=scale).codes)
    assert (held(layer)[0][1] - keys[0, 1].clamp(-224, 224)).abs().max() <= 224 / 16


@every_scheme
def test_a_crop_within_the_window_leaves_no_trace(scheme: KVScheme) -> None:
    keys, values = states(230), states(230, 1)
    layer, other = (filled(scheme, keys[:, :, :200], values[:, :, :200]) for _ in range(2))
    layer.update(states(7, 2), states(7, 3))
    layer.crop(-7)
    for each in (layer, other):
        for at in range(200, 230):
            each.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    assert_same(held(layer), held(other))
    assert (layer.length, layer.num_quantized) == (other.length, other.num_quantized)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("confirmed", [155, 170, 195])
def test_guesses_that_are_taken_back_do_not_change_what_is_quantized(name: str, confirmed: int) -> None:
    scheme = KV_SCHEMES[name]
    keys, values = states(230), states(230, 1)
    layer, other = PackedLayer(scheme), filled(scheme, keys[:, :, :150], values[:, :, :150])
    layer.activate_past_recording()
    layer.update(keys[:, :, :155], values[:, :, :155])  # a prompt of 150 that ends in guesses
    layer.pack([0])
    layer.crop(-5)
    for at in range(150, confirmed, 5):
        layer.update(keys[:, :, at : at + 9], values[:, :, at : at + 9])
        guessed = packed_attention(keys[:, :, at : at + 9], layer, 0.5)
        for i in range(9, 14):  # a draft model guesses one by one
            layer.update(keys[:, :, at + i : at + i + 1], values[:, :, at + i : at + i + 1])
        layer.crop(-9)
        for i in range(5):
            other.update(keys[:, :, at + i : at + i + 1], values[:, :, at + i : at + i + 1])
            alone = packed_attention(keys[:, :, at + i : at + i + 1], other, 0.5)
            torch.testing.assert_close(guessed[:, :, i : i + 1], alone, rtol=0, atol=1e-5)
    reached = layer.length
    for each in (layer, other):
        each.update(keys[:, :, reached : reached + 1], values[:, :, reached : reached + 1])
    assert_same(held(layer), held(other))
    assert layer.num_quantized == other.num_quantized


@every_scheme
@pytest.mark.parametrize("left", [210, 170, 101, 100, 36, 35, 4, 3, 1])
def test_a_crop_leaves_tokens_as_they_were_read(scheme: KVScheme, left: int) -> None:
    layer = filled(scheme, states(240, batch=2), states(240, 1, batch=2))
    before, codes = [held(layer, row) for row in range(2)], [side.planes.codes.clone() for side in layer.sides]
    layer.crop(left - 240)
    assert layer.get_seq_length() == left
    for row in range(2):
        assert_same(held(layer, row), [x[:, :left] for x in before[row]])
    for side, old in zip(layer.sides, codes, strict=True):
        kept = layer.num_quantized[0]
        assert torch.equal(side.planes.codes[:, :, :kept], old[:, :, :kept])
    if scheme.keys.rows != 32 and left > scheme.sinks:
        assert layer.num_quantized == [min(left - scheme.sinks, scheme.num_quantized(240))] * 2


@pytest.mark.parametrize("name", ["kv4", "kv2"])
def test_a_group_that_was_cut_gets_its_codes_again(name: str) -> None:
    layer = filled(KV_SCHEMES[name], states(240), states(240, 1))
    keys, values = (x[None] for x in held(layer))
    planes = [side.planes.codes[:, :, :96].clone() for side in layer.sides]
    layer.crop(-(240 - 80))  # 76 are quantized: two groups stay, 12 of the third return to the window
    assert (layer.num_quantized, layer.num_recent) == ([64], [4 + 12])
    layer.update(keys[:, :, 80:], values[:, :, 80:])
    layer.update(states(0), states(0))
    assert layer.num_quantized == [96]
    for side, old in zip(layer.sides, planes, strict=True):
        assert torch.equal(side.planes.codes[:, :, :96], old)


@every_storage
@every_scheme
def test_a_crop_of_sequences_of_unequal_length_shortens_each(scheme: KVScheme, block_tokens: int | None) -> None:
    layer = PackedLayer(scheme, block_tokens=block_tokens)
    layer.update(states(240, batch=3), states(240, 1, batch=3))
    layer.pack([0, 60, 200])
    before = [held(layer, row) for row in range(3)]
    layer.crop(-90)
    for row, left in enumerate((150, 90, 0)):
        assert_same(held(layer, row), [x[:, :left] for x in before[row]])
    assert layer.padding == [0, 60, 150]


def test_a_layer_that_lost_all_its_tokens_begins_again() -> None:
    scheme = KV_SCHEMES["kv4"]
    for forget in (lambda layer: layer.crop(-500), PackedLayer.reset):
        layer = filled(scheme, states(200, batch=2), states(200, batch=2))
        forget(layer)
        assert (layer.get_seq_length(), layer.nbytes) == (0, 0)
        layer.update(states(170, 2), states(170, 3))
        layer.update(states(1, 4), states(1, 5))
        keys, values = (torch.cat((states(170, seed), states(1, seed + 2)), dim=2) for seed in (2, 3))
        assert_same(held(layer), expected(scheme, keys, values, 32))


def test_a_positive_crop_is_refused() -> None:
    with pytest.raises(RequestError, match=r"crop\(10\): give the number of tokens to remove as a negative one"):
        filled(KV_SCHEMES["kv8"], states(20), states(20)).crop(10)


@every_storage
@every_scheme
def test_beams_take_their_past_along(scheme: KVScheme, block_tokens: int | None) -> None:
    layer = PackedLayer(scheme, block_tokens=block_tokens)
    layer.update(states(200, batch=2), states(200, 1, batch=2))
    layer.pack([0, 30])
    first, second = held(layer, 0), held(layer, 1)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([2, 0, 3, 1]))
    for row, other in enumerate((second, first, second, first)):
        assert_same(held(layer, row), other)
    layer.batch_select_indices(torch.tensor([1, 2]))
    layer.update(states(1, 2, batch=2), states(1, 3, batch=2))
    for row, (other, length) in enumerate(((first, 200), (second, 170))):
        assert_same([x[:, : length - FLOATS] for x in held(layer, row)], [x[:, : length - FLOATS] for x in other])
        assert held(layer, row)[0].shape[1] == length + 1
    assert layer.padding == [0, 30]


@every_scheme
def test_a_sliding_layer_keeps_what_the_next_query_sees_and_little_more(scheme: KVScheme) -> None:
    window = 160
    keys, values = states(1000), states(1000, 1)
    layer, full = filled(scheme, keys[:, :, :400], values[:, :, :400], window), filled(
        scheme, keys[:, :, :400], values[:, :, :400]
    )  # fmt: skip
    most = 0
    for at in range(400, 1000):
        for each in (layer, full):
            each.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        most = max(most, layer.nbytes)
        for mine, others in zip(held(layer), held(full), strict=True) if at % 50 == 0 else ():
            assert torch.equal(mine[:, -window:], others[:, -window:])
    assert layer.get_seq_length() == 1000
    kept = with_room(with_room(window + 32))
    assert most <= HEADS * (kept * scheme.token_bytes(D, 4) + (FLOATS + 96) * 2 * D * 4) + 2 * HEADS * 4
    assert layer.get_mask_sizes(3) == (window - 1 + 3, 1000 - window + 1)


def test_a_sliding_layer_does_not_give_back_what_it_forgot() -> None:
    layer = filled(KV_SCHEMES["kv4"], states(500), states(500), 160)
    with pytest.raises(
        RequestError, match=r"crop\(-40\): a layer with a sliding window of 160 tokens .* more than \d+"
    ):
        layer.crop(-40)


@every_storage
@every_scheme
def test_a_sliding_layer_that_records_its_past_gives_guesses_back(scheme: KVScheme, block_tokens: int | None) -> None:
    window = 40
    keys, values = states(600), states(600, 1)
    layer = PackedLayer(scheme, window, block_tokens=block_tokens)
    layer.activate_past_recording()
    layer.update(keys[:, :, :200], values[:, :, :200])
    layer.pack([0])
    layer.crop(-5)
    while layer.length + 20 <= 600:
        at = layer.length
        layer.update(keys[:, :, at : at + 20], values[:, :, at : at + 20])
        layer.crop(-13)
        recent = held(layer)[1][:, -30:]
        if scheme.window:
            assert torch.equal(recent, values[0, :, layer.length - 30 : layer.length])
        else:
            assert (recent - values[0, :, layer.length - 30 : layer.length]).abs().max() < 0.25  # of up to 4, in fp8
    assert layer.num_dropped[0] > 0


def config_of(kind: str) -> Any:
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "llama": lambda: LlamaConfig(**size),
        "gemma2": lambda: Gemma2Config(**size, sliding_window=48),
        "llama4": lambda: Llama4TextConfig(**size, attention_chunk_size=64),
        "gemma3n": lambda: Gemma3nTextConfig(**size, num_kv_shared_layers=2),
        "mamba": lambda: MambaConfig(hidden_size=64, num_hidden_layers=2),
        "deepseek": lambda: DeepseekV3Config(**size),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "windows"), [("llama", [None] * 4), ("gemma2", [48, None, 48, None]), ("llama4", ["", "", "", None])]
)
def test_layers_of_full_and_sliding_attention_are_packed(kind: str, windows: list[int | str | None]) -> None:
    layers = QuantizedCache(config_of(kind), KV_SCHEMES["kv4"]).layers
    assert [layer.sliding_window if isinstance(layer, PackedLayer) else "" for layer in layers] == windows


@pytest.mark.parametrize(
    ("kind", "message"),
    [("gemma3n", "layers read keys and values of others"), ("mamba", "no layer has full or sliding attention")],
)
def test_a_model_without_keys_and_values_of_its_own_is_refused(kind: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        QuantizedCache(config_of(kind), KV_SCHEMES["kv4"])


def test_keys_and_values_of_two_sizes_are_refused() -> None:
    layer = QuantizedCache(config_of("deepseek"), KV_SCHEMES["kv4"]).layers[0]
    with pytest.raises(RequestError, match=r"keys are \[1, 2, 9, 192\], values \[1, 2, 9, 128\]"):
        layer.update(states(9, head_dim=192), states(9, head_dim=128))


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(RequestError, match="head_dim=48 is not a multiple of 32"):
        PackedLayer(KV_SCHEMES["kv4"]).update(states(9, head_dim=48), states(9, head_dim=48))


def test_a_cache_counts_its_layers_together() -> None:
    cache = QuantizedCache(config_of("gemma2"), KV_SCHEMES["kv8"])
    for layer in range(4):
        cache.update(states(100), states(100), layer)
        cache.layers[layer].pack([0])
    assert cache.get_seq_length() == 100
    stated = HEADS * KV_SCHEMES["kv8"].num_bytes(100, D, 4)
    assert cache.nbytes - cache.room_nbytes < 4 * stated  # two layers have forgotten 32 tokens
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)
