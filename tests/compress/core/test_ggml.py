from __future__ import annotations

import pytest
import torch

from compress.core.affine import params_from_range, quantize
from compress.core.ggml import FALLBACK, TYPES, BlockType, from_grid, type_for
from compress.core.ggml_bytes import from_bytes, to_bytes
from compress.core.ggml_search import blocks
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid

KINDS = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)


def weight(rows: int = 3, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(
    bits: int, symmetric: bool, group_size: int | None, dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    grid, dense = Grid(bits, symmetric, group_size), weight(8, 128)
    groups = dense.unflatten(1, (grid.num_groups(128), -1))
    return quantize(dense, *params_from_range(groups.amin(-1), groups.amax(-1), grid, dtype), grid)


@KINDS
def test_bytes_give_back_what_they_were_made_of(kind: BlockType) -> None:
    found = blocks(weight(), kind)
    stored = to_bytes(found)
    assert stored.shape == (3, 512 // kind.size * kind.bytes)
    assert torch.equal(from_bytes(stored, kind).dequantize(), found.dequantize())
    assert torch.equal(to_bytes(from_bytes(stored, kind)), stored)


@KINDS
def test_every_code_and_every_scale_survives(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = torch.randint(0, 256, (5, kind.bytes * 3), generator=generator, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(stored, kind)), stored)


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_symmetric_codes_become_blocks_exactly(bits: int, name: str, group_size: int | None) -> None:
    tensor = quantized(bits, True, group_size)
    found = from_grid(tensor)
    assert found is not None
    assert found.kind.name == name
    assert torch.equal(found.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
def test_asymmetric_codes_stay_and_their_offset_is_rounded_once(bits: int, name: str) -> None:
    tensor = quantized(bits, False, 32)
    found = from_grid(tensor)
    assert found is not None
    assert found.kind.name == name
    offset = (tensor.scale.float() * (tensor.zero_point.float() + (1 << bits - 1))).abs()  # type: ignore[union-attr]
    limit = (offset * 2**-11).repeat_interleave(32, dim=1)
    assert ((found.dequantize() - tensor.dequantize()).abs() <= limit * 1.01).all()


def test_what_no_simple_type_holds_is_told() -> None:
    assert from_grid(quantized(4, True, 16)) is None
    assert from_grid(quantized(3, True, 32)) is None
    assert from_grid(quantized(8, False, 32)) is None
    assert from_grid(quantized(4, True, 32, torch.float32)) is None


def test_rows_of_another_length_fall_back_as_in_llama_cpp() -> None:
    assert {name: type_for(name, 384).name for name in FALLBACK} == FALLBACK  # type: ignore[union-attr]
    assert type_for("Q4_K", 512) == TYPES["Q4_K"]
    assert type_for("Q4_0", 48) is None


def test_the_words_are_ggmls() -> None:
    codes = torch.arange(-16.0, 16.0).view(1, -1)
    scale = torch.tensor([[127 / 127]], dtype=torch.float16)
    tensor = QuantizedTensor(codes.to(torch.int8), scale, None, Grid(8, True, 32))
    found = from_grid(tensor)
    assert found is not None
    assert to_bytes(found).numpy().tobytes().hex() == "003c" + bytes(range(240, 256)).hex() + bytes(range(16)).hex()
    four = QuantizedTensor((torch.arange(32) % 16 - 8).to(torch.int8).view(1, -1), scale, None, Grid(4, True, 32))
    assert to_bytes(from_grid(four)).numpy().tobytes().hex() == "003c" + bytes(17 * i for i in range(16)).hex()  # type: ignore[arg-type]


def test_bytes_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole blocks"):
        from_bytes(torch.zeros(1, 17, dtype=torch.uint8), TYPES["Q4_0"])
