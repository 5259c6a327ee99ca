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


def group_size_of(scale: Tensor, inputs: int) -> int:
    """Inputs that share a scale of [groups, outputs], 0: all. Raises ValueError unless kernels have such groups."""
    groups = scale.shape[0]
    if not groups or not inputs or inputs % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide the {inputs} inputs of x. Pad the weight")
    group_size = inputs // groups
    if groups > 1 and group_size not in (32, 64) and group_size % 128:
        raise ValueError(f"scale has groups of {group_size} inputs: 32, 64, multiples of 128 or all {inputs} can be. "
                         "Repeat scales to make groups smaller")  # fmt: skip
    return group_size if groups > 1 else 0
