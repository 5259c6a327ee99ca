"""AutoRound: learn which way every weight is rounded, by signed gradient descent on what the block returns.

GPTQ solves one layer at a time; here all layers of a block are learned together, so that they make up for each other,
through the nonlinearities between them, for rounded inputs, and for what the blocks before have lost. With x̂ the
block's inputs in the compressed model and y what the original block returned for the same windows, minimise

    E‖block(x̂; Ŵ) - y‖²       Ŵ = s · (clamp(⌊W / s + V⌉ + z) - z)

over an offset V ∈ [-½, ½] for every weight, which chooses between its two neighbours, and over the range of every
group: its lower and its upper end each move by a share of themselves, which gives s and z; both by the same share on a
symmetric grid. Rounding is given the gradient of the identity where it does not clamp. Each step is

    p ← p - r · sign(∂L/∂p)       r falling linearly from the learning rate to 0

so any weight can reach either neighbour, however small its gradient. (AutoRound, arXiv 2309.05516.) With the block's
own output on x̂ for y, the KL divergence of stories260k at 3 bits is a quarter higher.

Where we differ from the paper:
- Ranges start where `compress.core.ranges` finds them best, not at min-max, and may widen as well as narrow. Their
  ends move by 2r / (2^bits - 1): the outermost level goes twice as far as an offset, however fine the grid.
- The gradient of rounding is written down: only the block itself is differentiated, weights have no graph.
- What is best is decided on all windows, not by the loss of one minibatch: the start is measured, the end is measured,
  and what is returned never loses more on the calibration set than what learning began with. There is nothing to look
  for in between: while r is large the loss hovers, and most of the gain comes as it falls.
- `start: gptq` begins with GPTQ's codes and scales, made up for earlier layers, instead of the nearest: better
  at 2 bits, hardly at 3, worse at 4.

What is measured is what is stored: in every step scales are rounded to their dtype before codes are computed. Float
grids are refused: on synthetic layers offsets gained little there and scales are not free to move; GPTQ serves those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calibrate import BATCH_TOKENS
from compress.core.affine import by_group, storable
from compress.core.metrics import relative_error
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import Range
from compress.core.scheme import GroupSize, Scheme, parse_scheme
from compress.errors import NumericalError, naming
from compress.quantize.gptq import GPTQ
from compress.quantize.rtn import RTN, check_range
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.activations import Activations
    from compress.calibrate.block import Block

Start = Literal["nearest", "gptq"]
FARTHEST = 0.5
"""How far an offset may go, in levels, and an end of a range, relative to itself."""
INSIDE = 0.49
"""How far from its level a weight lies at most that is made to round to it, in levels."""

Loss = Callable[[Mapping[str, Tensor], Sequence[int]], Iterator[Tensor]]
"""The loss of each of some windows under some weights, a few windows at a time: each part is differentiated alone."""


@dataclass(frozen=True)
class Rounding:
    """A weight and how it is rounded."""

    weight: Float[Tensor, "out in"]
    first: QuantizedTensor
    """Where learning starts."""
    offset: Float[Tensor, "out in"]
    """V."""
    ends: Float[Tensor, "ends out groups"]
    """By what share of itself each end of a range has moved: lower and upper, or both as one."""


def begin(weight: Float[Tensor, "out in"], first: QuantizedTensor) -> Rounding:
    """The rounding that gives `first`: where another level is nearest, the weight is moved next to the one it has."""
    ends = weight.new_zeros(1 if first.grid.symmetric else 2, *first.scale.shape)
    rounding = Rounding(weight, first, torch.zeros_like(weight), ends)
    elsewhere = rounded(rounding).codes != first.codes
    if elsewhere.any():
        levels, step = by_group(first.codes.float(), first.grid) - _zero(first), first.step.unsqueeze(-1)
        beside = (by_group(weight, first.grid) / step).clamp(levels - INSIDE, levels + INSIDE) * step
        rounding = replace(rounding, weight=torch.where(elsewhere, beside.view_as(weight), weight))
    return rounding


def rounded(rounding: Rounding) -> QuantizedTensor:
    """The weight on its grid: scales and zero points as they are stored, then the codes that go with them."""
    first, grid, zero_point = rounding.first, rounding.first.grid, rounding.first.zero_point
    low, high, share = rounding.ends[0], rounding.ends[-1], _share_below(first)
    scale = storable(first.step * (1 + low * share + high * (1 - share)), first.scale.dtype)
    if zero_point is not None:
        distance = (1 + low) * (zero_point.float() - grid.qmin) * first.step / scale.float()
        zero_point = distance.add_(grid.qmin).round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)
    tensor = QuantizedTensor(first.codes, scale, zero_point, grid)
    codes = _wanted(rounding, tensor).round_().add_(_zero(tensor)).clamp_(grid.qmin, grid.qmax)
    return replace(tensor, codes=codes.to(torch.int8).view(first.codes.shape))


def moved(rounding: Rounding, tensor: QuantizedTensor, gradient: Float[Tensor, "out in"], rate: float) -> Rounding:
    """One step of SignSGD. `gradient`: of the loss in the weight `tensor`, which is `rounded(rounding)`."""
    first, grid, step, zero = rounding.first, tensor.grid, tensor.step.unsqueeze(-1), _zero(tensor)
    g, levels = by_group(gradient.float(), grid), _wanted(rounding, tensor)
    below, above = levels < grid.qmin - zero - 0.5, levels > grid.qmax - zero + 0.5
    inside = g.masked_fill(below | above, 0)
    offset = by_group(rounding.offset, grid) - rate * (inside * step).sign()
    # ∂Ŵ/∂s is what rounding added to W / s, in levels; a clamped weight is the end of the range itself.
    added = by_group(tensor.codes.float(), grid) - zero - by_group(rounding.weight, grid) / step
    scaled = (inside * added).sum(-1)
    span, share = grid.qmax - grid.qmin, _share_below(first)
    lower = share * (scaled - span * (g * below).sum(-1))
    upper = (1 - share) * (scaled + span * (g * above).sum(-1))
    slope = torch.stack((lower + upper,) if grid.symmetric else (lower, upper)) * first.step
    ends = rounding.ends - 2 / span * rate * slope.sign()
    offset, ends = offset.clamp_(-FARTHEST, FARTHEST), ends.clamp_(-FARTHEST, FARTHEST)
    return replace(rounding, offset=offset.view_as(rounding.offset), ends=ends)


def _wanted(rounding: Rounding, tensor: QuantizedTensor) -> Float[Tensor, "out groups size"]:
    """W / s + V, in levels, before it is rounded and clamped."""
    levels = by_group(rounding.weight, tensor.grid) / tensor.step.unsqueeze(-1)
    return levels.add_(by_group(rounding.offset, tensor.grid))


def _zero(tensor: QuantizedTensor) -> Float[Tensor, "out groups 1"] | float:
    return 0.0 if tensor.zero_point is None else tensor.zero_point.float().unsqueeze(-1)


def _share_below(tensor: QuantizedTensor) -> Float[Tensor, "out groups"] | float:
    """The part of each range that lies below zero."""
    zero = 0.0 if tensor.zero_point is None else tensor.zero_point.float()
    return (zero - tensor.grid.qmin) / (tensor.grid.qmax - tensor.grid.qmin)


@dataclass(frozen=True)
class Learned:
    """What came of learning."""

    tensors: Mapping[str, QuantizedTensor]
    """Those of least loss."""
    loss: float
    """Theirs, a mean over the windows."""
    before: float
    """The loss of the start."""
    notes: tuple[str, ...]
    """What did not go as asked."""
    untouched: frozenset[str]
    """Layers that no gradient has reached."""


def learn(
    roundings: Mapping[str, Rounding],
    loss: Loss,
    windows: Sequence[int],
    *,
    iterations: int,
    batch_size: int,
    rate: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Learned:
    """SignSGD over all `roundings`, layer → rounding, on minibatches of `windows` drawn without replacement.

    `dtype`: what weights are computed with. Windows whose loss is not finite are left out; raises NumericalError where
    none remains.
    """
    roundings = dict(roundings)
    now = {name: rounded(rounding) for name, rounding in roundings.items()}
    first = dict(now)
    losses = _losses(loss, first, windows, dtype)
    usable = [window for window, value in zip(windows, losses.tolist(), strict=True) if math.isfinite(value)]
    if not usable:
        raise NumericalError(f"the block's loss is NaN or infinite on all {len(windows)} calibration windows")
    before = float(losses[losses.isfinite()].mean())
    size = min(batch_size, len(usable))
    notes = []
    if len(usable) < len(windows):
        notes.append(f"{len(windows) - len(usable)} of {len(windows)} windows had no finite loss and were left out")
    if size < batch_size:
        notes.append(f"steps of {size} windows, not {batch_size}: there are no more")
    untouched = set(roundings)
    order: list[int] = []
    for step in range(iterations):
        if len(order) < size:
            order += [usable[index] for index in torch.randperm(len(usable), generator=generator).tolist()]
        batch, order = order[:size], order[size:]
        gradients = _gradients(loss, now, batch, dtype)
        if not all(gradient.isfinite().all() for gradient in gradients.values()):
            notes.append(f"learning ended at step {step} of {iterations}: a gradient was NaN or infinite")
            break
        for name in list(gradients):
            gradient = gradients.pop(name)  # one at a time: what is done with is freed
            untouched -= {name} if name in untouched and gradient.any() else set()
            roundings[name] = moved(roundings[name], now[name], gradient, rate * (1 - step / iterations))
            now[name] = rounded(roundings[name])
    after = float(_losses(loss, now, usable, dtype).mean())
    if after < before:
        return Learned(now, after, before, tuple(notes), frozenset(untouched))
    notes.append(f"left as it was at the start, with loss {before:.3g}: after learning it was {after:.3g}")
    return Learned(first, before, before, tuple(notes), frozenset(untouched))


@torch.no_grad()
def _losses(
    loss: Loss, tensors: Mapping[str, QuantizedTensor], windows: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, " windows"]:
    weights = {name: tensor.dequantize(dtype) for name, tensor in tensors.items()}
    return torch.cat([part.double() for part in loss(weights, windows)])


def _gradients(
    loss: Loss, tensors: Mapping[str, QuantizedTensor], windows: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Those of the loss in each weight that it depends on."""
    weights = {name: tensor.dequantize(dtype).requires_grad_() for name, tensor in tensors.items()}
    for part in loss(weights, windows):
        part.sum().backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def block_loss(block: Block) -> Loss:
    """How far the block's outputs are from what the original returned: the mean square, window by window."""
    inputs, wanted, device = block.inputs, block.reference.outputs, block.model.device
    few = max(1, BATCH_TOKENS // inputs.length)

    def read(kept: Activations, windows: Sequence[int]) -> Tensor:
        return torch.cat([kept.read(window, window + 1) for window in windows]).to(device)

    def loss(weights: Mapping[str, Tensor], windows: Sequence[int]) -> Iterator[Tensor]:
        for start in range(0, len(windows), few):
            part = windows[start : start + few]
            error = block.forward(read(inputs, part), weights).float() - read(wanted, part).float()
            yield error.square().mean(dim=(1, 2))

    return loss


@dataclass(frozen=True)
class AutoRound:
    """The stage `autoround`."""

    name: ClassVar[str] = "autoround"
    role: ClassVar[Role] = "quantizer"
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = True
    for_inputs: ClassVar[bool] = False

    scheme: str
    group_size: GroupSize = "auto"
    symmetric: bool = True
    range: Range = "importance"
    start: Start = "nearest"
    iterations: int = 200
    batch_size: int = 8
    """Calibration windows per step."""
    learning_rate: float | None = None
    """Of the first step; null: 1 / iterations."""
    seed: int = 0
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_scheme(self.scheme, self.group_size, self.symmetric)
        check_range(self.range)
        if self.resolved.weights.kind != "int":
            raise ValueError(f"scheme {self.scheme}: autoround learns integer grids, as w4a16 has; use gptq for floats")
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r} must be {' or '.join(get_args(Start))}")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1; 200 is usual. Use rtn to learn nothing")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1; 8 is usual")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and at most 1, or null")

    @property
    def resolved(self) -> Scheme:
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    @property
    def first(self) -> RTN | GPTQ:
        """The stage whose result learning starts from."""
        if self.start == "gptq":
            return GPTQ(self.scheme, self.group_size, self.symmetric, self.range, asymmetric=True)
        return RTN(self.scheme, self.group_size, self.symmetric, self.range)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Quantize the layers in `schemes`: all at once, with their inputs rounded while they are learned.

        The error reported is that of Ŵ x̂ as an approximation of W x̂, which is not what was minimised.
        """
        names = [name for site in block.sites for name in site.layers if name in schemes]
        if not names:
            return []
        weights = {name: block.weight(name) for name in names}
        notes = {report.name: report.fallback for report in self.first.apply(block, schemes)}
        with naming(*names):
            learned = learn(
                {name: begin(weight, block.quantized[name]) for name, weight in weights.items()},
                block_loss(block),
                range(block.inputs.windows),
                iterations=self.iterations,
                batch_size=self.batch_size,
                rate=self.learning_rate or 1 / self.iterations,
                generator=torch.Generator().manual_seed(self.seed),
                dtype=block.model.dtype,
            )
        reports = []
        for site in block.sites:
            for name in (name for name in site.layers if name in schemes):
                hessian = block.moments(site, schemes[name].inputs).hessian
                block.quantize(name, learned.tensors[name], schemes[name].inputs)
                error = relative_error(weights[name], learned.tensors[name].dequantize(), hessian)
                untouched = ["no gradient reached it"] if name in learned.untouched else []
                told = "; ".join(filter(None, [notes[name], *learned.notes, *untouched]))
                reports.append(LayerReport(name, schemes[name].name, error, told or None))
        return reports
