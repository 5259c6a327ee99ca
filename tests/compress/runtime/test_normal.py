from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.core.floats import quantize_float
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import NF4
from compress.runtime.normal import NormalLinear


def quantized(rows: int, columns: int = 192) -> QuantizedTensor:
    return quantize_float(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), NF4, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 17, 3000])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_it_computes_with_the_dequantized_weight(rows: int, shape: tuple[int, ...], biased: bool) -> None:
    weight, bias = quantized(rows), torch.randn(rows) if biased else None
    x = torch.randn(*shape, 192)
    layer = NormalLinear.from_quantized(weight, bias)
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize(), bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_weight_is_the_one_that_was_packed(dtype: torch.dtype) -> None:
    weight = quantized(33)
    layer = NormalLinear.from_quantized(weight, dtype=dtype)
    assert torch.equal(layer.dequantize(dtype), weight.dequantize(dtype))


def test_codes_keep_four_bits() -> None:
    assert NormalLinear.from_quantized(quantized(10)).codes.nbytes == 10 * 192 // 2


def test_it_says_its_scheme() -> None:
    assert "nf4, group_size=64" in NormalLinear.from_quantized(quantized(3)).extra_repr()
