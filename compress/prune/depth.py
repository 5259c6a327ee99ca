"""Fewer blocks: those that the model does without best are left out, and the rest move up.

`compress.core.depth` says which, by one of three criteria:

- influence: the blocks that turn the stream least, each by itself (ShortGPT, arXiv 2403.03853);
- window: the blocks in a row that turn it least together (arXiv 2403.17887);
- greedy_kl: one at a time the block without which predictions diverge least from those of the whole model, measured
  again after each (Shortened LLaMA, arXiv 2402.02834, which goes by perplexity; divergence asks for less text).

The first two take one walk in all. Greedy removal takes one for each block that goes: in it the stream parts, into a
branch for every block that is left, which passes that block by and goes on through those behind it
(`compress.calibrate.branches`). Memory holds one block, whatever the model; the branches are files. A loss that was
measured grants no privilege to the first block and the last: they go where they are missed least.

Nothing here makes up for what went. Training does: put `distill` behind. How a model with fewer blocks is stored says
`compress.models.shortened`; what half a block is, `compress.prune.halves`.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from compress.calibrate.activations import Activations
from compress.calibrate.branches import Change, divergences
from compress.calibrate.walk import enter, inputs_of, walk
from compress.core.depth import Turn, greedy, least_influential, nearest_window
from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader
from compress.models.shortened import blocks_of, shortened
from compress.models.store import LazyModel, Weights
from compress.prune.halves import HALVES, Granularity, SilentWeights, Unit, ends_of, units_of, without
from compress.stage import LayerReport, Learned, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

Criterion = Literal["influence", "window", "greedy_kl"]
STAY = 2
"""Blocks that are kept in any case."""


def turns(model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path, span: int = 1) -> list[Turn]:
    """By how much the blocks l … l + span - 1 turn the stream, for each l; the first token of a window is left out.

    `scratch`: an empty folder.
    """
    entrance = enter(model, tokens, inputs_of(0, scratch))
    kept: deque[Activations] = deque(maxlen=span)
    found = []
    for block, outputs in walk(model, entrance, entrance.inputs, scratch, lambda _: None):
        file, inputs = scratch / f"kept-{block.index % span}", block.inputs
        shutil.copyfile(inputs.path, file)
        kept.append(Activations(file, inputs.length, inputs.width, inputs.dtype, inputs.windows))
        if len(kept) == span:
            turn = Turn()
            for window in range(outputs.windows):
                turn = turn.including(*(each.read(window, window + 1)[:, 1:] for each in (kept[0], outputs)))
            found.append(turn)
    return found


def losses(
    model: LazyModel,
    tokens: Int[Tensor, "windows length"],
    scratch: Path,
    units: Sequence[Unit],
    removed: Collection[Unit] = (),
) -> dict[Unit, float]:
    """Of each unit that is left: how far the model without it and without those removed diverges from the whole one.

    The mean KL divergence in nats. `scratch`: an empty folder.
    """
    left = [unit for unit in units if unit not in removed]

    def propose(block: Block) -> Iterator[tuple[Hashable, Change]]:
        here = [unit for unit in units if unit[0] == block.index]
        for unit in left:
            gone = [each for each in here if each in removed or each == unit]
            if gone:
                yield unit, without(block, gone[0][1] if len(gone) < len(here) else "")

    found = divergences(model, tokens, scratch, propose)
    return {unit: found[unit] for unit in left}


@dataclass(frozen=True)
class Depth:
    """The stage `depth`."""

    name: ClassVar[str] = "depth"
    role: ClassVar[Role] = "view"
    shrinks: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    online: ClassVar[bool] = False
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    remove: float
    """How many units; below 1, the share of all of them, rounded down to one at least."""
    criterion: Criterion = "greedy_kl"
    unit: Granularity = "block"
    """A half is attention or an MLP; it is stored as zeros, so nothing becomes smaller."""
    samples: int = 16
    """Calibration windows that the criterion is measured on."""

    def __post_init__(self) -> None:
        for field, kind in (("criterion", Criterion), ("unit", Granularity)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(f"{field}={getattr(self, field)!r} must be one of {', '.join(get_args(kind))}")
        if not self.remove > 0 or (self.remove > 1 and self.remove % 1):
            raise ValueError(f"remove={self.remove:g} must be a whole number of units, or a share of them below 1")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1; 16 is usual")
        if self.unit == "half" and self.criterion != "greedy_kl":
            raise ValueError(f"criterion={self.criterion} looks at whole blocks. Use greedy_kl for halves")

    def count(self, num_blocks: int) -> int:
        """How many units go of a model of so many blocks."""
        if self.remove >= 1:
            return int(self.remove)
        return max(1, math.floor(self.remove * num_blocks * len(units_of(0, self.unit)) + 1e-9))

    def problems(self, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
        blocks = blocks_of(anatomy, tensors)
        shapes = [{name: (header.dtype, header.shape) for name, header in block.items()} for block in blocks]
        most = max(0, len(blocks) - STAY) * len(units_of(0, self.unit))
        found = []
        if self.count(len(blocks)) > most:
            found.append(
                f"remove={self.remove:g} of {len(blocks)} blocks: {STAY} blocks have to stay, so {most} at most"
            )
        if odd := [number for number, block in enumerate(shapes) if block != shapes[0]]:
            found.append(
                f"block {odd[0]} has other tensors than block 0; only where all are alike can some be left out"
            )
        if self.criterion == "greedy_kl" and anatomy.head is None:
            found.append("the model has no head whose predictions could diverge. Use criterion: influence")
        for half in HALVES if self.unit == "half" else ():
            if len(ends := ends_of(anatomy, half)) != 1:
                found.append(f"{len(ends)} layers are known to end the {half} of a block, not one. Use unit: block")
        return found

    def folder(
        self,
        folder: Folder,
        anatomy: Anatomy,
        tensors: Mapping[str, TensorHeader],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        """Until it is known which blocks go, those behind the first stand for them: all are of one size. Of halves it
        is not known how many blocks lose both, so none goes."""
        count = self.count(len(blocks_of(anatomy, tensors))) if self.unit == "block" else 0
        return shortened(folder, anatomy, learned["removed"].tolist() if learned else range(1, 1 + count))

    def weights(self, folder: Folder, learned: Mapping[str, Tensor] | None = None) -> Weights:
        return SilentWeights(folder, {half: learned[half].tolist() for half in HALVES} if learned else {})

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        """Which go. `model` is one of the supposed folder, so the whole one is opened again."""
        whole = LazyModel.open(model.weights.folder.path, dtype=model.dtype, device=str(model.device))
        gone, scores = self.choose(whole, tokens[: self.samples], scratch)
        every = range(len(whole.blocks))
        left = [block for block in every if not {*units_of(block, self.unit)} <= {*gone}]
        learned = {half: [left.index(block) for block in left if (block, half) in gone] for half in HALVES}
        learned["removed"] = [block for block in every if block not in left]
        facts = {
            "criterion": self.criterion,
            "unit": self.unit,
            "removed": [_label(unit) for unit in gone],
            "scores": [{str(_label(unit)): score for unit, score in step.items()} for step in scores],
        }
        return Learned({name: torch.tensor(blocks, dtype=torch.int64) for name, blocks in learned.items()}, facts)

    def choose(
        self, model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path
    ) -> tuple[list[Unit], list[dict[Unit, float]]]:
        """The units that go, in this order, and what the criterion said of each that was left, step by step.

        What it says of a window stands under the window's first block. `scratch`: a folder to be made and removed.
        """
        count = self.count(len(model.blocks))
        if self.criterion == "greedy_kl":
            units = [unit for block in range(len(model.blocks)) for unit in units_of(block, self.unit)]
            gone: list[Unit] = []
            steps: list[dict[Unit, float]] = []
            while len(gone) < count:
                with _emptied(scratch):
                    steps.append(losses(model, tokens, scratch, units, gone))
                gone.append(_least(steps[-1]))
            return gone, steps
        span = count if self.criterion == "window" else 1
        with _emptied(scratch):
            found = turns(model, tokens, scratch, span)
        if self.criterion == "window":
            values = [turn.angular_distance for turn in found]
            blocks = nearest_window(values, count)
        else:
            values = [turn.influence for turn in found]
            blocks = least_influential(values, count)
        return [(block, "") for block in blocks], [{(block, ""): value for block, value in enumerate(values)}]

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []


def _least(loss: Mapping[Unit, float]) -> Unit:
    """The one to go: a step of `greedy`, whose losses all come from one walk."""
    (step,) = greedy([*loss], 1, lambda units: loss[units[0]])
    return step.unit


def _label(unit: Unit) -> int | str:
    block, half = unit
    return f"{block}.{half}" if half else block


@contextmanager
def _emptied(scratch: Path) -> Iterator[None]:
    """Within, an empty folder; afterwards none."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
