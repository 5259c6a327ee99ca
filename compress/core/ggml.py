"""ggml's block types: how llama.cpp stores weights, in blocks that carry their own scales.

Simple types have blocks of 32 weights along the inputs, with scales in float16, d and m:

    type   codes        weight         bytes: then come
    Q4_0   u, 4 bits    d (u - 8)      d, 16 nibble pairs
    Q4_1   u, 4 bits    d u + m        d, m, 16 nibble pairs
    Q5_0   u, 5 bits    d (u - 16)     d, 32 fifth bits, 16 nibble pairs
    Q5_1   u, 5 bits    d u + m        d, m, 32 fifth bits, 16 nibble pairs
    Q8_0   q, 8 bits    d q            d, 32 int8

A pair holds element i in its low and i + 16 in its high nibble. A symmetric grid of ours, w = scale · code, is one of
the `_0` types exactly, where scales are float16 numbers and shared by 32 weights or a multiple of them; an asymmetric
one becomes a `_1` type with m = -d · zero rounded to float16.

K types have blocks of 256, and the scales of their parts are integers themselves:

    Q4_K   u, 4 bits    d s u - e n    d, e (float16), 8 pairs s, n of 6 bits, nibble pairs of 64
    Q5_K   u, 5 bits    d s u - e n    the same, 256 fifth bits before the nibbles
    Q6_K   u, 6 bits    d s (u - 32)   low nibbles, upper 2 bits, 16 int8 s (parts of 16), d

`compress.core.ggml_search` finds codes and scales for weights; `from_grid` takes those that there are.

Layouts: https://github.com/ggml-org/ggml (ggml-quants), as `formats` there has them in 2025 and 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types."""

    name: str
    number: int
    """In files."""
    size: int
    """Weights in a block."""
    bytes: int
    """Of a block."""
    bits: int
    offset: bool
    """Whether a range may lie anywhere (`d u + m`, `d s u - e n`), or is centred on 0."""

    @property
    def part(self) -> int:
        """Weights that share a scale."""
        return 32 if self.size == 32 or self.offset else 16


TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 2, 32, 18, 4, False),
        BlockType("Q4_1", 3, 32, 20, 4, True),
        BlockType("Q5_0", 6, 32, 22, 5, False),
        BlockType("Q5_1", 7, 32, 24, 5, True),
        BlockType("Q8_0", 8, 32, 34, 8, False),
        BlockType("Q4_K", 12, 256, 144, 4, True),
        BlockType("Q5_K", 13, 256, 176, 5, True),
        BlockType("Q6_K", 14, 256, 210, 6, False),
    )
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Where rows are no multiple of 256, as llama.cpp has it."""


def type_for(name: str, columns: int) -> BlockType | None:
    """The type that rows of so many columns can have, when `name` is asked for; None: only whole numbers do."""
    for found in (name, FALLBACK.get(name, "")):
        if found in TYPES and columns % TYPES[found].size == 0:
            return TYPES[found]
    return None


def types_said(counts: Mapping[str, int]) -> str:
    """How many layers have which type."""
    return ", ".join(f"{count} as {name}" for name, count in counts.items())


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix in one type: unsigned codes, and the numbers that are stored beside them.

    Simple types have `scale` d and `shift` m, one a part. K types have integer `scales` s and `mins` n of each part,
    and `scale` d and `shift` e of each block.
    """

    kind: BlockType
    codes: UInt8[Tensor, "rows parts size"]
    scale: Float[Tensor, "rows blocks"]
    shift: Float[Tensor, "rows blocks"] | None = None
    scales: Int[Tensor, "rows parts"] | None = None
    mins: Int[Tensor, "rows parts"] | None = None

    def by_rows(self, moved: Callable[[Tensor], Tensor]) -> Blocks:
        """The matrix whose rows are elsewhere, of all parts alike."""
        parts = (self.codes, self.scale, self.shift, self.scales, self.mins)
        return Blocks(self.kind, *(None if part is None else moved(part) for part in parts))  # type: ignore[arg-type]

    @staticmethod
    def stacked(slices: Sequence[Blocks]) -> Blocks:
        """The matrix whose rows are those of several."""
        first, *others = slices
        if not others:
            return first
        return Blocks(
            first.kind,
            *(
                None
                if getattr(first, field.name) is None
                else torch.cat([getattr(each, field.name) for each in slices])
                for field in fields(first)[1:]
            ),  # type: ignore[arg-type]
        )

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The weight, in float32."""
        step, low = steps(self)
        bottom, _ = levels(self.kind)
        return ((self.codes.float() + bottom) * step.unsqueeze(-1) - low.unsqueeze(-1)).flatten(1)


EXACT = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
"""Bits and symmetry of an integer grid → the type that holds its codes as they are."""


def type_of_grid(grid: Grid, columns: int) -> BlockType | None:
    """The type that holds such codes as they are, where float16 holds their scales; None: there is none."""
    name = EXACT.get((grid.bits, grid.symmetric)) if grid.kind == "int" and grid.rows == 1 else None
    return TYPES[name] if name and columns % 32 == 0 and (grid.group_size or columns) % 32 == 0 else None


def from_grid(tensor: QuantizedTensor) -> Blocks | None:
    """Our codes as one of the simple types; None where groups, bits or scales do not permit that.

    Symmetric grids lose nothing. Of an asymmetric one the product of scale and zero point is rounded to float16.
    """
    grid, scale = tensor.grid, tensor.scale.half()
    kind = type_of_grid(grid, tensor.shape[1])
    if kind is None or not torch.equal(scale.float(), tensor.scale.float()):
        return None
    lowest = 1 << grid.bits - 1
    codes = (tensor.codes.to(torch.int16) + lowest).to(torch.uint8).unflatten(1, (-1, 32))
    repeats = codes.shape[1] // scale.shape[1]
    shift = None
    if tensor.zero_point is not None:
        shift = (-scale.float() * (tensor.zero_point.float() + lowest)).half().repeat_interleave(repeats, dim=1)
        if not shift.isfinite().all():
            return None
    return Blocks(kind, codes, scale.repeat_interleave(repeats, dim=1), shift)


def levels(kind: BlockType) -> tuple[int, int]:
    """The lowest and the highest code, as a number that a step is multiplied by."""
    top = (1 << kind.bits) - 1
    if kind.offset:
        return 0, top
    return -(1 << kind.bits - 1), (1 << kind.bits - 1) - 1


def nonzero(value: Tensor) -> Tensor:
    """1 for 0: a step by which nothing is divided away."""
    return torch.where(value == 0, torch.ones_like(value), value)


def steps(found: Blocks) -> tuple[Float[Tensor, "rows parts"], Float[Tensor, "rows parts"]]:
    """What a level is multiplied by, and what is subtracted then, of every part, as they are stored."""
    kind, scale = found.kind, found.scale.float()
    shift = torch.zeros_like(scale) if found.shift is None else found.shift.float()
    if kind.size == 32:
        return scale, -shift
    assert found.scales is not None, "K types have scales of scales"
    per_block = kind.size // kind.part
    mins = torch.zeros_like(found.scales) if found.mins is None else found.mins
    wide_scale, wide_shift = (value.repeat_interleave(per_block, dim=1) for value in (scale, shift))
    return wide_scale * found.scales, wide_shift * mins
