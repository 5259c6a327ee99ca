"""Second moments of a layer's input over the calibration set.

    H = E[x xᵀ],   a = E|x|

are all that rounding and scale search need of the data: a layer's squared output error for a weight change Δ is
tr(Δ H Δᵀ). Products are accumulated in float64 (float32 from 8192 inputs on, where memory counts more), one batch at a
time, and only the upper block triangle is computed: H is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError

PANEL = 256
WIDE = 8192
"""Inputs from which on the moments are kept in float32."""


@dataclass(frozen=True)
class Moments:
    """What was seen of one input."""

    hessian: Float[Tensor, "in in"]
    mean_abs: Float[Tensor, "in"]
    num_tokens: int
    num_dropped: int
    """Tokens left out because they held a value that is not finite."""


class MomentsObserver:
    """Accumulates the moments of inputs [..., in]."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.float64 if in_features < WIDE else torch.float32
        self._gram = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self._abs = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._tokens = 0
        self._dropped = 0

    def update(self, inputs: Float[Tensor, "*batch in"]) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        magnitude = rows.abs().sum(dim=0)
        if not magnitude.isfinite().all():
            finite = rows.isfinite().all(dim=1)
            self._dropped += int((~finite).sum())
            rows = rows[finite]
            magnitude = rows.abs().sum(dim=0)
        for begin in range(0, rows.shape[1], PANEL):
            panel = rows[:, begin : begin + PANEL]
            self._gram[begin : begin + PANEL, begin:] += panel.T @ rows[:, begin:]
        self._abs += magnitude
        self._tokens += rows.shape[0]

    def result(self, expected_tokens: int, name: str = "input") -> Moments:
        """The moments. Raises NumericalError where tokens are missing or nothing but zeros was seen."""
        seen = self._tokens + self._dropped
        if seen != expected_tokens:
            raise NumericalError(f"{name}: saw {seen} calibration tokens, {expected_tokens} went in")
        if not self._tokens:
            raise NumericalError(f"{name}: none of its {seen} calibration inputs is finite")
        hessian = self._gram.triu().div_(self._tokens)
        hessian += hessian.triu(1).T
        if not hessian.diagonal().sum() > 0:
            raise NumericalError(f"{name}: every calibration input is zero")
        return Moments(hessian, (self._abs / self._tokens).float(), self._tokens, self._dropped)
