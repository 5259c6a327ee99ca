"""Two models on the same questions: how far apart they are, and how well that is known.

The score of a model is uncertain because other questions could have been asked. Most of that uncertainty is shared by
two models that were asked the same ones, and drops out of their difference:

    Var(x − y) = Var x + Var y − 2 Cov(x, y)

So the standard error of a difference is taken from the differences, question by question ("Adding Error Bars to Evals",
arXiv 2411.00640); √(error² + error²) of two separate scores is an upper bound where models answer alike, and far above.

A score can also stand still while answers change. Flips are the questions that one model has right and the other wrong
("Accuracy is Not All You Need", arXiv 2407.09141). With g of n questions gained and l lost, the difference is
(g − l) / n, and its squared standard error ((g + l) / n − (g − l)² / n²) / (n − 1): flips are all there is to know, as
in McNemar's test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Difference(NamedTuple):
    """Of the mean of one model from that of another; errors are standard errors, None where one question has none."""

    mean: float
    error: float | None
    """From the differences."""
    unpaired: float | None
    """What it would be, were the two asked different questions."""


class Flips(NamedTuple):
    """Questions whose answer changed."""

    all: int
    to_wrong: int
    """Those that the baseline has right."""


def standard_error(values: Tensor) -> float | None:
    """Of the mean of independent values [n]; None for a single one."""
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def difference(model: Tensor, baseline: Tensor) -> Difference:
    """Of two models' values [n], in the order of the same n questions."""
    change = model.double() - baseline.double()
    separate = standard_error(model), standard_error(baseline)
    return Difference(change.mean().item(), standard_error(change), _root_of_squares(separate))


def combined(parts: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """Of weighted means over tasks, each with questions of its own; weights sum to 1."""
    mean = sum(weight * part.mean for part, weight in zip(parts, weights, strict=True))
    errors, unpaired = (
        _root_of_squares(
            [None if each is None else weight * each for each, weight in zip(column, weights, strict=True)]
        )
        for column in ([part.error for part in parts], [part.unpaired for part in parts])
    )
    return Difference(mean, errors, unpaired)


def flips(model: Tensor, baseline: Tensor) -> Flips:
    """Of answers [n] that are right, 1, or wrong, 0."""
    right, was_right = model.bool(), baseline.bool()
    return Flips(int((right != was_right).sum()), int((was_right & ~right).sum()))


def _root_of_squares(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None
