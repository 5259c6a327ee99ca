"""The loop in C computes what torch's operations compute, bit for bit, and nobody depends on there being a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quant_kernels import cpu, native

needs_compiler = pytest.mark.skipif(native.unpacker() is None, reason="no C compiler here")
needs_blocks = pytest.mark.skipif(cpu.instruction_set() != "AVX512", reason="torch packs other blocks here")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weight(rows: int, columns: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes of all values, scales of both signs, zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale, zero = torch.randn(2, groups, rows, generator=generator)
    return packed, scale, zero


@needs_compiler
@needs_blocks
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns", "groups"), [(64, 32, 1), (128, 256, 2), (192, 320, 10)])
def test_the_loop_rounds_what_torch_computes_to_nearest_even(rows: int, columns: int, groups: int) -> None:
    packed, scale, zero = weight(rows, columns, groups)
    out = torch.full((columns, rows), torch.nan, dtype=torch.bfloat16)
    unpack = native.unpacker()
    assert unpack is not None
    unpack(packed, scale, zero, out)
    assert torch.equal(out, cpu._unpack_int4_by_torch(packed, scale, zero).to(torch.bfloat16))


@pytest.mark.parametrize("compilers", [(), ("false",)], ids=["none is there", "it fails"])
def test_without_a_compiler_there_is_no_loop(compilers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", compilers)
    assert native.unpacker.__wrapped__() is None


@needs_blocks
def test_a_layer_is_the_same_with_and_without_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product_dtype", lambda: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (208, 256), dtype=torch.int8, generator=generator)
    packed = cpu.pack_int4(codes, torch.rand(208, 2, generator=generator), None, 4)
    x = torch.randn(70, 256, generator=generator).to(torch.bfloat16)
    with_loop = cpu.linear_int4_by_chunks(x, packed)
    monkeypatch.setattr(native, "unpacker", lambda: None)
    assert torch.equal(cpu.linear_int4_by_chunks(x, packed), with_loop)
