from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.inputs import nearest_level
from compress.core.normal_float import LEVELS, block_maximum, block_scale, codes_of, dequantize, nearest_codes
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import NF4


def weight() -> Tensor:
    return torch.randn(96, 256, generator=torch.Generator().manual_seed(0))


def test_the_largest_of_a_block_and_zero_are_levels() -> None:
    assert {-1.0, 0.0, 1.0} <= set(LEVELS)
    assert list(LEVELS) == sorted(LEVELS)


def test_every_weight_goes_to_the_nearest_level() -> None:
    scale = block_maximum(weight())
    relative = weight().view(96, 4, 64) / scale.unsqueeze(-1)
    levels = torch.tensor(LEVELS)[nearest_codes(weight(), scale).long()].view_as(relative)
    nearest = (relative.unsqueeze(-1) - torch.tensor(LEVELS)).abs().amin(dim=-1)
    assert torch.allclose((relative - levels).abs(), nearest, atol=1e-6)


def test_levels_and_codes_say_the_same() -> None:
    relative = torch.linspace(-1.2, 1.2, 1001).view(7, 143)
    levels = nearest_level(relative.clone(), NF4)
    codes = codes_of(levels)
    assert torch.equal(torch.tensor(LEVELS)[codes.long()], levels)
    assert torch.equal(codes, nearest_codes(relative, torch.ones(7, 1)))
    assert (codes.min(), codes.max()) == (NF4.qmin, NF4.qmax)


def test_a_quantized_tensor_looks_its_levels_up() -> None:
    scale = block_maximum(weight())
    codes = nearest_codes(weight(), scale)
    assert torch.equal(QuantizedTensor(codes, scale, None, NF4).dequantize(), dequantize(codes, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_magnitude_of_a_block_is_met_exactly(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    scale = block_scale(w, dtype, search=False)
    kept = dequantize(nearest_codes(w, scale), scale).view(96, 4, 64).abs().amax(dim=-1)
    assert torch.equal(kept, block_maximum(w))


def test_blocks_of_zeros_stay_zero() -> None:
    w = weight()
    w[:, :64] = 0
    scale = block_scale(w, torch.bfloat16)
    assert (dequantize(nearest_codes(w, scale), scale)[:, :64] == 0).all()


def test_blocks_that_do_not_divide_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features=100 is not a multiple of group_size=64"):
        block_maximum(torch.ones(2, 100))
