"""Depth pruning: which transformer blocks a model does without.

A residual stream passes a block that does little almost unchanged. With x_l what enters block l,

    block influence   1 - E cos(x_l, x_{l+1})           (ShortGPT, arXiv 2403.03853)
    angular distance  E arccos cos(x_l, x_{l+n}) / π    of n blocks in a row (arXiv 2403.17887)

come from one run of the model. They know neither what later blocks make of a change nor how removals add up: of two
blocks that undo each other both seem indispensable. Where the loss of a set can be measured, `greedy` removes one unit
at a time and measures again after each (Shortened LLaMA, arXiv 2402.02834): L + (L-1) + … losses for k of L units. Its
units may as well be halves of blocks. On stories260k two of five blocks cost a KL divergence of 3.1 by influence and
2.1 by greedy removal, which finds the best pair there is; the last block is one of them.

By influence alone the first and the last block always stay. One turns embeddings into what all others read and the
other writes what the head reads; how far they turn the stream says little of what they are worth.

Between unit vectors u and v we take 1 - cos as ‖u - v‖²/2, and the angle as 2 atan2(‖u - v‖, ‖u + v‖): cosines near 1,
which are those that matter, would lose half of their digits otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Turn:
    """By how much blocks turn the hidden states that pass them, summed over tokens."""

    influence_sum: float = 0.0
    """Of 1 - cos."""
    angle_sum: float = 0.0
    """In half turns, 0 to 1 for each token."""
    num_tokens: int = 0
    num_dropped: int = 0
    """Tokens left out because they held a NaN or an infinity."""

    def including(self, before: Float[Tensor, "*batch n"], after: Float[Tensor, "*batch n"]) -> Turn:
        """These sums with another batch: hidden states as they enter the first block and as they leave the last.

        A state of zeros that becomes something, or the other way round, counts as a quarter turn. The first token of a
        text is best left out: attention parks there, and its states are unlike any other.
        """
        x, y = (states.reshape(-1, states.shape[-1]).float() for states in (before, after))
        finite = x.isfinite().all(dim=1) & y.isfinite().all(dim=1)
        u, v = _unit(x[finite]), _unit(y[finite])
        nothing = u.any(dim=1) ^ v.any(dim=1)
        apart, along = (u - v).norm(dim=1), (u + v).norm(dim=1)
        influence = torch.where(nothing, 1.0, apart.square() / 2)
        angle = torch.where(nothing, 0.5, 2 / math.pi * torch.atan2(apart, along))
        return Turn(
            self.influence_sum + float(influence.sum(dtype=torch.float64)),
            self.angle_sum + float(angle.sum(dtype=torch.float64)),
            self.num_tokens + len(u),
            self.num_dropped + len(x) - len(u),
        )

    @property
    def influence(self) -> float:
        """1 - E cos, from 0 to 2. Raises NumericalError where no token was seen."""
        return self.influence_sum / self._seen()

    @property
    def angular_distance(self) -> float:
        """E arccos cos / π, from 0 to 1. Raises NumericalError where no token was seen."""
        return self.angle_sum / self._seen()

    def _seen(self) -> int:
        if not self.num_tokens:
            raise NumericalError(f"no usable hidden state; {self.num_dropped} held NaN or infinite numbers")
        return self.num_tokens


def least_influential(influence: Sequence[float], count: int) -> list[int]:
    """The `count` blocks of least influence, ascending, neither the first nor the last; of equal ones the deeper.

    `influence`: of each block. Raises ValueError where there are fewer, NumericalError where a number is NaN.
    """
    _check(influence, count, len(influence))
    inner = range(1, len(influence) - 1)
    return sorted(sorted(inner, key=lambda block: (influence[block], -block))[:count])


def nearest_window(distance: Sequence[float], count: int) -> list[int]:
    """The `count` blocks in a row that turn the stream least, neither the first nor the last; of equal ones the deeper.

    `distance[l]`: over the blocks l … l + count - 1, for each l where these exist. Raises as `least_influential`.
    """
    _check(distance, count, len(distance) + count - 1)
    if not count:
        return []
    first = min(range(1, len(distance) - 1), key=lambda start: (distance[start], -start))
    return list(range(first, first + count))


@dataclass(frozen=True)
class Removal(Generic[Unit]):
    """One step of `greedy`: the loss is that of the model without the units removed so far."""

    unit: Unit
    loss: float


def greedy(units: Sequence[Unit], count: int, loss: Callable[[tuple[Unit, ...]], float]) -> list[Removal[Unit]]:
    """`count` units in the order of their removal, each the one without which the loss is least, given those before.

    `loss`: of the model without some units, which come in the order they have in `units`; called for every unit that is
    left, `count` times over. One that is not finite counts as infinite. Of equal losses the last unit goes. Raises
    ValueError where there are fewer units, NumericalError where no removal leaves a finite loss.
    """
    if not 0 <= count <= len(units):
        raise ValueError(f"{count} of {len(units)} units cannot be removed")
    removed: set[int] = set()
    steps: list[Removal[Unit]] = []
    for _ in range(count):
        tried = {}
        for place in range(len(units) - 1, -1, -1):
            if place not in removed:
                value = loss(tuple(units[each] for each in sorted(removed | {place})))
                tried[place] = value if math.isfinite(value) else math.inf
        best = min(tried, key=lambda place: tried[place])
        if tried[best] == math.inf:
            raise NumericalError(f"after {len(steps)} removals no other leaves a finite loss, of {len(tried)} tried")
        removed.add(best)
        steps.append(Removal(units[best], tried[best]))
    return steps


def _unit(x: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
    """Vectors of length 1; zeros stay, and lengths are taken of what neither overflows nor vanishes."""
    x = x / x.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x / x.norm(dim=1, keepdim=True).clamp(min=0.5)


def _check(values: Sequence[float], count: int, num_blocks: int) -> None:
    if not 0 <= count <= num_blocks - 2:
        raise ValueError(
            f"{count} of {num_blocks} blocks cannot be removed: by influence the first and the last stay, "
            f"so remove {max(0, num_blocks - 2)} at most, or measure the loss"
        )
    if any(map(math.isnan, values)):
        raise NumericalError(f"influence={list(values)} must be numbers")
