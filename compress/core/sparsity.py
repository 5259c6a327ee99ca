"""Sparsity: how many weights of a layer become zeros, and which.

A pattern says how many. Unstructured, it is a share of all weights; N:M keeps n of every m consecutive inputs of an
output channel, which sparse tensor cores can skip for 2:4. Scores say which:

    magnitude    |W_ij|
    wanda        |W_ij| · √E[x_j²]      the output error of losing the weight, were inputs uncorrelated and nothing
                                        else moved (Wanda, arXiv 2306.11695)

The largest are kept, by their rank and never by a threshold: where scores are tied, a threshold prunes too many.
What they are compared with matters as much as the scores. Wanda needs the weights of its own output channel, for
channels differ in scale without differing in worth; magnitudes are usually compared over the whole matrix. The methods
that also move the weights that stay are in `compress.core.sparsegpt` and `compress.core.alps`.

Layers need not be equally sparse. OWL (arXiv 2310.05175) spares those with many outliers, D_l being the share of
scores above a multiple of the layer's mean:

    sparsity_l = sparsity - limit · (D_l - D̄) / max |D - D̄|.

D̄ weighs each layer by its size, and so the model is exactly as sparse as asked for. The paper maps D to an interval
before it takes the mean, by which a single outlier among layers may deviate by twice the limit; here none does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.errors import NumericalError

Among = Literal["row", "matrix"]
"""What a weight is compared with: its own output channel, or all weights."""
TINY = 1e-12
"""Energy below which an input counts as unseen, relative to the mean; as for `compress.core.linalg.dead_columns`."""


@dataclass(frozen=True)
class Pattern:
    """Unstructured, `Pattern(0.5)`, or N:M, `Pattern(n=2, m=4)`. Raises ValueError where it is neither."""

    sparsity: float = 0.0
    """The share of zeros, unstructured."""
    n: int = 0
    """Weights kept of each m consecutive inputs."""
    m: int = 0
    """0: unstructured."""

    def __post_init__(self) -> None:
        if self.m or self.n:
            if self.sparsity or not 0 < self.n < self.m:
                raise ValueError(f"{self!r} must keep 1 to m - 1 of m inputs, as 2:4 does, and have no other sparsity")
        elif not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be above 0 and below 1; 0.5 is usual")

    @property
    def name(self) -> str:
        """`50%`, `2:4`."""
        return f"{self.n}:{self.m}" if self.m else f"{100 * self.sparsity:g}%"

    @property
    def zeros(self) -> float:
        """The share of zeros."""
        return 1 - self.n / self.m if self.m else self.sparsity

    def num_kept(self, count: int) -> int:
        """How many of `count` weights stay: to the nearest, unstructured; of whole groups, N:M."""
        return count // self.m * self.n if self.m else count - math.floor(self.sparsity * count + 0.5)

    def check(self, in_features: int) -> None:
        """Raises ValueError where groups of m do not divide the inputs."""
        if self.m and in_features % self.m:
            raise ValueError(f"in_features={in_features} is not a multiple of m={self.m} of the pattern {self.name}")


@dataclass(frozen=True)
class Pruned:
    """A sparse weight, and what it took."""

    weight: Float[Tensor, "out in"]
    """Zero outside the mask, in the dtype of the original."""
    mask: Bool[Tensor, "out in"]
    """True where a weight was kept."""
    damping: float
    """The damping that made H positive definite, as a fraction of its mean diagonal."""
    note: str | None = None
    """In what way it is not what was asked for, if it is not."""


def parse_pattern(text: str | float) -> Pattern:
    """The pattern a recipe names: a share of zeros, `0.5`, or `"2:4"`. Raises ValueError for anything else."""
    if match := re.fullmatch(r"(\d+):(\d+)", str(text)):
        return Pattern(n=int(match[1]), m=int(match[2]))
    try:
        return Pattern(float(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"pattern={text!r} must be a share of zeros, above 0 and below 1, or N:M in quotes, as in '2:4'"
        ) from error


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|W|, in float32."""
    return weight.float().abs()


def wanda(weight: Float[Tensor, "out in"], energy: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """|W| · √energy in float32, `energy` being E[x_j²], the diagonal of the Hessian.

    The weights of inputs that calibration did not see come last, by their magnitude.
    """
    mean = energy.mean()
    scale = energy.clamp(min=float(TINY * mean)).sqrt().float() if mean > 0 else torch.ones_like(energy).float()
    return magnitude(weight) * scale


def keep_largest(scores: Float[Tensor, "out in"], pattern: Pattern, among: Among = "row") -> Bool[Tensor, "out in"]:
    """The mask of the largest scores, exactly as many as the pattern keeps; N:M compares within its groups only.

    Raises ValueError where the pattern does not divide the row, NumericalError where a score is not finite.
    """
    pattern.check(scores.shape[1])
    require_finite(scores=scores)
    grouped = scores.reshape(-1, pattern.m) if pattern.m else scores if among == "row" else scores.reshape(1, -1)
    return largest(grouped, pattern.num_kept(grouped.shape[1])).view(scores.shape)


def largest(scores: Float[Tensor, "groups size"], count: int) -> Bool[Tensor, "groups size"]:
    """The `count` largest of each group."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True)


def outlier_share(scores: Float[Tensor, "out in"], multiple: float = 5.0) -> float:
    """D of OWL: the share of scores, those of `wanda`, above `multiple` times their mean. The paper takes 5 to 7."""
    return float((scores > multiple * scores.mean()).double().mean())


def owl(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, *, limit: float = 0.08) -> list[float]:
    """The sparsity of each layer, by its `outlier_share`, within `limit` of `sparsity`.

    `sizes`: weights of each layer, by which the mean equals `sparsity`. Raises ValueError where a layer could lose all
    of its weights or none.
    """
    if len(outliers) != len(sizes) or not sizes or min(sizes) < 1:
        raise ValueError(f"{len(outliers)} outlier shares need as many sizes, each at least 1, not {list(sizes)}")
    if not 0 <= limit < min(sparsity, 1 - sparsity):
        raise ValueError(f"limit={limit} around sparsity={sparsity} must leave every layer between 0 and 1; lower it")
    mean = math.fsum(share * size for share, size in zip(outliers, sizes, strict=True)) / sum(sizes)
    deviations = [share - mean for share in outliers]
    widest = max(map(abs, deviations))
    if not math.isfinite(widest):
        raise NumericalError(f"outlier shares {list(outliers)} must be finite")
    unit = limit / widest if widest > 1e-12 else 0.0  # what is left of equal shares is rounding
    return [sparsity - unit * deviation for deviation in deviations]


def require_finite(**tensors: Tensor | None) -> None:
    """Raises NumericalError that counts the numbers of a tensor which are not finite."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise NumericalError(f"{count} of {tensor.numel()} numbers of the {name} are NaN or infinite")
