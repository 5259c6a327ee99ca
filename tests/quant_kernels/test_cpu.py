"""Torch's own integer products compute what the reference computes, to the rounding of bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_kernels import cpu, reference
from quant_kernels.dispatch import KERNELS
from quant_kernels.layout import LinearSpec

pytestmark = pytest.mark.skipif(
    cpu.instruction_set() not in cpu.BLOCK_ROWS, reason=f"no kernels for {cpu.instruction_set()}"
)
LINEAR = {kernel.name: kernel.linear for kernel in KERNELS}
BF16_TOLERANCE = 3 * 2**-9
"""Relative error of three roundings to 8 bits: the weight or its zero, the product, its sum with the bias."""


def random_weight(
    rows: int, columns: int, groups: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and zero points over the whole grid, scales of both signs."""
    generator = torch.Generator().manual_seed(rows + columns)
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5) / limit
    sign = torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
    zero_point = torch.randint(-limit, limit, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, (scale * sign).to(torch.bfloat16), None if symmetric else zero_point


def activations(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [(16, 32, 1), (80, 64, 2), (64, 256, 2), (112, 256, 1), (48, 192, 2), (128, 1024, 1), (144, 512, 1)],
)
@pytest.mark.parametrize("tokens", [1, 5, cpu.INT4_MOST_TOKENS + 1])
def test_int4_agrees_with_the_reference(
    rows: int, columns: int, groups: int, bits: int, symmetric: bool, tokens: int
) -> None:
    weight = random_weight(rows, columns, groups, bits, symmetric)
    x = activations(tokens, columns)
    bias = activations(1, rows)[0]
    exact = reference.linear_reference(x.float(), reference.pack(*weight, bits), bias.float())
    assert relative_error(LINEAR["cpu_int4"](x, cpu.pack_int4(*weight, bits), bias), exact) < BF16_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_tokens_are_right_in_whichever_type_is_faster_here(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "product_dtype", lambda: dtype)
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 1)
    weight = random_weight(208, 256, 2 if bits == 4 else 1, bits, symmetric=bits == 8)
    x, bias = activations(70, 256), activations(1, 208)[0]
    exact = (
        x.double() @ reference.dequantize_rows(reference.pack(*weight, bits), 0, 208, torch.float64).T + bias.double()
    )
    pack, linear = (cpu.pack_int4, LINEAR["cpu_int4"]) if bits == 4 else (cpu.pack_int8, LINEAR["cpu_int8"])
    error = relative_error(linear(x, pack(*weight, bits), bias), exact)
    assert error < (BF16_TOLERANCE if dtype == torch.bfloat16 else 2**-8)


def test_the_type_of_products_is_one_of_two_and_does_not_change() -> None:
    assert cpu.product_dtype() in (torch.bfloat16, torch.float32)
    assert cpu.product_dtype() is cpu.product_dtype()


@pytest.mark.parametrize(("rows", "columns"), [(512, 2048), (514, 2080), (640, 4064)])
def test_rows_taken_in_pairs_give_the_same_product(rows: int, columns: int) -> None:
    codes, scale, _ = random_weight(rows, columns, 1, 8, symmetric=True)
    packed = cpu.pack_int8(codes, scale, None, 8)
    assert cpu._pairs_are_faster(packed)
    x = activations(1, columns)
    exact = reference.linear_reference(x.float(), reference.pack(codes, scale, None, 8))
    assert relative_error(LINEAR["cpu_int8"](x, packed), exact) < BF16_TOLERANCE


@pytest.mark.parametrize(("rows", "columns"), [(513, 2048), (64, 2048), (512, 1024), (512, 4096)])
def test_rows_are_not_paired_where_nothing_is_gained(rows: int, columns: int) -> None:
    codes, scale, _ = random_weight(rows, columns, 1, 8, symmetric=True)
    assert not cpu._pairs_are_faster(cpu.pack_int8(codes, scale, None, 8))


@pytest.mark.parametrize("rows", [64, 272, 592])
def test_packing_some_rows_at_a_time_gives_the_bytes_of_packing_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = random_weight(rows, 96, 3, 4, symmetric=True)
    some = cpu.pack_int4(codes, scale, None, 4).codes
    monkeypatch.setattr(cpu, "PACKED_ROWS", rows)
    assert torch.equal(some, cpu.pack_int4(codes, scale, None, 4).codes)


@pytest.mark.parametrize("rows", [16, 48, 64, 80, 112, 144])
def test_int4_bytes_are_understood_as_the_op_understands_them(rows: int) -> None:
    codes, scale, _ = random_weight(rows, 96, 3, 4, symmetric=True)
    unpacked = cpu.dequantize_int4_rows(cpu.pack_int4(codes, scale, None, 4), 0, rows, torch.float32)
    assert torch.equal(
        unpacked, reference.dequantize_rows(reference.pack(codes, scale, None, 4), 0, rows, torch.float32)
    )


def test_int4_rows_are_found_at_any_chunk_boundary() -> None:
    codes, scale, _ = random_weight(144, 96, 3, 4, symmetric=True)
    packed = cpu.pack_int4(codes, scale, None, 4)
    whole = cpu.dequantize_int4_rows(packed, 0, 144, torch.float32)
    for start, stop in [(0, 64), (64, 128), (64, 144), (128, 144)]:
        assert torch.equal(cpu.dequantize_int4_rows(packed, start, stop, torch.float32), whole[start:stop])


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 64), (17, 96), (33, 32), (64, 256)])
@pytest.mark.parametrize("tokens", [1, 3, 5, cpu.INT8_MOST_TOKENS + 1])
def test_int8_agrees_with_the_reference(rows: int, columns: int, bits: int, tokens: int) -> None:
    codes, scale, _ = random_weight(rows, columns, 1, bits, symmetric=True)
    x = activations(tokens, columns)
    bias = activations(1, rows)[0]
    exact = reference.linear_reference(x.float(), reference.pack(codes, scale, None, bits), bias.float())
    y = LINEAR["cpu_int8"](x, cpu.pack_int8(codes, scale, None, bits), bias)
    assert relative_error(y, exact) < BF16_TOLERANCE


def spec(**changes: object) -> LinearSpec:
    usual = {"bits": 4, "group_size": 128, "symmetric": True, "dtype": torch.bfloat16, "device": "cpu"}
    return LinearSpec(**{**usual, "in_features": 512, "out_features": 512, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"bits": 5}, "up to 4 bits, not 5"),
        ({"group_size": 48}, "multiple of 32 columns, not 48"),
        ({"group_size": None, "in_features": 172}, "multiple of 32 columns, not 172"),
        ({"out_features": 520}, "multiple of 16, not 520"),
    ],
)
def test_int4_says_what_it_cannot_run(changes: dict[str, object], because: str) -> None:
    assert because in (cpu.int4_objection(spec(**changes)) or "")


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"bits": 4, "group_size": None}, "a byte on each code of 4 bits"),
        ({"bits": 8}, "one scale per output channel"),
        ({"bits": 8, "group_size": None, "symmetric": False}, "symmetric codes"),
        ({"bits": 8, "group_size": None, "in_features": 40}, "multiple of 32, not 40"),
    ],
)
def test_int8_says_what_it_cannot_run(changes: dict[str, object], because: str) -> None:
    assert because in (cpu.int8_objection(spec(**changes)) or "")


def test_an_op_that_torch_no_longer_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "op_exists", lambda name: False)
    assert "needs aten::_weight_int4pack_mm_for_cpu" in (cpu.int4_objection(spec()) or "")


def test_a_processor_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_set", lambda: "DEFAULT")
    assert "this processor has DEFAULT" in (cpu.int4_objection(spec()) or "")
