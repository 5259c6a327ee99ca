"""MatMulNBits' operands: our codes as they are, in blocks that onnxruntime has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.checkpoint.onnx_blocks import from_operands, problem, to_operands
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme, parse_scheme


def random_tensor(grid: Grid, rows: int = 6, columns: int = 96, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    low, high = int(grid.qmin), int(grid.qmax) + 1
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    groups = grid.num_groups(columns)
    scale = torch.randn(rows, groups, generator=generator).to(dtype)
    zeros = torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.int8)
    return QuantizedTensor(codes, scale, None if grid.symmetric else zeros, grid)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_they_stand_for_is_the_very_tensor(bits: int, group_size: int | None, symmetric: bool) -> None:
    tensor = random_tensor(Grid(bits, symmetric, group_size))
    assert from_operands(to_operands(tensor)) == tensor


@pytest.mark.parametrize(("bits", "wider"), [(3, 4), (5, 8), (6, 8), (7, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_other_widths_are_numbers_of_the_next_wider_grid(bits: int, wider: int, symmetric: bool) -> None:
    tensor = random_tensor(Grid(bits, symmetric, 32))
    held = to_operands(tensor)
    back = from_operands(held)
    assert held.bits == wider
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("group_size", "columns", "block"),
    [(96, 192, 32), (512, 1024, 256), (48, 96, 16), (None, 64, 64), (None, 512, 256), (None, 172, 64), (None, 8, 16)],
)
def test_a_group_is_one_block_or_several_with_the_same_scale(group_size: int | None, columns: int, block: int) -> None:
    tensor = random_tensor(Grid(4, False, group_size), columns=columns)
    held = to_operands(tensor)
    assert held.block == block
    assert held.scales.shape == (6, -(-columns // block))
    back = from_operands(held)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_widen_without_rounding(dtype: torch.dtype) -> None:
    tensor = random_tensor(Grid(4, True, 32), dtype=dtype)
    held = to_operands(tensor)
    assert held.scales.dtype == torch.float32
    assert torch.equal(held.scales.to(dtype), tensor.scale)


def test_the_bytes_are_those_onnxruntime_reads() -> None:
    """Low bits first, codes and zero points unsigned, each row of zero points filled up to a whole byte."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3).view(1, 48)
    zeros = torch.tensor([[-8, 7, 1]], dtype=torch.int8)
    held = to_operands(QuantizedTensor(codes, torch.ones(1, 3), zeros, Grid(4, False, 16)))
    assert held.codes.tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]] * 3]
    assert held.zero_points is not None
    assert held.zero_points.tolist() == [[0xF0, 0x09]]


@pytest.mark.parametrize("scheme", [parse_scheme("fp8"), parse_scheme("nf4"), parse_scheme("w8a8")])
def test_other_grids_are_refused(scheme: Scheme) -> None:
    assert "MatMulNBits holds integer weights whose inputs are not rounded" in (problem("a", (8, 256), scheme) or "")


def test_groups_no_block_divides_are_refused_unless_they_are_the_whole_row() -> None:
    assert "group_size=24 is not made of blocks of 16" in (problem("a", (8, 96), Scheme(Grid(4, True, 24))) or "")
    assert problem("a", (8, 24), Scheme(Grid(4, True, 24))) is None
    assert problem("a", (8, 96), Scheme(Grid(4, True, 48))) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits each"),
        ({"block": 24}, "blocks of 24"),
        ({"columns": 1 << 40}, "codes are [6, 3, 16] of torch.uint8, expected [6, 34359738368, 16]"),
        ({"codes": torch.zeros(6, 3, 8, dtype=torch.uint8)}, "codes are [6, 3, 8]"),
        ({"scales": torch.zeros(6, 2)}, "scales are [6, 2]"),
        ({"scales": torch.zeros(6, 3, dtype=torch.float16)}, "of torch.float16, expected"),
        ({"zero_points": torch.zeros(6, 1, dtype=torch.uint8)}, "zero points are [6, 1]"),
        ({"columns": 90}, "no whole blocks of 32, and scales differ"),
    ],
)
def test_operands_that_do_not_fit_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    held = replace(to_operands(random_tensor(Grid(4, False, 32))), **change)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        from_operands(held)
