"""What is in C computes what torch computes, as exactly as it can, and nobody depends on there being a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quant_kernels import Packed, cpu, native

needs_loops = pytest.mark.skipif(native.loops() is None, reason="no C compiler, or no AVX512, here")
needs_dots = pytest.mark.skipif(not native.has_dots(), reason="no AVX512-BF16 here")
needs_matrix_unit = pytest.mark.skipif(not native.has_matrix_unit(), reason="no AMX here")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weight(rows: int, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of all values; scales of both signs, and zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    return packed, torch.randn(groups, rows, 2, generator=generator).to(torch.bfloat16)


def problem(tokens: int, rows: int, columns: int, groups: int) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """A packed weight with scales of both signs and zero points; activations with a mean; a bias."""
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) - 0.5).to(torch.bfloat16)
    zero_point = torch.randint(-8, 8, (rows, groups), dtype=torch.int8, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) + 0.5
    bias = torch.randn(rows, generator=generator)
    return cpu.pack_int4(codes, scale, zero_point, 4), x.to(torch.bfloat16), bias.to(torch.bfloat16)


@needs_loops
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 32, 1), (128, 256, 2), (192, 320, 10)])
def test_the_loop_rounds_what_torch_computes_to_nearest_even(rows: int, columns: int, groups: int) -> None:
    packed, grid = weight(rows, columns, groups)
    out = torch.full((columns, rows), torch.nan, dtype=torch.bfloat16)
    loops = native.loops()
    assert loops is not None
    loops.unpack(packed, grid, out)
    assert torch.equal(out, cpu._unpack_int4_by_torch(packed, grid).to(torch.bfloat16))


@pytest.mark.parametrize("compilers", [(), ("false",)], ids=["none is there", "it fails"])
def test_without_a_compiler_there_are_no_loops(compilers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", compilers)
    assert native.loops.__wrapped__() is None


@needs_loops
def test_a_layer_is_the_same_with_and_without_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product_dtype", lambda: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (208, 256), dtype=torch.int8, generator=generator)
    packed = cpu.pack_int4(codes, torch.rand(208, 2, generator=generator), None, 4)
    x = torch.randn(70, 256, generator=generator).to(torch.bfloat16)
    with_loop = cpu.linear_int4_by_chunks(x, packed)
    monkeypatch.setattr(native, "loops", lambda: None)
    assert torch.equal(cpu.linear_int4_by_chunks(x, packed), with_loop)


@needs_dots
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 32, 1), (80, 64, 2), (192, 1088, 17), (320, 2048, 8)])
def test_one_token_meets_the_exact_weight(rows: int, columns: int, groups: int) -> None:
    packed, x, bias = problem(1, rows, columns, groups)
    weight = cpu.dequantize_int4_rows(packed, 0, rows, torch.float32).double()
    exact = x.double() @ weight.T
    y = cpu.linear_int4_dot(x, packed)
    # A code is summed as 128 + code, so that sums in float32 lose up to 16 times as much.
    steps = 2.0**-18 * (x.double().abs() @ weight.abs().T)
    torch_rounds = 0 if rows % native.BLOCK_ROWS == 0 else 2.0**-8 * (x.double().abs() @ weight.abs().T)
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + steps + torch_rounds).all())
    assert torch.equal(cpu.linear_int4_dot(x, packed, bias), y + bias)


@needs_matrix_unit
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [1, 9, 32, 33, 100])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 32, 1), (208, 1088, 17), (80, 4096, 16), (320, 2048, 8)])
def test_the_matrix_unit_multiplies_by_the_rounded_weight(tokens: int, rows: int, columns: int, groups: int) -> None:
    packed, x, bias = problem(tokens, rows, columns, groups)
    weight = cpu.dequantize_int4_rows(packed, 0, rows, torch.bfloat16).double()
    exact = x.double() @ weight.T
    y = cpu.linear_int4_matrix_unit(x, packed)
    rounding = 2.0**-8 * exact.abs() + 2.0**-20 * (x.double().abs() @ weight.abs().T)
    assert bool(((y.double() - exact).abs() <= rounding).all())
    assert torch.equal(cpu.linear_int4_matrix_unit(x, packed, bias), y + bias)


def test_what_was_unpacked_in_inference_mode_can_be_unpacked_to_again() -> None:
    codes = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    packed = cpu.pack_int8(codes, torch.ones(64, 1), None, 8)
    x = torch.ones(40, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = cpu.linear_int8_by_chunks(x, packed)
    assert torch.equal(cpu.linear_int8_by_chunks(x, packed), inside)
