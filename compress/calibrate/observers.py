"""Observers: what the calibration set leaves behind of one site's inputs.

Every layer-wise method here is satisfied by second moments: H = E[x xᵀ] prices any change of a weight exactly, and its
diagonal says which channels are large. It does not grow with the number of tokens.

Inputs are cast to float32 before they are multiplied (a float16 product overflows on real models) and added up in
float64, float32 where the matrix is too large for that. A token with a NaN or an infinity would poison every entry,
so it is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calibrate import FLOAT64_BELOW
from compress.errors import NumericalError

PANEL = 256
"""Columns per panel of the Gram matrix; only panels on and right of the diagonal are computed."""


@dataclass(frozen=True)
class Moments:
    """Second moments of one site's inputs over the calibration set."""

    hessian: Float[Tensor, "in in"]
    """E[x xᵀ], float64 below 8192 inputs, float32 from there on."""
    mean: Float[Tensor, "in"]
    """E[x], in the dtype of `hessian`."""
    num_tokens: int
    """Tokens the expectations are taken over."""
    num_dropped: int = 0
    """Tokens left out because they held a NaN or an infinity."""
    largest: Float[Tensor, "in"] | None = None
    """max|x|, where it was asked for."""
    cross: Float[Tensor, "in in"] | None = None
    """E[x x̂ᵀ], x being what the original model has where this one has x̂; where that was asked for."""


class MomentsObserver:
    """Accumulates `Moments`, batch by batch."""

    def __init__(self, in_features: int, largest: bool = False, cross: bool = False) -> None:
        dtype = torch.float64 if in_features < FLOAT64_BELOW else torch.float32
        self._gram = torch.zeros(in_features, in_features, dtype=dtype)
        self._sum = torch.zeros(in_features, dtype=dtype)
        self._cross = torch.zeros_like(self._gram) if cross else None
        self._largest = torch.zeros(in_features) if largest else None
        self._num_tokens = 0
        self._num_dropped = 0

    @torch.no_grad()
    def update(self, inputs: Float[Tensor, "*batch in"], original: Float[Tensor, "*batch in"] | None = None) -> None:
        """Add a batch; its last axis is the input channels, all others are tokens. `original`: for `cross`."""
        n = len(self._gram)
        x = inputs.reshape(-1, n)
        y = None if original is None else original.reshape(-1, n).to(x.device)
        suspicious = not x.sum().isfinite() or (y is not None and not y.sum().isfinite())  # or a 16-bit sum overflows
        x, y = x.float(), None if y is None else y.float()
        if suspicious:
            finite = x.isfinite().all(dim=1) if y is None else (x.isfinite() & y.isfinite()).all(dim=1)
            self._num_dropped += int((~finite).sum())
            x, y = x[finite], None if y is None else y[finite]
        self._gram = self._gram.to(x.device)
        self._sum = self._sum.to(x.device).add_(x.sum(dim=0))
        with _quick_products(inputs.dtype):
            for a in range(0, n, PANEL):
                self._gram[a : a + PANEL, a:] += x[:, a : a + PANEL].T @ x[:, a:]
            if self._cross is not None and y is not None:
                self._cross = self._cross.to(x.device).add_(y.T @ x)
        if self._largest is not None and len(x):
            self._largest = torch.maximum(self._largest.to(x.device), x.abs().amax(dim=0))
        self._num_tokens += len(x)

    def result(self, expected_tokens: int, name: str) -> Moments:
        """The moments of all batches seen, which ends the observation: they take over its memory.

        `name` is the layer that error messages speak of. Raises NumericalError where tokens are missing, where none
        was finite, or where all inputs were zero: a calibration that observed nothing would silently turn every
        method into round-to-nearest.
        """
        seen = self._num_tokens + self._num_dropped
        if seen != expected_tokens:
            raise NumericalError(f"{name}: observed {seen} calibration tokens instead of {expected_tokens}")
        if not self._num_tokens:
            raise NumericalError(
                f"{name}: no usable calibration token; {self._num_dropped} of {seen} held NaN or infinite inputs"
            )
        hessian = self._gram.div_(self._num_tokens)
        for a in range(0, len(hessian), PANEL):
            hessian[a + PANEL :, a : a + PANEL] = hessian[a : a + PANEL, a + PANEL :].T
        trace = float(hessian.diagonal().sum())
        if not 0 < trace < float("inf"):
            raise NumericalError(
                f"{name}: the inputs' mean energy is {trace:g} over {self._num_tokens} calibration tokens"
            )
        cross = None if self._cross is None else self._cross.div_(self._num_tokens)
        mean = self._sum.div_(self._num_tokens)
        return Moments(hessian, mean, self._num_tokens, self._num_dropped, self._largest, cross)


@contextmanager
def _quick_products(dtype: torch.dtype) -> Iterator[None]:
    """Within: values that were bfloat16 may be multiplied as such, which is exact, with sums still in float32.

    Processors with bfloat16 instructions are several times faster at it. Other dtypes are left in full precision.
    """
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
