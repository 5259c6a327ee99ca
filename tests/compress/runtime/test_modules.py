"""A quantized layer is a linear layer, only smaller."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.runtime.modules import QuantLinear, SharedInput


def quantized(grid: Grid, rows: int = 64, columns: int = 256) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(grid.bits)
    groups = grid.num_groups(columns)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) - 0.5).to(torch.bfloat16)
    zeros = torch.randint(grid.qmin, grid.qmax + 1, (rows, groups), generator=generator, dtype=torch.int8)
    return QuantizedTensor(codes, scale, None if grid.symmetric else zeros, grid)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GRIDS = [Grid(bits, symmetric, size) for bits in (2, 4, 8) for symmetric in (True, False) for size in (None, 64)]


@pytest.mark.parametrize("grid", GRIDS)
def test_in_float32_it_equals_the_linear_layer_with_the_dequantized_weight(grid: Grid) -> None:
    weight, bias, x = quantized(grid), randn(64), randn(2, 3, 256)
    y = QuantLinear.from_quantized(weight, bias, dtype=torch.float32)(x)
    torch.testing.assert_close(y, F.linear(x, weight.dequantize(), bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_in_bfloat16_it_agrees_to_the_rounding_of_bfloat16(grid: Grid) -> None:
    weight, x = quantized(grid), randn(2, 3, 256).to(torch.bfloat16)
    y = QuantLinear.from_quantized(weight, dtype=torch.bfloat16)(x)
    exact = F.linear(x.float(), weight.dequantize())
    assert (y.float() - exact).norm() < 2**-8 * exact.norm()


def test_in_float32_it_dequantizes_to_the_very_same_weight() -> None:
    weight = quantized(Grid(3, symmetric=False, group_size=32))
    assert torch.equal(QuantLinear.from_quantized(weight).dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "bytes_per_weight"), [(2, 0.5), (4, 0.5), (5, 1.0), (8, 1.0)])
def test_it_keeps_nothing_but_codes_and_scales(bits: int, bytes_per_weight: float, dtype: torch.dtype) -> None:
    layer = QuantLinear.from_quantized(quantized(Grid(bits, True, 128), 64, 1024), dtype=dtype)
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert held <= 64 * 1024 * (bytes_per_weight + 4 / 128)


def test_it_shows_its_scheme_and_backend() -> None:
    shown = repr(QuantLinear.from_quantized(quantized(Grid(4, True, 64))))
    assert "w4a16, group_size=64, backend=reference" in shown


def test_moved_to_another_type_it_says_to_load_again() -> None:
    layer = QuantLinear.from_quantized(quantized(Grid(4, True, 64)), dtype=torch.bfloat16)
    if layer.backend == "reference":
        pytest.skip("this machine has no kernel that insists on a type")
    with pytest.raises(ValueError, match="Load the model again"):
        layer.to(torch.float32)(randn(1, 256))


def shared() -> SharedInput:
    return SharedInput(QuantLinear.from_quantized(quantized(Grid(4, True, 64))), [32, 16, 16])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0, 2)])
def test_layers_on_one_input_give_what_each_gives_alone_in_any_order(order: tuple[int, ...]) -> None:
    group = shared()
    parts = group.parts()
    for x in (randn(2, 3, 256), randn(1, 256)):
        for index in order:
            torch.testing.assert_close(parts[index](x), F.linear(x, parts[index].dequantize()), rtol=1e-5, atol=1e-4)


def test_layers_on_one_input_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group, calls = shared(), []
    forward = group.linear.forward
    monkeypatch.setattr(group.linear, "forward", lambda x: calls.append(x) or forward(x))
    for x in (randn(1, 256), randn(1, 256)):
        for part in group.parts():
            part(x)
    assert len(calls) == 2


def test_a_new_input_is_never_answered_with_what_waits_for_the_last_one() -> None:
    first, second, _ = shared().parts()
    first(randn(1, 256))
    x = 2 * randn(1, 256)
    torch.testing.assert_close(second(x), F.linear(x, second.dequantize()), rtol=1e-5, atol=1e-4)


def test_nothing_is_kept_once_every_layer_has_its_output() -> None:
    group, x = shared(), randn(1, 256)
    held = weakref.ref(x)
    for part in group.parts():
        part(x)
    del x
    assert held() is None
