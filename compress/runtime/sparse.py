"""Linear layers whose weights are 2:4 sparse: on sparse tensor cores where torch can use them, dense elsewhere.

torch has two kernels: cuSPARSELt, which comes with its CUDA builds, and one from CUTLASS, for compute capability 8.x
only (pytorch/pytorch#132928). Both take float16 and bfloat16, of weights whose sizes are multiples of `MULTIPLES`;
torch pads tokens to eight. They save half of the weight's memory, and arithmetic, of which long prompts and many users
need much; a step of decoding gains nothing and may lose (pytorch/pytorch#111339).
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from compress.errors import first_line

MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
"""By kernel: what out and in must be multiples of, in 16 bits."""


class SparseLinear(nn.Linear):
    """`y = x · Wᵀ + bias` with W 2:4 sparse; `backend` says what multiplies: cusparselt, cutlass or dense.

    A sparse weight is compressed for one device and type. To run on another, load the model again.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=bias is not None, device="meta")
        self.backend, _ = backend_for((out_features, in_features), dtype, str(device))
        self.weight = _frozen(_compressed(weight.to(device, dtype), self.backend))
        if bias is not None:
            self.bias = _frozen(bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 2:4, backend={self.backend}"


def backend_for(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[str, str]:
    """What multiplies with a 2:4 weight [out, in] in `dtype` on `device`, and why."""
    if torch.device(device).type != "cuda":
        return "dense", "sparse tensor cores are in GPUs of compute capability 8.0 and above"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return "dense", f"sparse tensor cores came with compute capability 8.0, this GPU has {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "dense", f"torch multiplies 2:4 weights in float16 and bfloat16, not in {dtype}"
    kernel = "cusparselt" if torch.backends.cusparselt.is_available() else "cutlass"
    if kernel == "cutlass" and major != 8:
        return "dense", f"this torch has no cuSPARSELt, and its other kernel is for 8.x, this GPU has {major}.{minor}"
    if any(size % multiple for size, multiple in zip(shape, MULTIPLES[kernel], strict=True)):
        return "dense", f"{kernel} takes weights of multiples of {MULTIPLES[kernel]}, this one has {shape}"
    if failure := _failure(kernel, dtype, device):
        return "dense", f"{kernel} fails here: {failure}"
    return kernel, "zeros are skipped by sparse tensor cores"


@cache
def _failure(kernel: str, dtype: torch.dtype, device: str) -> str:
    """What the kernel says when it is tried on this device, nothing where it runs."""
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype, device=device).tile(128, 32)
    try:
        F.linear(weight[:3], _compressed(weight, kernel)).sum().item()
    except RuntimeError as error:
        return first_line(error)
    return ""


def _compressed(weight: Tensor, kernel: str) -> Any:
    """The weight as the kernel takes it."""
    if kernel == "dense":
        return weight
    form = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }[kernel]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        return form.from_dense(weight.contiguous())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
