"""Schemes: which number grid a tensor is rounded to, and which elements share a scale.

A *grid* is the levels of one element (`int4`, `fp8`) and its granularity: which elements share a scale. It serves
weights [out, in] and a layer's inputs [tokens, in] alike, where a row is an output channel or a token. A *scheme* is
the grids of both: `w4a16` has 4-bit weights and leaves inputs alone, `w8a8` rounds them to int8 while the model runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

WEIGHT_BITS = range(2, 9)
INPUT_BITS = (4, 8)
FLOAT_MAX = {8: 448.0, 4: 6.0}
"""The largest E4M3 and E2M1."""

GroupSize = int | Literal["auto"] | None
"""What a recipe may say: columns that share a scale, null for one scale per row, or `auto` for what is usual."""


@dataclass(frozen=True)
class Grid:
    """Levels and granularity of a tensor of shape [rows, columns], `value = (code - zero_point) · scale`.

    Integer codes and zero points are signed: `qmin = -2^(bits-1) … qmax = 2^(bits-1) - 1`. Float codes are E4M3 at 8
    bits, E2M1 at 4, and have no zero point. Codes of NormalFloat count its levels, from 0 (`compress.core.
    normal_float`): `value = LEVELS[code] · scale`.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    """Columns that share one scale; None: a whole row."""
    kind: Literal["int", "float", "normal"] = "int"
    scale: Literal["float", "e4m3", "e8m0"] = "float"
    """What scales are stored in: the weight's own type, E4M3 beside one float32 per tensor, or powers of two."""
    rows: int | None = 1
    """Rows that share one scale; None: all of them."""

    @property
    def qmin(self) -> float:
        if self.kind == "normal":
            return 0
        return -FLOAT_MAX[self.bits] if self.kind == "float" else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> float:
        if self.kind == "normal":
            return (1 << self.bits) - 1
        return FLOAT_MAX[self.bits] if self.kind == "float" else (1 << (self.bits - 1)) - 1

    @property
    def overall(self) -> bool:
        """Whether one number holds for the whole tensor: its only scale, or what all scales are relative to."""
        return self.rows is None or self.scale == "e4m3"

    @property
    def format(self) -> str:
        """`int4`, `fp8`, `nvfp4`, `mxfp4`, `nf4`."""
        if self.kind != "float":
            return f"{'int' if self.kind == 'int' else 'nf'}{self.bits}"
        return {"float": "fp", "e4m3": "nvfp", "e8m0": "mxfp"}[self.scale] + str(self.bits)

    def num_groups(self, columns: int) -> int:
        """Scales per row. Raises ValueError where the groups do not divide the row."""
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ValueError(f"in_features={columns} is not a multiple of group_size={self.group_size}")
        return columns // self.group_size

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a tensor [rows, columns]."""
        shared = self.rows or rows
        return -(-rows // shared), self.num_groups(columns)


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized."""

    weights: Grid
    inputs: Grid | None = None
    """None: inputs keep their precision. A scale for all tokens is fixed by calibration; any other follows the data."""

    @property
    def local(self) -> bool:
        """Whether groups of inputs have scales of their own under one scale for all."""
        return self.inputs is not None and self.inputs.scale == "e4m3"

    @property
    def static(self) -> bool:
        """Whether calibration fixes a scale of the inputs, which is then part of the checkpoint."""
        return self.inputs is not None and self.inputs.overall

    @property
    def name(self) -> str:
        """What a recipe calls it, the granularity of weights left out."""
        return next((name for name, scheme in FIXED_SCHEMES.items() if scheme == self), None) or (
            f"w{self.weights.bits}a{self.inputs.bits if self.inputs else 16}"
            f"{'-fp8' if self.inputs and self.inputs.kind == 'float' else ''}{'-static' if self.static else ''}"
        )


FP8 = Grid(8, kind="float")
NVFP4 = Grid(4, group_size=16, kind="float", scale="e4m3")
MXFP4 = Grid(4, group_size=32, kind="float", scale="e8m0")
FP8_TENSOR = Grid(8, kind="float", rows=None)
NF4 = Grid(4, group_size=64, kind="normal")

FLOAT_SCHEMES = {
    "fp8": Scheme(FP8, FP8),
    "fp8-static": Scheme(FP8_TENSOR, FP8_TENSOR),
    "fp8-block": Scheme(Grid(8, group_size=128, kind="float", rows=128), Grid(8, group_size=128, kind="float")),
    "fp8a16": Scheme(FP8),
    "nvfp4": Scheme(NVFP4, NVFP4),
    "nvfp4a16": Scheme(NVFP4),
    "mxfp4": Scheme(MXFP4, MXFP4),
    "mxfp4a16": Scheme(MXFP4),
}
"""Schemes whose weights are floats."""
FIXED_SCHEMES = {**FLOAT_SCHEMES, "nf4": Scheme(NF4)}
"""Schemes about which nothing is left to choose."""


def parse_scheme(name: str, group_size: GroupSize = "auto", symmetric: bool = True) -> Scheme:
    """The scheme a recipe names, `w4a16`, `w8a8`, `w8a8-static`, `w4a8-fp8` or one of `FIXED_SCHEMES`.

    Raises ValueError with the names that exist, or with what does not go together.
    """
    if group_size not in ("auto", None) and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size={group_size} must be at least 1, or null for one scale per output channel")
    if name in FIXED_SCHEMES:
        scheme = FIXED_SCHEMES[name]
        if group_size not in ("auto", scheme.weights.group_size) or not symmetric:
            raise ValueError(f"scheme {name} is symmetric and has its own group_size={scheme.weights.group_size}")
        return scheme
    match = re.fullmatch(r"w(\d+)a(\d+)(-static|-fp8)?", name)
    bits, inputs, suffix = (int(match[1]), int(match[2]), match[3]) if match else (0, 0, None)
    known = bits in WEIGHT_BITS and (inputs in INPUT_BITS if suffix is None else inputs == 8)
    if not known and not (bits in WEIGHT_BITS and inputs == 16 and suffix is None):
        names = [f"w{WEIGHT_BITS[0]}a16 … w{WEIGHT_BITS[-1]}a16", "the same with a8, a4, a8-static, a8-fp8"]
        raise ValueError(f"unknown scheme {name!r}; there are {', '.join([*names, *FIXED_SCHEMES])}")
    if group_size == "auto":
        group_size = None if bits == 8 and inputs < 16 else 128
    weights = Grid(bits, symmetric, group_size)
    if inputs == 16:
        return Scheme(weights)
    kind: Literal["int", "float"] = "float" if suffix == "-fp8" else "int"
    return Scheme(weights, Grid(inputs, kind=kind, rows=None if suffix == "-static" else 1))
