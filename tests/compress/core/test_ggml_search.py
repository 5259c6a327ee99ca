"""Ranges of least error in ggml's types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.core import ggml_search
from compress.core.ggml import TYPES, BlockType
from compress.core.ggml_search import blocks
from compress.errors import NumericalError

KINDS = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)


def weight(rows: int = 3, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@KINDS
def test_more_bits_lose_less_and_the_search_beats_the_widest_range(kind: BlockType) -> None:
    dense = weight()
    error = float((blocks(dense, kind).dequantize() - dense).square().mean())
    parts = dense.unflatten(1, (-1, kind.part))
    top = (1 << kind.bits) - 1
    step = (parts.amax(-1) - parts.amin(-1)).unsqueeze(-1) / top
    plain = ((parts - parts.amin(-1, keepdim=True)) / step).round() * step + parts.amin(-1, keepdim=True)
    limit = float((plain - parts).square().mean())
    assert error < (limit if kind.offset else 1.3 * limit)


def test_importance_moves_error_to_inputs_that_do_not_count() -> None:
    dense, importance = weight(16, 256), torch.ones(256)
    importance[::4] = 100.0
    for kind in TYPES.values():
        plain, guided = (blocks(dense, kind, mass).dequantize() - dense for mass in (None, importance))
        assert (guided.square() * importance).sum() < (plain.square() * importance).sum()


@pytest.mark.parametrize(("name", "limit"), [("Q4_1", 1.01), ("Q5_1", 1.015)])
def test_the_search_comes_close_to_brute_force_over_both_ends(name: str, limit: float) -> None:
    parts, top = weight(8).unflatten(1, (-1, 32)), (1 << TYPES[name].bits) - 1
    lowest, highest = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    best = torch.full(parts.shape[:2], torch.inf)
    for up in torch.linspace(0.5, 1.2, 71).tolist():
        for down in torch.linspace(0.5, 1.2, 71).tolist():
            step = (highest * up - lowest * down) / top
            near = ((parts - lowest * down) / step).round().clamp(0, top) * step + lowest * down
            best = torch.minimum(best, (near - parts).square().sum(-1))
    error = (blocks(weight(8), TYPES[name]).dequantize() - weight(8)).square().sum()
    assert error < limit * best.sum()


@pytest.mark.parametrize(("name", "gain"), [("Q4_1", 0.95), ("Q4_K", 0.98)])
def test_ends_that_move_by_themselves_lose_less(monkeypatch: pytest.MonkeyPatch, name: str, gain: float) -> None:
    """Than ranges that shrink as one."""
    dense = weight(32)
    free = (blocks(dense, TYPES[name]).dequantize() - dense).square().sum()

    def as_one(parts: Any) -> Iterator[tuple[Tensor, Tensor]]:
        lowest, highest = parts.weights.amin(-1).clamp(max=0), parts.weights.amax(-1).clamp(min=0)
        for share in ggml_search.SHARES:
            yield (highest - lowest) * share / 15, -lowest * share

    monkeypatch.setattr(ggml_search, "_candidates", as_one)
    assert free < gain * (blocks(dense, TYPES[name]).dequantize() - dense).square().sum()


@KINDS
def test_rows_are_searched_by_themselves(monkeypatch: pytest.MonkeyPatch, kind: BlockType) -> None:
    whole = blocks(weight(5), kind).dequantize()
    monkeypatch.setattr(ggml_search, "SLICE", 1024)
    assert torch.equal(blocks(weight(5), kind).dequantize(), whole)


@KINDS
def test_weights_that_lie_on_the_grid_are_found_again(kind: BlockType) -> None:
    once = blocks(weight(), kind).dequantize()
    again = blocks(once, kind).dequantize()
    lost, at_first = (float((one - other).square().sum()) for one, other in ((again, once), (once, weight())))
    assert lost < (0.1 if kind.size == 256 else 1e-3) * at_first, "integer scales may come out a little otherwise"


@KINDS
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_parts_of_one_number_keep_it(kind: BlockType, value: float) -> None:
    dense = torch.full((2, 256), value)
    torch.testing.assert_close(blocks(dense, kind).dequantize(), dense, rtol=2e-3, atol=0.0)


@KINDS
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4, 1.0, 1e3])
def test_weights_of_any_size_lose_no_more_than_zeros_would(kind: BlockType, size: float) -> None:
    dense = weight() * size
    assert (blocks(dense, kind).dequantize() - dense).norm() <= dense.norm()


@KINDS
@pytest.mark.parametrize("importance", [torch.zeros(512), torch.full((512,), 1e38), torch.full((512,), 1e-38)])
def test_importance_of_any_size_weighs_as_none_where_it_is_all_alike(kind: BlockType, importance: Tensor) -> None:
    assert torch.equal(blocks(weight(), kind, importance).dequantize(), blocks(weight(), kind).dequantize())


@KINDS
def test_what_is_no_number_or_has_no_scale_is_refused(kind: BlockType) -> None:
    with pytest.raises(NumericalError, match="256 of 256 weights are NaN or infinite"):
        blocks(torch.full((1, 256), torch.nan), kind)
    with pytest.raises(NumericalError, match="1 of 512 importances are NaN or infinite"):
        blocks(weight(), kind, torch.ones(512).index_fill(0, torch.tensor(3), torch.inf))
    for size in (1e5, 3e5, 5e6, 2e7, 1e9):
        try:
            assert blocks(weight() * size, kind).dequantize().isfinite().all()
        except NumericalError as error:
            assert f"have no {kind.name} scale in float16" in str(error)  # noqa: PT017
    with pytest.raises(NumericalError, match=f"no {kind.name} scale in float16"):
        blocks(weight() * 1e12, kind)
