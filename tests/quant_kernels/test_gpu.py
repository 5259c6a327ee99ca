"""The GPU's kernels behind the package's one contract; without a GPU in Triton's interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant_kernels import Packed, choose, gpu, linear, pack, reference
from quant_kernels.dispatch import KERNELS
from quant_kernels.library import INTERPRETED

KERNEL = {
    kernel.name: kernel
    for kernel in KERNELS
    if kernel.devices == ("cuda",) and kernel.levels == ("int",) and kernel.inputs is None
}
BITS = {2: "gpu_int4", 3: "gpu_int4", 4: "gpu_int4", 8: "gpu_int8"}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs on the GPU itself here, in the tests marked gpu")
both = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
every = pytest.mark.parametrize("bits", BITS)


def weight(
    bits: int, rows: int, columns: int, group_size: int | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    generator = torch.Generator().manual_seed(rows + columns)
    groups, limit = columns // (group_size or columns), 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) - 0.5).to(torch.float16) / limit
    zero_point = torch.randint(-limit, limit, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, scale, None if symmetric else zero_point, bits


def error(y: Tensor, x: Tensor, plain: Packed, bias: Tensor | None = None) -> float:
    exact = reference.linear_reference(x.double(), plain, None if bias is None else bias.double())
    return float((y.cpu().double() - exact).norm() / exact.norm())


def test_every_kernel_of_the_table_is_tested_here() -> None:
    assert KERNEL.keys() == {*BITS.values()}


@interpreted
@every
@both
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(70, 256, 128), (64, 96, 32), (3, 100, None)])
def test_every_route_computes_what_the_reference_computes(
    bits: int, rows: int, columns: int, group_size: int | None, symmetric: bool
) -> None:
    plain_weight = weight(bits, rows, columns, group_size, symmetric)
    packed = KERNEL[BITS[bits]].pack(*plain_weight)
    plain = reference.pack(*plain_weight)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    bias = torch.ones(rows, dtype=torch.float16)
    for route in KERNEL[BITS[bits]].routes:
        assert error(route.linear(x, packed, bias), x, plain, bias) < 1e-3, route.summary


@every
def test_a_code_takes_as_many_bits_as_it_has(bits: int) -> None:
    packed = KERNEL[BITS[bits]].pack(*weight(bits, 128, 512, 128, symmetric=True))
    assert 8 * packed.codes.nbytes == bits * 128 * 512


@every
@both
def test_rows_are_dequantized_as_packed(bits: int, symmetric: bool) -> None:
    plain_weight = weight(bits, 130, 256, 64, symmetric)
    packed = KERNEL[BITS[bits]].pack(*plain_weight)
    plain = reference.pack(*plain_weight)
    for start, stop in ((0, 64), (64, 130), (0, 130)):
        expected = reference.dequantize_rows(plain, start, stop, torch.float32)
        assert torch.equal(KERNEL[BITS[bits]].dequantize_rows(packed, start, stop, torch.float32), expected)


@every
def test_the_table_gives_layers_on_a_gpu_to_it(bits: int) -> None:
    usual = {"bits": bits, "symmetric": True, "dtype": torch.bfloat16, "device": "cuda", "in_features": 512}
    assert choose(**usual, group_size=128, out_features=512).name == BITS[bits]  # type: ignore[arg-type]
    assert choose(**usual, group_size=16, out_features=512).name == "reference"  # type: ignore[arg-type]


@pytest.mark.gpu
@every
@pytest.mark.parametrize("tokens", [1, 17, 200, gpu.MOST_TOKENS + 1])
def test_a_layer_on_the_device_computes_what_the_reference_computes(bits: int, tokens: int) -> None:
    codes, scale, zero_point, _ = weight(bits, 512, 1024, 128, symmetric=False)
    packed = pack(codes, scale, zero_point, bits=bits, dtype=torch.bfloat16, device="cuda")
    assert packed.kernel == BITS[bits]
    x = torch.randn(tokens, 1024).to(torch.bfloat16)
    assert error(linear(x.cuda(), packed), x, reference.pack(codes, scale, zero_point, bits)) < 5e-3
