"""Codes and scales of ggml's types for given weights: the ranges of least weighted squared error.

A part of 32 or 16 weights has one step and, where its type has offsets, one low: w ≈ step · u - low. Each end of its
range is moved by itself over `ENDS`, which loses 7 % less in Q4_1 than ranges that shrink as one; a candidate's codes
give step and low by least squares, and its error with them. Of K types the scales of parts are then integers times
their block's: integers, codes and the block's two numbers are fitted to each other in turns. What is stored is what
was computed with.

`importance` is E[x²] of each input, which an error counts as much as; none: all alike. Rows are searched in slices, so
that a slice stays in a processor's cache and memory is bounded, however large the matrix is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.ggml import Blocks, BlockType, levels, nonzero
from compress.errors import NumericalError

ENDS = range(2, -6, -1)
"""How far an end of a range with an offset is moved outwards: in its distance from 0 over the highest code."""
SHARES = torch.linspace(1.1, 0.6, 21).tolist()
"""What ranges that are centred on 0, and have but one end, are multiplied by."""
SOLVED = 2
"""Times that a candidate's step and low are solved for, and its codes rounded anew."""
ROUNDS = 3
"""Times that parts and blocks are fitted to each other."""
SLICE = 1 << 18
"""Weights that are searched at a time."""
LARGEST_SCALE = {True: 63, False: 127}
"""Of the parts of a K block, by whether its range has an offset."""

PerPart = Float[Tensor, "rows *parts"]
PerWeight = Float[Tensor, "rows *parts size"]
"""Of K types parts have two dimensions, [blocks, parts of a block]."""


def blocks(
    weight: Float[Tensor, "rows columns"], kind: BlockType, importance: Float[Tensor, " columns"] | None = None
) -> Blocks:
    """The matrix in this type.

    Raises NumericalError where a weight or an importance is not finite, or float16 holds no scale for the weights.
    """
    for name, values in (("weights", weight), ("importances", importance)):
        if values is not None and not values.isfinite().all():
            raise NumericalError(f"{int((~values.isfinite()).sum())} of {values.numel()} {name} are NaN or infinite")
    shape = (-1, kind.part) if kind.size == kind.part else (-1, kind.size // kind.part, kind.part)
    mass = _mass(weight, importance).view(1, *shape)
    search = _simple if kind.size == kind.part else _nested
    slices = [
        search(_Parts(kind, rows.float().unflatten(1, shape), mass))
        for rows in weight.split(max(1, SLICE // weight.shape[1]))
    ]
    found = Blocks.stacked(slices)
    if not all(numbers is None or numbers.isfinite().all() for numbers in (found.scale, found.shift)):
        raise NumericalError(f"weights up to {weight.abs().max().item():g} have no {kind.name} scale in float16")
    return found


def _mass(weight: Tensor, importance: Float[Tensor, " columns"] | None) -> Float[Tensor, " columns"]:
    """What an error in each column counts, 1 in the mean: never nothing, and all alike where no input ever came."""
    if importance is None or not importance.any():
        return torch.ones(weight.shape[1], device=weight.device)
    energy = importance.double()
    return (energy / energy.mean()).clamp(min=1e-6).float()


@dataclass(frozen=True, eq=False)
class _Parts:
    """Weights, what an error of each counts, and where their codes may lie."""

    kind: BlockType
    weights: PerWeight
    mass: Float[Tensor, "1 parts size"]

    def codes(self, step: PerPart, low: PerPart) -> PerWeight:
        """Those that are nearest, as numbers that a step is multiplied by."""
        return ((self.weights + low.unsqueeze(-1)) / nonzero(step).unsqueeze(-1)).round_().clamp_(*levels(self.kind))

    def error(self, codes: PerWeight, step: PerPart, low: PerPart) -> PerPart:
        away = (codes * step.unsqueeze(-1)).sub_(low.unsqueeze(-1)).sub_(self.weights)
        return away.square_().mul_(self.mass).sum(-1)

    @cached_property
    def sums(self) -> tuple[PerWeight, PerPart, PerPart, PerPart]:
        """mass · w, and the sums of mass, of mass · w and of mass · w²."""
        weighted = self.mass * self.weights
        return weighted, self.mass.sum(-1), weighted.sum(-1), (weighted * self.weights).sum(-1)

    def solved(self, codes: PerWeight, step: PerPart, low: PerPart) -> tuple[PerPart, PerPart, PerPart]:
        """The step and low that fit these codes best, and their error; of what no code tells, what is given.

        low is never negative, as K types store it without a sign, and 0 where ranges are centred.
        """
        weighted, total, along, energy = self.sums
        heavy = self.mass * codes
        first, squares, product = heavy.sum(-1), (heavy * codes).sum(-1), (weighted * codes).sum(-1)
        some = squares > 0
        flat = torch.where(some, product / squares, step)
        if self.kind.offset:
            spread = total * squares - first.square()
            slope = (total * product - first * along) / spread
            offset = (first * slope - along) / total
            free = (spread > 1e-12 * total * squares) & (slope > 0) & (offset >= 0)
            level = torch.where(some, 0, (-along / total).clamp(min=0))
            step, low = torch.where(free, slope, flat), torch.where(free, offset, level)
        else:
            step = flat
        error = energy - 2 * (step * product - low * along) + step * (step * squares - 2 * low * first)
        return step, low, error + low * low * total


def _simple(parts: _Parts) -> Blocks:
    step, low = (value.half().float() for value in _searched(parts))
    codes = parts.codes(step, low)
    nothing = _nothing(step, low)
    stored = step, low, codes, parts.error(codes, step, low)
    step, low, codes, _ = _better(stored, (nothing, nothing, torch.zeros_like(codes), parts.sums[-1]))
    bottom, _ = levels(parts.kind)
    shift = (-low).half() if parts.kind.offset else None
    return Blocks(parts.kind, (codes - bottom).to(torch.uint8), step.half(), shift)


def _nothing(*scales: Tensor) -> Tensor:
    """Scales of zeros, as which the tiniest weights are nearer to themselves; infinite where float16 holds none, so
    that the largest do not become zeros too."""
    return torch.where(torch.stack([scale.isfinite() for scale in scales]).all(0), 0.0, torch.inf)


def _searched(parts: _Parts) -> tuple[PerPart, PerPart]:
    """Step and low of each part, of least error."""
    best: tuple[Tensor, ...] | None = None
    for step, low in _candidates(parts):
        for _ in range(SOLVED):
            step, low, error = parts.solved(parts.codes(step, low), step, low)
            best = _better((step, low, error), best)
    assert best is not None, "there are candidates"
    return best[0], best[1]


def _candidates(parts: _Parts) -> Iterator[tuple[PerPart, PerPart]]:
    """Steps and lows to begin with."""
    bottom, top = levels(parts.kind)
    lowest, highest = parts.weights.amin(-1).clamp(max=0), parts.weights.amax(-1).clamp(min=0)
    if parts.kind.offset:
        shares = [1 + steps / top for steps in ENDS]
        for up, down in product(shares, shares):
            yield (highest * up - lowest * down) / top, -lowest * down
    else:
        far = torch.where(-lowest >= highest, lowest, highest)
        step = far / bottom if parts.kind.bits < 8 else far.abs() / top
        for share in SHARES:
            yield step * share, torch.zeros_like(step)


def _better(found: tuple[Tensor, ...], best: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Of two alternatives the one with the smaller error, part by part; an error is the last of its tensors."""
    if best is None:
        return found
    smaller = found[-1] < best[-1]
    return tuple(
        torch.where(smaller.reshape(smaller.shape + (1,) * (one.dim() - smaller.dim())), one, other)
        for one, other in zip(found, best, strict=True)
    )


def _nested(parts: _Parts) -> Blocks:
    """Parts whose scales are integers times their block's."""
    kind = parts.kind
    bottom, _ = levels(kind)
    step, low = _searched(parts)
    d, e = _largest(step, kind), _largest(low, kind)
    nothing, none = _nothing(d, e).squeeze(-1), torch.zeros_like(step)
    best: tuple[Tensor, ...] = nothing, nothing, none, none, torch.zeros_like(parts.weights), parts.sums[-1].sum(-1)
    for _ in range(ROUNDS):
        s, n, codes, error = _integers(parts, step / nonzero(d), low / nonzero(e), d, e)
        best = _better((d.squeeze(-1), e.squeeze(-1), s, n, codes, error.sum(-1)), best)
        d, e = _of_blocks(parts, codes, s, n, d, e)
    d, e, s, n, codes = (each.flatten(1, 2) if each.dim() > 2 else each for each in best[:-1])
    return Blocks(
        kind,
        (codes - bottom).to(torch.uint8),
        d.half(),
        e.half() if kind.offset else None,
        s.to(torch.int32),
        n.to(torch.int32) if kind.offset else None,
    )


def _largest(value: PerPart, kind: BlockType) -> Float[Tensor, "rows blocks 1"]:
    """What a block's integers are multiplied by, where its largest number has the largest of them."""
    far = value.gather(-1, value.abs().argmax(-1, keepdim=True))
    return (far / LARGEST_SCALE[kind.offset]).half().float()


def _integers(
    parts: _Parts, s: PerPart, n: PerPart, d: Float[Tensor, "rows blocks 1"], e: Float[Tensor, "rows blocks 1"]
) -> tuple[Tensor, ...]:
    """The integers next to s and n, or neighbours of them, of least error with their block's numbers; codes, error."""
    offset = parts.kind.offset
    limit = LARGEST_SCALE[offset]
    floor = 0 if offset else -limit - 1
    best: tuple[Tensor, ...] | None = None
    for up, down in product((0, -1, 1), (0, -1, 1) if offset else (0,)):
        tried = (s.round() + up).clamp(floor, limit), (n.round() + down).clamp(0, limit)
        step, low = d * tried[0], e * tried[1]
        codes = parts.codes(step, low)
        best = _better((*tried, codes, parts.error(codes, step, low)), best)
    assert best is not None, "there are neighbours"
    return best


def _of_blocks(
    parts: _Parts,
    codes: PerWeight,
    s: PerPart,
    n: PerPart,
    d: Float[Tensor, "rows blocks 1"],
    e: Float[Tensor, "rows blocks 1"],
) -> tuple[Float[Tensor, "rows blocks 1"], Float[Tensor, "rows blocks 1"]]:
    """d and e of least error for given integers and codes, as float16 holds them."""
    weighted, total, along, _ = parts.sums
    heavy = parts.mass * codes

    def of_block(value: PerPart) -> Float[Tensor, "rows blocks 1"]:
        return value.sum(-1, keepdim=True)

    a, b, c = of_block((heavy * codes).sum(-1) * s * s), of_block(heavy.sum(-1) * s * n), of_block(total * n * n)
    x, y = of_block((weighted * codes).sum(-1) * s), of_block(along * n)
    if not parts.kind.offset:
        return torch.where(a > 0, x / a, d).half().float(), e
    determinant = a * c - b * b
    solved_d, solved_e = (x * c - y * b) / determinant, (x * b - y * a) / determinant
    usable = (determinant > 1e-9 * a * c) & (solved_d > 0) & (solved_e >= 0)
    alone = (c == 0) & (a > 0) & (x > 0)
    d = torch.where(usable, solved_d, torch.where(alone, x / a, d))
    return d.half().float(), torch.where(usable, solved_e, e).half().float()
