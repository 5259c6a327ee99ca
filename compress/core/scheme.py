"""Schemes: which number grid a tensor is rounded to, and which elements share a scale.

A *format* is the grid of one element (`int4`); a *granularity* says which elements share a scale (one per
output channel, or one per `group_size` consecutive input columns); a *scheme* names the formats of weights and
activations together (`w4a16`: 4-bit weights, 16-bit activations).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WEIGHT_BITS = range(2, 9)


@dataclass(frozen=True)
class Grid:
    """An integer grid for weights of shape [out, in], `w = (code - zero_point) · scale`.

    Codes and zero points are signed: `qmin = -2^(bits-1) … qmax = 2^(bits-1) - 1`.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    """Input columns that share one scale; None: one scale per output channel."""

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def format(self) -> str:
        return f"int{self.bits}"

    @property
    def scheme(self) -> str:
        """The scheme's name for weight-only quantization, `w4a16`."""
        return f"w{self.bits}a16"

    def num_groups(self, in_features: int) -> int:
        """Scales per row. Raises ValueError where the groups do not divide the row."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"in_features={in_features} is not a multiple of group_size={self.group_size}")
        return in_features // self.group_size


def parse_scheme(name: str) -> int:
    """The weight bits of a weight-only scheme name. Raises ValueError with the names that exist."""
    match = re.fullmatch(r"w(\d+)a16", name)
    if not match or int(match[1]) not in WEIGHT_BITS:
        known = " ".join(f"w{bits}a16" for bits in WEIGHT_BITS)
        raise ValueError(f"unknown scheme {name!r}; there are {known}")
    return int(match[1])
