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

`blocks` finds the codes: for each part the range of least weighted squared error (`importance`, E[x²] of each input,
or none), then scales of scales, then all parts again with the numbers that are really stored; and d and e are solved
for at the end, as codes times integer scales fix them by least squares. What is stored is what was computed with.

Layouts: https://github.com/ggml-org/ggml (ggml-quants), as `formats` there has them in 2025 and 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from compress.core.qtensor import QuantizedTensor
from compress.errors import NumericalError

SHARES = 21
"""Ranges that are tried for each part, from its own down to `NARROWEST` of it, and a little up."""
NARROWEST, WIDEST = 0.6, 1.1
ROUNDS = 3
"""Times that parts and blocks are fitted to each other."""


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

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The weight, in float32."""
        step, low = steps(self)
        bottom, _ = levels(self.kind)
        return ((self.codes.float() + bottom) * step.unsqueeze(-1) - low.unsqueeze(-1)).flatten(1)


def blocks(
    weight: Float[Tensor, "rows columns"], kind: BlockType, importance: Float[Tensor, " columns"] | None = None
) -> Blocks:
    """The matrix in this type. Raises NumericalError where a weight is not finite or no float16 scale holds it."""
    if not weight.isfinite().all():
        raise NumericalError(f"{int((~weight.isfinite()).sum())} of {weight.numel()} weights are NaN or infinite")
    parts = weight.float().unflatten(1, (-1, kind.part))
    mass = _mass(parts, importance)
    step, low = _search(parts, mass, kind)
    found = _simple(parts, mass, step, low, kind) if kind.size == 32 else _nested(parts, mass, step, low, kind)
    if not found.scale.isfinite().all():
        raise NumericalError(f"weights up to {weight.abs().max().item():g} have no {kind.name} scale in float16")
    return found


EXACT = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
"""Bits and symmetry of an integer grid → the type that holds its codes as they are."""


def from_grid(tensor: QuantizedTensor) -> Blocks | None:
    """Our codes as one of the simple types; None where groups, bits or scales do not permit that.

    Symmetric grids lose nothing. Of an asymmetric one the product of scale and zero point is rounded to float16.
    """
    grid, columns = tensor.grid, tensor.shape[1]
    name = EXACT.get((grid.bits, grid.symmetric)) if grid.kind == "int" and grid.rows == 1 else None
    scale = tensor.scale.half()
    held = name and columns % 32 == 0 and (grid.group_size or columns) % 32 == 0
    if not held or not torch.equal(scale.float(), tensor.scale.float()):
        return None
    kind, lowest = TYPES[name or ""], 1 << grid.bits - 1
    codes = (tensor.codes.to(torch.int16) + lowest).to(torch.uint8).unflatten(1, (-1, 32))
    repeats = codes.shape[1] // scale.shape[1]
    shift = None
    if tensor.zero_point is not None:
        shift = (-scale.float() * (tensor.zero_point.float() + lowest)).half().repeat_interleave(repeats, dim=1)
    return Blocks(kind, codes, scale.repeat_interleave(repeats, dim=1), shift)


def _mass(
    parts: Float[Tensor, "rows parts size"], importance: Float[Tensor, " columns"] | None
) -> Float[Tensor, "rows parts size"]:
    """What an error counts: as much as its input's energy."""
    if importance is None:
        return torch.ones_like(parts)
    energy = importance.float()
    return energy.clamp(min=float(energy.mean()) * 1e-6).view(1, -1, parts.shape[-1]).expand_as(parts)


def levels(kind: BlockType) -> tuple[int, int]:
    """The lowest and the highest code, as a number that a step is multiplied by."""
    top = (1 << kind.bits) - 1
    if kind.offset:
        return 0, top
    return -(1 << kind.bits - 1), (1 << kind.bits - 1) - 1


def _search(
    parts: Float[Tensor, "rows parts size"], mass: Float[Tensor, "rows parts size"], kind: BlockType
) -> tuple[Float[Tensor, "rows parts"], Float[Tensor, "rows parts"]]:
    """Step and low of each part, w ≈ step · u - low, of least weighted error: candidates, each solved for its codes."""
    bottom, top = levels(kind)
    least = parts.amin(-1).clamp(max=0)
    widest = parts.amax(-1).clamp(min=0)
    if kind.offset:
        base = (widest - least) / top
    else:
        far = torch.where(-least >= widest, least, widest)
        base = far / bottom if kind.bits < 8 else far.abs() / top
    best_step, best_low = base, -least if kind.offset else torch.zeros_like(base)
    best = torch.full_like(base, torch.inf)
    for share in torch.linspace(WIDEST, NARROWEST, SHARES).tolist():
        step, low = base * share, (-least * share if kind.offset else torch.zeros_like(base))
        for _ in range(2):
            codes = _round(parts, step, low, bottom, top)
            error = (mass * (codes * step.unsqueeze(-1) - low.unsqueeze(-1) - parts).square()).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            best_step, best_low = torch.where(better, step, best_step), torch.where(better, low, best_low)
            step, low = _solved(parts, mass, codes, step, low, kind)
    return best_step, best_low


def _solved(
    parts: Float[Tensor, "rows parts size"],
    mass: Float[Tensor, "rows parts size"],
    codes: Float[Tensor, "rows parts size"],
    step: Float[Tensor, "rows parts"],
    low: Float[Tensor, "rows parts"],
    kind: BlockType,
) -> tuple[Float[Tensor, "rows parts"], Float[Tensor, "rows parts"]]:
    """The step and low that fit these codes best; low is never negative, as K types store it without a sign."""
    squares = (mass * codes * codes).sum(-1)
    along = (mass * codes * parts).sum(-1)
    if not kind.offset:
        return torch.where(squares > 0, along / squares, step), low
    total, first = mass.sum(-1), (mass * codes).sum(-1)
    sum_of = (mass * parts).sum(-1)
    spread = total * squares - first.square()
    slope = (total * along - first * sum_of) / spread
    offset = (first * slope - sum_of) / total
    usable = (spread > 1e-12 * total * squares) & (slope > 0)
    free = usable & (offset >= 0)
    flat = torch.where(squares > 0, along / squares, step)
    through_zero = usable & (offset < 0) & (flat > 0)
    step = torch.where(free, slope, torch.where(through_zero, flat, step))
    low = torch.where(free, offset, torch.where(through_zero, torch.zeros_like(low), low))
    return step, low


def _round(
    parts: Float[Tensor, "rows parts size"],
    step: Float[Tensor, "rows parts"],
    low: Float[Tensor, "rows parts"],
    bottom: int,
    top: int,
) -> Float[Tensor, "rows parts size"]:
    width = torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)
    return ((parts + low.unsqueeze(-1)) / width).round_().clamp_(bottom, top)


def _simple(parts: Tensor, mass: Tensor, step: Tensor, low: Tensor, kind: BlockType) -> Blocks:
    bottom, top = levels(kind)
    step, shift = step.half(), (-low).half()
    codes = _round(parts, step.float(), -shift.float(), bottom, top)
    return Blocks(kind, (codes - bottom).to(torch.uint8), step, shift if kind.offset else None)


LARGEST_SCALE = {True: 63, False: 127}
"""Of the parts of a K block, by whether its range has an offset."""


def _nested(parts: Tensor, mass: Tensor, step: Tensor, low: Tensor, kind: BlockType) -> Blocks:
    """Parts whose scales are integers times their block's."""
    bottom, _ = levels(kind)
    per_block = kind.size // kind.part
    limit = LARGEST_SCALE[kind.offset]

    def of_parts(value: Tensor) -> Tensor:
        return value.repeat_interleave(per_block, dim=1)

    def largest(value: Tensor) -> Tensor:
        inside = value.unflatten(1, (-1, per_block))
        far = inside.gather(-1, inside.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return far / limit

    d, e = largest(step).half().float(), largest(low).half().float()
    floor = -limit - 1 if not kind.offset else 0
    found: tuple[Tensor, ...] | None = None
    best = torch.full_like(d, torch.inf)
    for _ in range(ROUNDS):
        s = (step / nonzero(of_parts(d))).round().clamp(floor, limit)
        n = (low / nonzero(of_parts(e))).round().clamp(0, limit)
        s, n, codes = _neighbours(parts, mass, s, n, of_parts(d), of_parts(e), kind, floor, limit)
        fitted = codes * (of_parts(d) * s).unsqueeze(-1) - (of_parts(e) * n).unsqueeze(-1)
        error = (mass * (fitted - parts).square()).sum(-1).unflatten(1, (-1, per_block)).sum(-1)
        better = error < best
        if found is None:
            found = d, e, s, n, codes
        else:
            wide = of_parts(better)
            found = (
                torch.where(better, d, found[0]),
                torch.where(better, e, found[1]),
                torch.where(wide, s, found[2]),
                torch.where(wide, n, found[3]),
                torch.where(wide.unsqueeze(-1), codes, found[4]),
            )
        best = torch.where(better, error, best)
        d, e = _solved_blocks(parts, mass, codes, s, n, d, e, per_block, kind)
    assert found is not None, "there is a round"
    d, e, s, n, codes = found
    return Blocks(
        kind,
        (codes - bottom).to(torch.uint8),
        d.half(),
        e.half() if kind.offset else None,
        s.to(torch.int32),
        n.to(torch.int32) if kind.offset else None,
    )


def _neighbours(
    parts: Tensor,
    mass: Tensor,
    s: Tensor,
    n: Tensor,
    d: Tensor,
    e: Tensor,
    kind: BlockType,
    floor: int,
    limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each part's integer scales, or neighbours of them, of least error with the block's; and the codes."""
    bottom, top = levels(kind)
    moves = [(a, b) for a in (0, -1, 1) for b in ((0, -1, 1) if kind.offset else (0,))]
    best, chosen = torch.full_like(s, torch.inf), (s, n)
    for a, b in moves:
        tried = (s + a).clamp(floor, limit), (n + b).clamp(0, limit)
        step, low = d * tried[0], e * tried[1]
        codes = _round(parts, step, low, bottom, top)
        error = (mass * (codes * step.unsqueeze(-1) - low.unsqueeze(-1) - parts).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, tried[0], chosen[0]), torch.where(better, tried[1], chosen[1])
    step, low = d * chosen[0], e * chosen[1]
    return chosen[0], chosen[1], _round(parts, step, low, bottom, top)


def _solved_blocks(
    parts: Tensor,
    mass: Tensor,
    codes: Tensor,
    s: Tensor,
    n: Tensor,
    d: Tensor,
    e: Tensor,
    per_block: int,
    kind: BlockType,
) -> tuple[Tensor, Tensor]:
    """d and e of least error for given integers, as float16 holds them."""

    def total(value: Tensor) -> Tensor:
        return value.unflatten(1, (-1, per_block)).sum(dim=(-1, -2))

    up, down = codes * s.unsqueeze(-1), n.unsqueeze(-1).expand_as(codes)
    a, b, c = total(mass * up * up), total(mass * up * down), total(mass * down * down)
    x, y = total(mass * up * parts), total(mass * down * parts)
    if not kind.offset:
        return torch.where(a > 0, x / a, d).half().float(), e
    determinant = a * c - b * b
    usable = determinant > 1e-9 * a * c
    solved_d, solved_e = (x * c - y * b) / determinant, (x * b - y * a) / determinant
    usable &= (solved_d > 0) & (solved_e >= 0)
    alone = (c == 0) & (a > 0) & (x > 0)
    d = torch.where(usable, solved_d, torch.where(alone, x / a, d))
    return d.half().float(), torch.where(usable, solved_e, e).half().float()


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
