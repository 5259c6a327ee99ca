"""The contract every stage honours.

A stage is a frozen dataclass: its fields are what a recipe may say, `apply` is what it does to one transformer block.
The walk hands it a block whose predecessors are finished; the stage observes what it needs, rewrites or quantizes
layers, and reports each. After `apply` the block still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import Int
from torch import Tensor

from compress.calibrate.block import Block
from compress.core.scheme import Scheme
from compress.core.sparsity import Pattern
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader
from compress.models.store import LazyModel, Weights

Role = Literal[
    "quantizer", "transform", "corrector", "view", "allocator", "cache", "pruner", "shaper", "trainer", "searcher"
]
"""A quantizer owns layers and puts them on their grids; a transform rewrites them beforehand, function preserved, and a
corrector makes up for what was lost. A view changes the model as a whole before the walk, and an allocator decides the
bits of the quantizers behind it. A cache stage decides how the model keeps keys and values while it runs. A pruner
takes weights out, by making them zero; a shaper takes out what makes matrices smaller. A trainer learns. A searcher
stands for the stages that it finds."""


LEARNED = "learned.safetensors"
"""Beside the weights of a trained folder: what a quantizer finds there that learned its grids."""


@dataclass(frozen=True)
class LayerReport:
    """What a stage did to one layer."""

    name: str
    scheme: str
    error: float
    """Relative squared error of the layer's output on the calibration inputs; of its weight where none were seen."""
    fallback: str | None = None
    """What had to be done instead of the method asked for, and why."""


class Stage(Protocol):
    """One step of a recipe that works block by block."""

    name: ClassVar[str]
    """Its key in a recipe."""
    role: ClassVar[Role]

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration inputs."""
        ...

    @property
    def for_inputs(self) -> bool:
        """Whether it is of use only where inputs are rounded."""
        ...

    @property
    def two_streams(self) -> bool:
        """Whether it needs `block.reference`: what the original model computes of the same windows."""
        ...

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Work on one block. `schemes`: the layers a quantizer owns here, or, for a transform, every layer that a later
        stage quantizes."""
        ...


@dataclass(frozen=True)
class Learned:
    """What calibration has taught a stage before the walk."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """For the report; plain data."""


@dataclass(frozen=True)
class Unit:
    """Layers that must be quantized alike, and what each choice would make of them."""

    layers: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    bytes: tuple[int, ...]
    """By choice, of all layers together."""
    num_weights: int


class Allocator(Stage, Protocol):
    """A stage that decides, from calibration and before the walk, the bits of the quantizers behind it."""

    def budget(self, units: Sequence[Unit]) -> int:
        """In bytes."""
        ...

    def decide(self, model: LazyModel, tokens: Tensor, scratch: Path, units: Sequence[Unit]) -> dict[str, Any]:
        """Layer → bits under `bits`, and what the report shows of the decision; plain data."""
        ...


class Pruner(Stage, Protocol):
    """A stage that owns layers as a quantizer does, and takes weights out of them."""

    owl: bool
    """Whether it decides, from calibration and before the walk, how many from each."""

    def decide(self, model: LazyModel, tokens: Tensor, scratch: Path, names: Collection[str]) -> dict[str, float]:
        """Layer → its share of zeros."""
        ...

    def prune(self, block: Block, patterns: Mapping[str, Pattern]) -> list[LayerReport]:
        """Work on these layers of one block."""
        ...


class Shaper(Stage, Protocol):
    """A stage that takes whole channels or heads out of each block, by `Block.rewrite`, so that its matrices shrink.

    It is a run of its own: an ordinary folder goes in, an ordinary folder comes out.
    """

    def problems(self, folder: Folder, anatomy: Anatomy) -> list[str]:
        """Why it cannot be done to this model, a sentence each."""
        ...

    def folder(self, folder: Folder, anatomy: Anatomy) -> Folder:
        """What comes out: config and headers, worked out from those that go in."""
        ...

    @property
    def learns(self) -> bool:
        """Whether it has to know something of the model as it is, before the first block shrinks."""
        ...

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        """What that is, asked for if it `learns`. `scratch`: a folder to be made and removed."""
        ...

    def shape(self, block: Block, learned: Mapping[str, Tensor]) -> list[LayerReport]:
        """Work on one block; inputs are what the blocks before it make now that they have shrunk. `learned`: what came
        of `learn`; nothing if it was not asked for."""
        ...


class Trainer(Stage, Protocol):
    """A stage that trains the model as a whole, towards the one that the run began with.

    It is a run of its own: an ordinary folder goes in, one of the same shapes comes out.
    """

    dataset: str | None
    """What is trained on; None: what is left of the calibration text."""

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any], length: int) -> list[str]:
        """Why this model cannot be trained, a sentence each. `length`: of calibration windows."""
        ...

    def train(
        self,
        student: Path,
        teacher: Path,
        windows: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        work: Path,
        tell: Callable[[str, float, str], None],
    ) -> Trained:
        """Train the model of the folder `student`, towards that of `teacher`.

        `work`: a folder to be made, from which a training that was killed goes on exactly where it was. `tell`: of
        phase, share and words.
        """
        ...


class Trained(Protocol):
    """What came of a training."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameter name → value, float32; of tied ones the first."""
        ...

    @property
    def learned(self) -> dict[str, Tensor]:
        """What else a learner needs in the walk; it is kept beside the weights, in `LEARNED`."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """For the report; plain data."""
        ...


class View(Stage, Protocol):
    """A stage that changes the model as a whole, before the walk: its tensors are rewritten as they are read."""

    @property
    def shrinks(self) -> bool:
        """Whether the model that comes out has another shape. Then it is a run of its own, as a shaper's is."""
        ...

    @property
    def online(self) -> bool:
        """Whether something is left to be done to inputs while the model runs."""
        ...

    def problems(self, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
        """Why it cannot be done to this model, a sentence each."""
        ...

    def folder(
        self,
        folder: Folder,
        anatomy: Anatomy,
        tensors: Mapping[str, TensorHeader],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        """What the folder will look like to a reader: config and headers. `learned`: what came of `learn`, None: not
        known yet."""
        ...

    def weights(self, folder: Folder, learned: Mapping[str, Tensor] | None = None) -> Weights:
        """The tensors of such a folder."""
        ...

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        """What calibration says the view should be, asked for if it is `calibrated`. `scratch`: a folder to be made and
        removed."""
        ...
