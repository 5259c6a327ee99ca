"""Hadamard transform of activations, in runs of a power of two: what a rotation leaves to do while a model runs.

    y[t, r · size + j] = Σ_i x[t, r · size + i] · H[i, j],     H = Sylvester's matrix / √size, its own inverse

x: float16, bfloat16 or float32 [tokens, channels], contiguous; size: a power of two that divides channels, at most
MOST. The result has the type of x. Sums are float32 and rounded once.

A program takes some runs whole, into registers: log₂(size) times, pairs that lie 1, 2, 4, … apart become their sum and
their difference. Memory is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import library
from quant_kernels.arguments import FLOATS, expect
from quant_kernels.gate import Gate, Variant

MOST = 4096
"""Numbers of a run that a program holds."""
NUMBERS = 4096
"""Of a program, in as many runs as it takes."""


def hadamard_reference(x: Tensor, size: int) -> Tensor:
    """In float32, by butterflies."""
    y = x.float().reshape(-1, size)
    half = 1
    while half < size:
        a, b = y.unflatten(1, (-1, 2, half)).unbind(2)
        y = torch.stack([a + b, a - b], dim=2).flatten(1)
        half *= 2
    return (y * size**-0.5).to(x.dtype).view_as(x)


@triton.jit
def _hadamard_kernel(  # type: ignore[no-untyped-def]
    x, y, runs, factor, SIZE: tl.constexpr, LOG: tl.constexpr, RUNS: tl.constexpr
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    at = run[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (run < runs)[:, None]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    for step in tl.static_range(LOG):
        pairs = tl.permute(tl.reshape(value, (RUNS * SIZE // 2 // 2**step, 2, 2**step)), (0, 2, 1))
        a, b = tl.split(pairs)
        pairs = tl.join(a + b, a - b)
        value = tl.reshape(tl.permute(pairs, (0, 2, 1)), (RUNS, SIZE))
    tl.store(y + at, (value * factor).to(y.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, size: int) -> Tensor:
    """x [tokens, channels] transformed in runs of `size`. Raises ValueError where the size does not suit."""
    expect("x", x, FLOATS, [None, None], x.device)
    channels = x.shape[1]
    if size < 1 or size & (size - 1) or size > MOST or channels % size:
        raise ValueError(f"size={size} must be a power of two up to {MOST} that divides the {channels} channels of x")
    y = torch.empty_like(x)
    runs = x.numel() // size
    if runs:
        each = max(1, NUMBERS // size)
        grid = (triton.cdiv(runs, each),)
        _hadamard_kernel[grid](x, y, runs, size**-0.5, SIZE=size, LOG=size.bit_length() - 1, RUNS=each, num_warps=4)
    return y


library.register(
    "hadamard(Tensor x, int size) -> Tensor",
    launch=hadamard,
    reference=hadamard_reference,
    fake=lambda x, size: torch.empty_like(x),
)


def gates() -> tuple[Gate, ...]:
    """Sizes from small to the largest, for bfloat16."""
    made = []
    for capability in (80, 90):
        for size in (64, 512, MOST):
            constants = {"SIZE": size, "LOG": size.bit_length() - 1, "RUNS": NUMBERS // size}
            signature = {"x": "*bf16", "y": "*bf16", "runs": "i32", "factor": "fp32"}
            variant = Variant(_hadamard_kernel, signature, constants, ("x", "y"), num_warps=4, num_stages=1)
            made.append(Gate(f"hadamard {size}", variant, capability, "", representative=size == 512))
    return tuple(made)
