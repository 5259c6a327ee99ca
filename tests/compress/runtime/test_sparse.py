from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.core.sparsity import Pattern, keep_largest
from compress.runtime.sparse import SparseLinear, backend_for


def sparse(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(keep_largest(weight.float().abs(), Pattern(n=2, m=4)), weight, 0)


@pytest.mark.parametrize("bias", [None, torch.randn(48)])
def test_without_a_gpu_it_is_the_dense_layer(bias: Tensor | None) -> None:
    weight, x = sparse(48, 64, torch.float32), torch.randn(2, 3, 64)
    layer = SparseLinear(weight, bias)
    assert layer.backend == "dense"
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("capability", "cusparselt", "dtype", "shape", "told"),
    [
        ((7, 5), True, torch.float16, (64, 64), "came with compute capability 8.0, this GPU has 7.5"),
        ((9, 0), True, torch.float32, (64, 64), "in float16 and bfloat16, not in torch.float32"),
        ((9, 0), False, torch.float16, (64, 64), "no cuSPARSELt, and its other kernel is for 8.x, this GPU has 9.0"),
        ((9, 0), True, torch.float16, (64, 172), r"cusparselt takes weights of multiples of (16, 16)"),
        ((8, 6), False, torch.float16, (64, 96), r"cutlass takes weights of multiples of (32, 64)"),
    ],
)
def test_where_no_kernel_takes_a_layer_it_says_why(
    capability: tuple[int, int], cusparselt: bool, dtype: torch.dtype, shape: tuple[int, int], told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    backend, why = backend_for(shape, dtype, "cuda")
    assert backend == "dense"
    assert told in why


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.randn(512)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 128])
def test_sparse_tensor_cores_compute_what_the_dense_layer_does(
    tokens: int, bias: Tensor | None, dtype: torch.dtype
) -> None:
    backend, why = backend_for((512, 256), dtype, "cuda")
    if backend == "dense":
        pytest.skip(why)
    weight, x = sparse(512, 256, dtype), torch.randn(1, tokens, 256).to(dtype)
    layer = SparseLinear(weight, bias, dtype=dtype, device="cuda")
    with torch.inference_mode():
        y = layer(x.cuda()).cpu().float()
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.to(dtype).float())
    assert layer.backend == backend
    assert (y - exact).norm() < 0.01 * exact.norm()
