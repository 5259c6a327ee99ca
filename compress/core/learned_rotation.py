"""Learned rotations: coordinates of the residual stream in which rounding hurts the layers that read it least.

A random Hadamard matrix R spreads what is large, whatever that is. For a given model there are better ones, and
SpinQuant (arXiv 2405.16406) descends to one among the orthogonal matrices, through the loss of the whole network. Here
errors are taken where they arise. With x what the layers of a site read, the norm's weight moved into their weights W,
and Q the rounding to a grid, minimise the mean over all sites of

    L(R) = E‖Q(x R) Q(W R)ᵀ - x Wᵀ‖² / E‖x Wᵀ‖²        or, with weights as they are,  E‖(Q(x R) Rᵀ - x) Wᵀ‖² / E‖x Wᵀ‖²

A step looks at one site and nothing is propagated, so memory is bounded by a site. Where L falls, the divergence of the
outputs falls with it: against random Hadamard matrices, with 4-bit inputs and on texts not learned from, L is a third
lower on both stories260k and pocket-llama-13m, the divergence 32 and 28 %.

How L depends on R. (x R) (W R)ᵀ does not; the error e = Q(y) - y of y = x R does. In steps of the grid it is as good as
random: R turned by a little, it is another. What can be learned is the size of the steps, that of the largest |y| among
those that share a scale. So e is held constant in steps, and grows as their range does:

    e(R) = e · ‖y(R)‖₈ / ‖y‖₈        over the group that shares a scale; likewise for the errors of weights

This is straight-through rounding that keeps the gradient of the scale, with two changes. The 8-norm stands for the
maximum, so that all large coordinates are moved at once, not one a token. And the part of the gradient is left out that
would turn this very e to where W does not see it. On pocket-llama-13m L then falls by 27 % on other texts, not by 22.
Only the gradient is made so; values are those of L.

It takes many tokens, for R has n²/2 parameters: on that model 512 a site take 27 % off L, 2048 take 33. `before` and
`after` are of tokens that were not learned from. Inputs in FP8 and NVFP4, whose errors hardly depend on the range, gain
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from compress.core.inputs import input_scale, round_inputs
from compress.core.ranges import nearest
from compress.core.scheme import Grid
from compress.core.stiefel import begin, descend, nearest_orthogonal
from compress.errors import NumericalError

Site = Callable[[], tuple[Float[Tensor, "tokens n"], Float[Tensor, "out n"]]]
"""Loads what the layers of a site read, and their weights, those of one layer below those of another."""

ORDER = 8
"""Of the norm that stands for the maximum in the gradient."""
HELD_OUT = 8
"""One token of so many, the last ones of each site, is measured on and not learned from."""
CHECKS = 2
"""How often L is measured on the way, the end included. The end is best unless something went wrong."""


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of learning."""

    rotation: Float[Tensor, "n n"]
    """Orthogonal, float64; it turns a vector x into x R."""
    before: float
    """The mean L of the start."""
    after: float
    """That of the rotation; never above `before`."""
    notes: tuple[str, ...]
    """What did not go as asked."""


def learn(
    start: Float[Tensor, "n n"],
    sites: Sequence[Site],
    inputs: Grid,
    weights: Grid | None = None,
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
    seed: int = 0,
    centred: bool = False,
) -> Learned:
    """Descent from the rotation `start`, on the device where it is; each step takes one site, in a random order.

    `inputs`, `weights`: the grids that both are rounded to; without the latter, weights are exact. `learning_rate`: of
    the first step, in radians (`compress.core.stiefel`); it falls linearly to 0. `centred`: the start keeps the mean of
    a vector, and so will the rotation. Memory: a site, four times its outputs, a few copies of rounded weights and
    a few matrices like `start`. Raises NumericalError where L is not finite at the start, ValueError where the
    start is not orthogonal or a site unfit.
    """
    if not sites:
        raise ValueError("there are no sites to learn a rotation from; at least 1 is needed")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1; 200 is usual")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} must be above 0 and finite; 0.1 is usual")
    first = nearest_orthogonal(start)
    if centred and (first.sum(dim=1) - 1).abs().max() > 1e-6:
        raise ValueError("the start does not keep the mean of a vector, as centred=True says; make it a centred one")
    errors = _measure(first, sites, inputs, weights)
    for index, error in enumerate(errors):
        if not math.isfinite(error):
            raise NumericalError(f"site {index} of {len(sites)}: its inputs or weights are NaN, infinite or too large")
    before = _mean(errors)
    best, notes = (before, first), []
    descent = begin(first)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if step and step * CHECKS // steps > (step - 1) * CHECKS // steps:
            best = _better(best, descent.rotation, sites, inputs, weights)
        if not order:
            order = torch.randperm(len(sites), generator=generator).tolist()
        index = order.pop()
        gradient = _gradient(descent.rotation, sites[index], inputs, weights)
        if not gradient.isfinite().all():
            notes.append(f"learning ended at step {step} of {steps}: the gradient of site {index} is NaN or infinite")
            break
        descent = descend(descent, gradient, learning_rate * (1 - step / steps), centred=centred)
    after, rotation = _better(best, descent.rotation, sites, inputs, weights)
    if after == before:
        notes.append(f"left as it was at the start, with error {before:.3g}: learning found nothing better")
    return Learned(nearest_orthogonal(rotation), before, after, tuple(notes))


def output_error(
    x: Float[Tensor, "tokens n"],
    weight: Float[Tensor, "out n"],
    rotation: Float[Tensor, "n n"],
    inputs: Grid,
    weights: Grid | None = None,
) -> Float[Tensor, ""]:
    """L of one site in float32, 0 of a silent one. Its gradient in the rotation is the one described above."""
    x, weight, rotation = x.float(), weight.float(), rotation.float()
    turned = x @ rotation
    seen = turned.detach()
    scale = input_scale(seen.abs().amax(), inputs) if inputs.overall else None
    rounded = _by_range(turned, round_inputs(seen, inputs, scale), inputs)
    wanted = x @ weight.T
    if weights is None:
        error = (rounded @ rotation.detach().T - x) @ weight.T
    else:
        turned = weight @ rotation
        error = rounded @ _by_range(turned, nearest(turned.detach(), weights, torch.float32), weights).T - wanted
    return error.square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _by_range(value: Float[Tensor, "rows n"], rounded: Float[Tensor, "rows n"], grid: Grid) -> Float[Tensor, "rows n"]:
    """`rounded`, with the gradient of an error that grows as the range of `value` does."""
    shape = (1, 1, -1) if grid.rows is None else (len(value), grid.num_groups(value.shape[1]), -1)
    groups = value.view(shape)
    largest = groups.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
    norm = torch.linalg.vector_norm(groups / largest, ORDER, dim=-1, keepdim=True)  # at least 1, or of zeros
    growth = (norm - norm.detach()) / norm.detach().clamp(min=1)
    return rounded + ((rounded - value.detach()).view(shape) * growth).view(value.shape)


def _gradient(rotation: Float[Tensor, "n n"], site: Site, inputs: Grid, weights: Grid | None) -> Float[Tensor, "n n"]:
    """Of L at a site, on the tokens that are learned from."""
    x, weight = _load(site, rotation)
    variable = rotation.detach().requires_grad_()
    error = output_error(x[: -_held_out(x)], weight, variable, inputs, weights)
    return torch.autograd.grad(error, variable)[0]


@torch.no_grad()
def _measure(rotation: Float[Tensor, "n n"], sites: Sequence[Site], inputs: Grid, weights: Grid | None) -> list[float]:
    """L of each site on the tokens that are not learned from."""
    errors = []
    for site in sites:
        x, weight = _load(site, rotation)
        errors.append(float(output_error(x[-_held_out(x) :], weight, rotation, inputs, weights)))
        del x, weight
    return errors


def _better(
    best: tuple[float, Tensor],
    rotation: Float[Tensor, "n n"],
    sites: Sequence[Site],
    inputs: Grid,
    weights: Grid | None,
) -> tuple[float, Tensor]:
    """The error and the rotation of less error."""
    error = _mean(_measure(rotation, sites, inputs, weights))
    return (error, rotation) if error < best[0] else best


def _mean(errors: Sequence[float]) -> float:
    return sum(errors) / len(errors)


def _held_out(x: Float[Tensor, "tokens n"]) -> int:
    return max(1, len(x) // HELD_OUT)


def _load(site: Site, rotation: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "tokens n"], Float[Tensor, "out n"]]:
    x, weight = site()
    if {x.shape[-1], weight.shape[-1]} != {len(rotation)} or len(x) < 2:
        raise ValueError(
            f"a site with inputs {list(x.shape)} and weights {list(weight.shape)} does not fit a rotation of size "
            f"{len(rotation)}: it needs 2 tokens at least, and rows of that size"
        )
    return x, weight
