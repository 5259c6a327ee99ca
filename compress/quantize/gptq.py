"""GPTQ: round column by column, and let the columns still to come make up for each error.

For one linear layer with inputs x and H = E[x xᵀ], minimise the output error tr((W - Ŵ) H (W - Ŵ)ᵀ) over weights on
the grid. With H⁻¹ = Uᵀ U (U upper), for each column j in turn

    ŵ_j = nearest level to w_j        e = (w_j - ŵ_j) / U_jj        w_k ← w_k - e U_jk   for all k > j

which after every column leaves the best the remaining real weights can do. All rows share U, so layers with the same
input are stacked and solved as one. (GPTQ, arXiv 2210.17323; the same recursion is Babai's nearest plane.)

Where we go beyond the paper, each step measured on trained weights:
- Ranges minimise the squared error weighted by E[x²] instead of covering every weight, on the full-range grid.
- The order. The error to expect is Σ_j U_jj⁻², whose terms have a fixed product; `act_order="static"` picks the order
  greedily so that their sum is small (`compress.core.linalg.pivot_order`), where the paper sorts by H_jj. Groups keep
  their original columns and scales: nothing about the order has to be stored.
- `act_order="group"` keeps whole groups together (sorted inside and out by H_jj), so that a group's range can be taken
  when its turn comes, from the weights as updated by then. `"none"` does that in the natural order.
- Afterwards scales and codes are revisited by coordinate descent (`compress.quantize.refine`).
- Given how the inputs differ from the original model's, the errors of earlier layers are made up for as well
  (`compress.quantize.asymmetric`): W is then replaced by a target from the start.

Float grids (FP8, NVFP4, MXFP4, NF4) go through the same loop, with scales chosen beforehand and not revisited.

Weights that are exactly zero stay zero: a pruned layer keeps its pattern, whoever pruned it.

Inputs that never fired have an undefined column in H; they are made independent of all others, so their weights are
rounded to nearest. Should H defy Cholesky under all damping, so are all weights, and the result says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from compress.core.columns import Feedback, round_float, round_integer
from compress.core.linalg import NotPositiveDefinite, dead_columns, inverse_cholesky, pivot_order
from compress.core.metrics import relative_error
from compress.core.qtensor import QuantizedTensor
from compress.core.ranges import Range
from compress.core.scheme import Grid, GroupSize, Scheme, parse_scheme
from compress.errors import NumericalError, naming
from compress.quantize.asymmetric import LIMIT, Target, closed_form, gptaq, qronos
from compress.quantize.refine import refine
from compress.quantize.rtn import check_range, rtn
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block
    from compress.calibrate.sites import BlockSite

ActOrder = Literal["none", "static", "group"]
SLICE = 1 << 22
"""Weights solved together, which bounds the memory; rows do not depend on each other."""


@dataclass(frozen=True)
class GPTQResult:
    """A quantized weight, and what it took."""

    tensor: QuantizedTensor
    damping: float
    """The damping that made H positive definite, as a fraction of its mean diagonal."""
    fallback: str | None
    """Why the weights were rounded to nearest instead, if they were."""
    num_dead: int
    """Inputs that were zero on every calibration token."""
    moved: Float[Tensor, " out"]
    """How far each output channel was to move before it was rounded, relative to its norm; LIMIT of it was granted."""


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    range: Range = "importance",
    act_order: ActOrder = "static",
    damping: float = 0.01,
    block_size: int = 128,
    sweeps: int = 2,
    cross: Float[Tensor, "in in"] | None = None,
    target: Target = "closed",
    share: float = 0.5,
) -> GPTQResult:
    """Quantize `weight` for inputs with second moments `hessian`.

    With the moments `cross` of the original model's inputs with these, the output to reproduce is that of the original:
    by the closed form, or by GPTAQ or Qronos in the loop and the closed form in the refinement; `share` of the way.
    Weights that are zero stay zero.

    The column loop runs in float32, the factorisation in the dtype of `hessian` (float64 wanted). `block_size`: columns
    between two updates of all later columns, which changes the speed only. `sweeps` of refinement, 0 for plain GPTQ.
    Raises NumericalError where the weight, the Hessian or the cross moment is not finite.
    """
    if not hessian.isfinite().all():
        bad = int((~hessian.isfinite()).sum())
        raise NumericalError(f"the Hessian has {bad} NaN or infinite entries of {hessian.numel()}")
    observed = hessian
    dead = dead_columns(hessian)
    num_dead = int(dead.sum())
    if num_dead:
        hessian = hessian.masked_fill(dead | dead.unsqueeze(1), 0)
        hessian.diagonal()[dead] = hessian.diagonal().mean()
    importance = hessian.diagonal().float()
    goal = weight.float()
    moved = goal.new_zeros(len(goal))
    try:
        if cross is not None:
            goal, moved = closed_form(goal, observed, cross, damping=damping, share=share)
        order = _order(hessian, grid, act_order, damping)
        upper, used = inverse_cholesky(hessian, damping, order)
    except NotPositiveDefinite as error:
        nearest = rtn(weight, grid, scale_dtype=scale_dtype, range=range, importance=importance)
        return GPTQResult(nearest, damping, f"round to nearest, because {error}", num_dead, moved)
    start, pull = goal, None
    if cross is not None and target == "gptaq":
        start, pull = weight.float(), gptaq(observed, cross, upper, order, share=share).float()
    elif cross is not None and target == "qronos":
        start = qronos(weight.float(), goal, observed, cross, upper, order, share=share)
    upper = upper.div_(upper.diagonal().unsqueeze(1).clone()).float()
    feedback = Feedback(order, upper, pull, block_size)
    del upper, pull
    size = max(1, SLICE // weight.shape[1])
    zeros = [_zeros(rows) for rows in weight.split(size)]
    if grid.kind != "int":
        nearest = rtn(goal, grid, scale_dtype=scale_dtype, range=range, importance=importance)
        slices = zip(start.split(size), zeros, nearest.step.split(size), strict=True)
        codes = [round_float(rows, at, feedback, grid, step) for rows, at, step in slices]
        return GPTQResult(replace(nearest, codes=torch.cat(codes)), used, None, num_dead, moved)
    static = act_order == "static"
    parts = [
        round_integer(rows, at, feedback, grid, scale_dtype, range, importance, static)
        for rows, at in zip(start.split(size), zeros, strict=True)
    ]
    del feedback
    if sweeps:
        metric = hessian.float()
        parts = [
            refine(rows, part, metric, zeros=at, damping=used, sweeps=sweeps)
            for rows, part, at in zip(goal.split(size), parts, zeros, strict=True)
        ]
    return GPTQResult(_stack(parts), used, None, num_dead, moved)


def _zeros(weight: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"] | None:
    """Where a weight is exactly zero; None where none is."""
    zeros = weight == 0
    return zeros if zeros.any() else None


def _order(hessian: Tensor, grid: Grid, act_order: ActOrder, damping: float) -> Int[Tensor, "in"]:
    """The columns in the order they are rounded in."""
    if act_order == "static":
        return pivot_order(hessian, damping)
    columns = torch.arange(len(hessian), device=hessian.device)
    if act_order == "none":
        return columns
    energy = hessian.diagonal().view(grid.num_groups(len(hessian)), -1)
    within = columns.view_as(energy).gather(1, energy.argsort(dim=1, descending=True, stable=True))
    return within[energy.amax(dim=1).argsort(descending=True, stable=True)].flatten()


def _stack(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of the rows of all."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].grid,
    )


def _unstack(tensor: QuantizedTensor, rows: Sequence[int]) -> list[QuantizedTensor]:
    """The inverse of stacking layers of `rows` output channels each."""
    zeros = [None] * len(rows) if tensor.zero_point is None else tensor.zero_point.split(list(rows))
    parts = zip(tensor.codes.split(list(rows)), tensor.scale.split(list(rows)), zeros, strict=True)
    return [QuantizedTensor(codes, scale, zero, tensor.grid, tensor.global_scale) for codes, scale, zero in parts]


@dataclass(frozen=True)
class GPTQ:
    """The stage `gptq`."""

    name: ClassVar[str] = "gptq"
    role: ClassVar[Role] = "quantizer"
    calibrated: ClassVar[bool] = True
    for_inputs: ClassVar[bool] = False

    scheme: str
    group_size: GroupSize = "auto"
    symmetric: bool = True
    range: Range = "importance"
    act_order: bool | ActOrder = True
    """True means "static", False "none"."""
    damping: float = 0.01
    block_size: int = 128
    sweeps: int = 2
    asymmetric: bool | Target = False
    """Whether to make up for the errors of earlier layers. True means "closed"."""
    share: float = 0.5
    """How much of them, where `asymmetric`."""
    layers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_scheme(self.scheme, self.group_size, self.symmetric)
        check_range(self.range)
        if not isinstance(self.act_order, bool) and self.act_order not in get_args(ActOrder):
            raise ValueError(f"act_order={self.act_order!r} must be true, false, {', '.join(get_args(ActOrder))}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping={self.damping} must be above 0 and at most 1; 0.01 is usual")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1; 128 is usual")
        if self.sweeps < 0:
            raise ValueError(f"sweeps={self.sweeps} must be at least 0, which is GPTQ without refinement")
        if not isinstance(self.asymmetric, bool) and self.asymmetric not in get_args(Target):
            raise ValueError(f"asymmetric={self.asymmetric!r} must be true, false, {', '.join(get_args(Target))}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1; 0.5 is usual")

    @property
    def resolved(self) -> Scheme:
        return parse_scheme(self.scheme, self.group_size, self.symmetric)

    @property
    def order(self) -> ActOrder:
        """`act_order` by its full name."""
        if isinstance(self.act_order, bool):
            return "static" if self.act_order else "none"
        return self.act_order

    @property
    def two_streams(self) -> bool:
        """Whether it needs the inputs of the original model beside those of the compressed one."""
        return self.asymmetric is not False

    @property
    def target(self) -> Target:
        """`asymmetric` by its full name, where it is wanted."""
        return "closed" if isinstance(self.asymmetric, bool) else self.asymmetric

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Quantize the layers in `schemes`, site by site, each on inputs that the sites before have already changed.

        The error reported is that of Ŵ x̂ as an approximation of W x̂. If `asymmetric`, W x is approximated instead, and
        that error would take E[x xᵀ] as well: what is reported is then higher than without, and does not show the gain.
        """
        return [
            report
            for site in block.sites
            for alike in _alike([name for name in site.layers if name in schemes], schemes, block)
            for report in self._quantize(block, site, alike, schemes[alike[0]])
        ]

    def _quantize(self, block: Block, site: BlockSite, names: Sequence[str], scheme: Scheme) -> list[LayerReport]:
        moments = block.moments(site, scheme.inputs, cross=self.two_streams)
        weights = [block.weight(name) for name in names]
        rows = [len(weight) for weight in weights]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        weights = list(stacked.split(rows))
        with naming(*names):
            result = gptq(
                stacked,
                moments.hessian,
                scheme.weights,
                scale_dtype=block.scale_dtype(names[0]),
                range=self.range,
                act_order=self.order,
                damping=self.damping,
                block_size=self.block_size,
                sweeps=self.sweeps,
                cross=moments.cross,
                target=self.target,
                share=self.share,
            )
        notes = [result.fallback] if result.fallback else []
        if result.damping > self.damping:
            notes.append(f"damping {result.damping:g}, not {self.damping:g}: the Hessian was not positive definite")
        if moments.num_dropped:
            seen = moments.num_tokens + moments.num_dropped
            notes.append(f"{moments.num_dropped} of {seen} calibration tokens were not finite and left out")
        reports = []
        tensors = _unstack(result.tensor, rows)
        for name, weight, tensor, moved in zip(names, weights, tensors, result.moved.split(rows), strict=True):
            block.quantize(name, tensor, scheme.inputs)
            lost = relative_error(weight, tensor.dequantize(), moments.hessian)
            far = moved[moved > LIMIT]
            held = [f"{len(far)} channels held to {LIMIT} of their norm, not {far.max():.2f}"] if len(far) else []
            reports.append(LayerReport(name, scheme.name, lost, "; ".join(notes + held) or None))
        return reports


def _alike(names: Sequence[str], schemes: Mapping[str, Scheme], block: Block) -> list[list[str]]:
    """Layers of one input that go onto the same grid, and so can be stacked; not where rows share scales."""
    stacks: dict[tuple[Scheme, torch.dtype, str], list[str]] = {}
    for name in names:
        own = "" if schemes[name].weights.rows == 1 else name
        stacks.setdefault((schemes[name], block.scale_dtype(name), own), []).append(name)
    return list(stacks.values())
