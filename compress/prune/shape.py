"""A shape under a budget: how many blocks go, how wide the others stay, so that predictions diverge least.

A shape is a number of blocks that are removed, a share of the MLP's channels and a share of the heads. What each
costs in parameters and bytes the headers say. What it costs in divergence is measured, in three steps:

- each choice alone, all else as in the original: c(k) of k blocks, c(r) of channels, c(h) of heads;
- every shape within the budget is ranked by the sum c(k) + c(r) + c(h). Of these only the tightest count, which could
  give nothing back: a milder shape within the budget is better by all that is known;
- the first of the ranking are built and measured as a whole, since sums are only about right. Of pocket-llama-13m at
  85 % of its parameters they were within 3 % of what five shapes measured, and in that order; of stories260k at 60 % up
  to 30 % above, and of six the third and the fifth had to change places.

Minitron (arXiv 2407.14679) enumerates shapes as well, but trains each candidate a little and goes by its loss then.
That costs a training for each; here divergence before healing decides. Puzzle (arXiv 2411.19146) adds up scores too,
of blocks that may all differ: plain transformers loads no such model.

Latency is not known from headers. Written one at a time, a token costs about the time it takes to read the weights, so
their bytes stand in for it until candidates are timed (`compress.pipeline.search`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from compress.core.scheme import Scheme
from compress.errors import ModelError
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, canonical
from compress.models.shortened import blocks_of
from compress.prune.depth import STAY, Depth
from compress.prune.width import Width
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

BUDGETS = ("parameters", "bytes", "latency")
ROUNDING = 1e-9
"""By which a share may exceed a budget."""


@dataclass(frozen=True)
class Choice:
    """A shape, beside the original's."""

    removed: int = 0
    """Blocks."""
    ffn: float = 1.0
    heads: float = 1.0

    @property
    def parts(self) -> tuple[Choice, ...]:
        """What it is made of: choices of one thing each."""
        alone = Choice(removed=self.removed), Choice(ffn=self.ffn), Choice(heads=self.heads)
        return tuple(part for part in alone if part != Choice())

    def milder(self, other: Choice) -> bool:
        """Whether it takes no more of anything, and less of something."""
        less = self.removed <= other.removed and self.ffn >= other.ffn and self.heads >= other.heads
        return less and self != other

    def stages(self, samples: int) -> tuple[Depth | Width, ...]:
        """Those that make it. `samples`: windows by which blocks are chosen."""
        depth = [Depth(remove=self.removed, samples=samples)] if self.removed else []
        width = [Width(ffn=self.ffn, heads=self.heads)] if min(self.ffn, self.heads) < 1 else []
        return (*depth, *width)

    def __str__(self) -> str:
        return f"remove {self.removed}, ffn {self.ffn:g}, heads {self.heads:g}"


def tightest(shares: Mapping[Choice, float], budget: float) -> list[Choice]:
    """The choices within a budget than which no milder one is. `shares`: of what the budget is a share of."""
    within = [choice for choice, share in shares.items() if share <= budget + ROUNDING]
    return [choice for choice in within if not any(other.milder(choice) for other in within)]


def predicted(choice: Choice, alone: Mapping[Choice, float]) -> float:
    """Its divergence, if those of its parts add up. `alone`: of each part by itself."""
    return sum(alone[part] for part in choice.parts)


def best(choices: Iterable[Choice], alone: Mapping[Choice, float], count: int) -> list[Choice]:
    """The `count` choices of least predicted divergence, ascending."""
    return sorted(choices, key=lambda choice: predicted(choice, alone))[:count]


@dataclass(frozen=True)
class Shape:
    """The stage `shape`: put it first. It stands for the stages `depth` and `width` that it finds."""

    name: ClassVar[str] = "shape"
    role: ClassVar[Role] = "searcher"
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    parameters: float | None = None
    """The share of the original's that may stay: of this or one of the next two."""
    bytes: float | None = None
    latency: float | None = None
    """Of the time it takes to write a token, where the run takes place."""
    ffn: tuple[float, ...] = (1.0, 0.875, 0.75, 0.625, 0.5)
    """Shares of an MLP's channels to choose from."""
    heads: tuple[float, ...] = (1.0,)
    max_removed: int | None = None
    """Blocks; None: as many as the budget asks for."""
    candidates: int = 3
    """Shapes that are measured as a whole."""
    samples: int = 16
    """Calibration windows of the search; the last quarter measures what the others have fitted."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are given" if given else "no budget is given"
            raise ValueError(f"{told}: set one of {', '.join(BUDGETS)} to a share of the original's, as 0.7")
        if not 0 < self.budget < 1:
            raise ValueError(f"{self.kind}={self.budget} must be the share that may stay, above 0 and below 1")
        for name, shares in (("ffn", self.ffn), ("heads", self.heads)):
            if not shares or not all(0 < share <= 1 for share in shares):
                raise ValueError(f"{name}={list(shares)} must be shares that stay, above 0 and at most 1")
        for name, least in (("max_removed", 0), ("candidates", 1), ("samples", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")

    @property
    def kind(self) -> str:
        """What the budget is a share of."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def budget(self) -> float:
        return getattr(self, self.kind)

    def problems(self, folder: Folder, anatomy: Anatomy) -> list[str]:
        """Why no shape can be found for this model, a sentence each."""
        if anatomy.head is None:
            return ["the model has no head whose predictions could diverge. Use depth or width"]
        found = []
        if self._most(folder, anatomy):
            found += [f"{problem}. Set max_removed: 0" for problem in _unshortened(folder, anatomy)]
        for ffn in (share for share in self.ffn if share < 1):
            found += Width(ffn=ffn).problems(folder, anatomy)
        for heads in (share for share in self.heads if share < 1):
            found += Width(heads=heads).problems(folder, anatomy)
        if found:
            return [*dict.fromkeys(found)]
        shares = self.shares(folder, anatomy)
        smallest = min(shares, key=lambda choice: shares[choice])
        if shares[smallest] > self.budget + ROUNDING:
            reached = math.ceil(1000 * shares[smallest]) / 1000
            return [
                f"{self.kind}={self.budget} cannot be reached: the smallest shape, {smallest}, comes to {reached}. Ask "
                "for that, or offer smaller ffn and heads"
            ]
        return []

    def shares(self, folder: Folder, anatomy: Anatomy) -> dict[Choice, float]:
        """Of every shape, what it has of what the budget is a share of. Blocks are all of one size."""
        most, whole = self._most(folder, anatomy), self._size(folder, anatomy)
        shorter = _without_one(folder, anatomy) if most else folder
        found: dict[Choice, float] = {}
        for ffn, heads in product(self.ffn, self.heads):
            full, less = (self._size(_narrower(each, anatomy, ffn, heads), anatomy) for each in (folder, shorter))
            found |= {Choice(k, ffn, heads): (full - k * (full - less)) / whole for k in range(most + 1)}
        return found

    def fitting(self, folder: Folder, anatomy: Anatomy) -> list[Choice]:
        """The tightest within the budget, the largest first."""
        shares = self.shares(folder, anatomy)
        return sorted(tightest(shares, self.budget), key=lambda choice: shares[choice], reverse=True)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []

    def _most(self, folder: Folder, anatomy: Anatomy) -> int:
        """Blocks that may go."""
        spare = max(0, len(blocks_of(anatomy, canonical(folder.tensors, anatomy))) - STAY)
        return spare if self.max_removed is None else min(spare, self.max_removed)

    def _size(self, folder: Folder, anatomy: Anatomy) -> int:
        """What the budget is a share of; for latency the bytes that are read for a token: of an embedding next to none,
        unless it is the head too."""
        tensors = canonical(folder.tensors, anatomy)
        if self.parameters is not None:
            return sum(math.prod(header.shape) for header in folder.tensors.values())
        looked_up = f"{anatomy.embedding}.weight" if self.latency and f"{anatomy.head}.weight" in tensors else ""
        return sum(header.nbytes for name, header in tensors.items() if name != looked_up)


def _without_one(folder: Folder, anatomy: Anatomy) -> Folder:
    return Depth(remove=1).folder(folder, anatomy, canonical(folder.tensors, anatomy))


def _narrower(folder: Folder, anatomy: Anatomy, ffn: float, heads: float) -> Folder:
    return Width(ffn=ffn, heads=heads).folder(folder, anatomy) if min(ffn, heads) < 1 else folder


def _unshortened(folder: Folder, anatomy: Anatomy) -> list[str]:
    """Why no block can go."""
    problems = Depth(remove=1).problems(anatomy, canonical(folder.tensors, anatomy))
    try:
        if not problems:
            _without_one(folder, anatomy)
    except ModelError as error:
        problems.append(str(error))
    return problems
