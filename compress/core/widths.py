"""How many units each layer keeps: in multiples that kernels like, the same everywhere or by competition.

Scores of different layers, heads and channels above all, have no common scale. Each layer's are standardised to mean 0
and variance 1, and the highest of all stay, as many as the parameters they take have room for (FLAP, arXiv 2312.11983).
This is not the knapsack of `compress.core.allocate`: standardised scores rank, they do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError


def rounded_size(wanted: float, total: int, multiple: int = 1) -> int:
    """The multiple nearest to `wanted`, of two the larger; at least one multiple, and `total` only where it is wanted.

    Kernels want widths that are multiples of 32, 64 or 128. A `total` below the multiple stays as it is.
    """
    if wanted >= total or total <= multiple:
        return total
    return multiple * min(max(1, int(wanted / multiple + 0.5)), (total - 1) // multiple)


def ranked_sizes(
    scores: Sequence[Float[Tensor, " units"]], prices: Sequence[int], budget: int, multiples: Sequence[int]
) -> list[int]:
    """How many units each layer keeps when the units of all layers compete for `budget` parameters.

    `prices`: parameters of one unit of each layer, in all matrices. Units come and go in runs of the layer's multiple,
    at the mean of their scores, and every layer keeps one run. Raises ValueError where those exceed the budget,
    NumericalError where a score is not finite.
    """
    runs = [
        _standardised(layer).sort(descending=True).values.split(m) for layer, m in zip(scores, multiples, strict=True)
    ]
    sizes = [len(layer[0]) for layer in runs]
    spare = budget - sum(size * price for size, price in zip(sizes, prices, strict=True))
    if spare < 0:
        raise ValueError(
            f"the smallest sizes {sizes} of {len(sizes)} layers take {budget - spare:,} parameters, {-spare:,} more "
            f"than the budget of {budget:,}. Raise the budget, or lower the multiples {list(multiples)}"
        )
    wanted = sorted(
        (-float(run.mean()), layer, place)
        for layer, parts in enumerate(runs)
        for place, run in enumerate(parts)
        if place > 0
    )
    full = set()
    for _, layer, place in wanted:
        price = len(runs[layer][place]) * prices[layer]
        if layer in full or price > spare:
            full.add(layer)
            continue
        sizes[layer] += len(runs[layer][place])
        spare -= price
    return sizes


def _standardised(scores: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    if not scores.isfinite().all():
        raise NumericalError(f"{int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")
    centred = scores.double() - scores.double().mean()
    spread = centred.square().mean().sqrt()
    return centred / spread if spread > 1e-12 * scores.abs().max() else torch.zeros_like(centred)
