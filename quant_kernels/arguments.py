"""What operators check of a tensor before they hand its address to a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def expect(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: Sequence[int | None], device: torch.device
) -> None:
    """Raise ValueError unless the tensor is one of `dtypes`, of `shape` (None: any length), contiguous, on `device`."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}. Call .to()")
    if tensor.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has shape {[*tensor.shape]}, expected [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, which are not contiguous. Call .contiguous()")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x on {device}. Move one of them")
