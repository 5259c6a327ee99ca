"""The GPU's kernels behind the package's one contract; without a GPU in Triton's interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import choose, gpu, linear, pack, reference
from quant_kernels.library import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs on the GPU itself here, in the tests marked gpu")


def weight(rows: int, columns: int, group_size: int | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows + columns)
    groups = columns // (group_size or columns)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) - 0.5).to(torch.float16)
    zero_point = torch.randint(-8, 8, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, scale, None if symmetric else zero_point


@interpreted
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(70, 256, 128), (64, 96, 32), (3, 100, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_computes_what_the_reference_computes(
    rows: int, columns: int, group_size: int | None, symmetric: bool
) -> None:
    codes, scale, zero_point = weight(rows, columns, group_size, symmetric)
    packed = gpu.pack_int4(codes, scale, zero_point, 4)
    plain = reference.pack(codes, scale, zero_point, 4)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    bias = torch.ones(rows, dtype=torch.float16)
    exact = reference.linear_reference(x.double(), plain, bias.double())
    y = gpu.linear_int4(x, packed, bias)
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_dequantized_as_packed(symmetric: bool) -> None:
    codes, scale, zero_point = weight(130, 256, 64, symmetric)
    packed = gpu.pack_int4(codes, scale, zero_point, 4)
    plain = reference.pack(codes, scale, zero_point, 4)
    for start, stop in ((0, 64), (64, 130), (0, 130)):
        expected = reference.dequantize_rows(plain, start, stop, torch.float32)
        assert torch.equal(gpu.dequantize_int4_rows(packed, start, stop, torch.float32), expected)


def test_the_table_gives_4_bit_layers_on_a_gpu_to_it() -> None:
    usual = {"bits": 4, "symmetric": True, "dtype": torch.bfloat16, "device": "cuda", "in_features": 512}
    assert choose(**usual, group_size=128, out_features=512).name == "gpu_int4"  # type: ignore[arg-type]
    assert choose(**usual, group_size=16, out_features=512).name == "reference"  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_a_layer_on_the_device_computes_what_the_reference_computes(tokens: int) -> None:
    codes, scale, zero_point = weight(512, 1024, 128, symmetric=False)
    packed = pack(codes, scale, zero_point, bits=4, dtype=torch.bfloat16, device="cuda")
    assert packed.kernel == "gpu_int4"
    x = torch.randn(tokens, 1024).to(torch.bfloat16)
    exact = reference.linear_reference(x.double(), reference.pack(codes, scale, zero_point, 4))
    y = linear(x.cuda(), packed).cpu().double()
    assert float((y - exact).norm() / exact.norm()) < 5e-3
