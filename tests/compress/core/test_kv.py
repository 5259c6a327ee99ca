"""A name of a KV cache scheme says which tokens are quantized, on which grids, and how many bytes that takes."""

from __future__ import annotations

import pytest
import torch

from compress.core.kv import KV_SCHEMES, TOKENS, KVScheme, parse_kv_scheme, rounded, static_scale
from compress.core.scheme import Grid
from compress.runtime.side import kv_format
from quant_kernels.kv_planes import dequantize, quantize

every_scheme = pytest.mark.parametrize("name", KV_SCHEMES)


@every_scheme
def test_a_scheme_knows_its_name(name: str) -> None:
    assert parse_kv_scheme(name).name == name


def test_a_scheme_without_a_name_is_called_by_its_bits() -> None:
    assert KVScheme(Grid(8), Grid(4, symmetric=False), window=64).name == "k8v4"
    assert KVScheme(Grid(2), Grid(2), rotated=True).name == "k2v2-rotated"


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown KV cache scheme 'kv3'; there are fp8, fp8-head, kv8, k8v4, kv4, kv4-rotated"
    ):
        parse_kv_scheme("kv3")


def test_keys_share_scales_with_tokens_and_values_with_channels() -> None:
    keys, values = KV_SCHEMES["kv4"].keys, KV_SCHEMES["kv4"].values
    assert (keys.rows, keys.num_groups(128)) == (TOKENS, 128)
    assert (values.rows, values.num_groups(128)) == (1, 4)
    assert KV_SCHEMES["kv4-rotated"].keys.num_groups(128) == 1


def test_only_fp8_waits_for_calibration() -> None:
    assert [name for name, scheme in KV_SCHEMES.items() if scheme.static] == ["fp8", "fp8-head"]
    largest = torch.tensor([4.48, 44.8, 0.0])
    assert torch.equal(static_scale(largest, by_head=True), torch.tensor([4.48 / 448, 44.8 / 448, 1.0]))
    assert torch.equal(static_scale(largest, by_head=False), torch.tensor([44.8 / 448]))


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("fp8", 256),
        ("kv8", 256 + 2 * 2),
        ("k8v4", 128 + 2 + 64 + 4 * 4),
        ("kv4", 64 + 128 * 4 / 32 + 64 + 4 * 4),
        ("kv4-rotated", 64 + 4 + 64 + 4 * 4),
        ("kv2", 32 + 128 * 4 / 32 + 32 + 4 * 4),
        ("kv2-rotated", 32 + 4 + 32 + 4 * 4),
    ],
)
def test_bytes_of_a_token_are_its_codes_and_its_share_of_scales(name: str, per_token: float) -> None:
    assert KV_SCHEMES[name].token_bytes(128) == per_token


def test_sinks_and_a_window_take_what_they_took() -> None:
    scheme = KV_SCHEMES["kv2"]
    assert scheme.num_bytes(132, 64) == 132 * 2 * 64 * 2
    assert scheme.num_bytes(132 + 64, 64) == 132 * 2 * 64 * 2 + 64 * scheme.token_bytes(64)
    assert scheme.num_bytes(132, 64, itemsize=4) == 132 * 2 * 64 * 4


@pytest.mark.parametrize(("tokens", "quantized"), [(0, 0), (132, 0), (163, 0), (164, 32), (195, 32), (8192, 8032)])
def test_groups_leave_as_soon_as_a_window_is_left_behind(tokens: int, quantized: int) -> None:
    assert KV_SCHEMES["kv4"].num_quantized(tokens) == quantized
    assert KV_SCHEMES["kv8"].num_quantized(tokens) == tokens


def test_heads_that_do_not_divide_are_refused_with_what_does() -> None:
    with pytest.raises(
        ValueError, match=r"head_dim=80 is not a multiple of 32, as scheme kv4 .* choose fp8 or fp8-head or kv8"
    ):
        KV_SCHEMES["kv4"].token_bytes(80)
    with pytest.raises(ValueError, match=r"head_dim=12 is not a multiple of 8.* Leave the cache unquantized$"):
        KV_SCHEMES["kv8"].check(12)
    KV_SCHEMES["kv8"].check(80)


@pytest.mark.parametrize(("window", "sinks"), [(100, 4), (-32, 0), (128, -1), (0, 4)])
def test_a_window_that_groups_cannot_leave_is_refused(window: int, sinks: int) -> None:
    with pytest.raises(ValueError, match=f"window={window}, sinks={sinks}"):
        KVScheme(Grid(8), Grid(8), window, sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 77])
@pytest.mark.parametrize("name", [name for name in KV_SCHEMES if not KV_SCHEMES[name].static])
def test_rounding_is_what_packing_does(name: str, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    x[..., 5] = 0.25  # of a channel that does not vary
    for grid in (KV_SCHEMES[name].keys, KV_SCHEMES[name].values):
        form, result = kv_format(grid), rounded(x, grid)
        whole = tokens // 32 * 32 if form.per == "channel" else tokens
        packed = dequantize(quantize(x[:, :, :whole], form), form).to(dtype)
        torch.testing.assert_close(result[:, :, :whole], packed, rtol=1e-6, atol=1e-6)
        assert torch.equal(result[:, :, whole:], x[:, :, whole:])
