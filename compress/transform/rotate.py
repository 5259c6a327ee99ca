"""Rotation: other coordinates for the same function, in which nothing sticks out (QuaRot, arXiv 2404.00456).

A few coordinates of the residual stream are a hundred times larger than the rest, and a token's scale must cover them.
Turned by a random Hadamard matrix every coordinate gets its share. R1, R2 and R4 and what they turn are described in
`compress.models.rotated`; R1 and R2 cost nothing while the model runs, R4 a Hadamard transform before each `down_proj`.
With `steps`, R1 goes on from there by descent (`compress.core.learned_rotation`).

The stage shows the walk another model: it must stand first, and all statistics are of rotated activations. What scales
single channels, SmoothQuant or AWQ, has little left to do behind R1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from compress.core.scheme import Scheme
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader
from compress.models.rotated import RotatedWeights, obstacles, untied
from compress.models.store import LazyModel, Weights
from compress.stage import LayerReport, Learned, Role
from compress.transform.learn_rotation import learn_rotation

if TYPE_CHECKING:
    from compress.calibrate.block import Block


@dataclass(frozen=True)
class Rotate:
    """The stage `rotate`."""

    name: ClassVar[str] = "rotate"
    role: ClassVar[Role] = "view"
    two_streams: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    r1: bool = True
    """Turn the residual stream."""
    r2: bool = True
    """Turn the values of each head."""
    r4: bool = False
    """Turn the inputs of the MLP's last layer while the model runs; the checkpoint says so."""
    steps: int = 0
    """Of descent by which R1 is learned, 200 are usual; 0: it stays a Hadamard matrix."""
    seed: int = 0
    """Of the signs that make a Hadamard matrix a random one."""

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.steps and not self.r1):
            reason = "it is R1 that would be learned, and r1 is false" if self.steps > 0 else "it is a number of steps"
            raise ValueError(f"steps={self.steps}: {reason}. Leave it at 0 to learn nothing")
        if not (self.r1 or self.r2 or self.r4):
            raise ValueError("r1, r2 and r4 are all false: nothing would be rotated. Set one of them")

    @property
    def calibrated(self) -> bool:
        return self.steps > 0

    @property
    def for_inputs(self) -> bool:
        return self.steps > 0

    @property
    def online(self) -> bool:
        return self.r4

    def problems(self, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
        found = obstacles(anatomy, tensors) if self.r1 else []
        return [f"{problem}. Set r1: false to do without" for problem in found]

    def folder(
        self,
        folder: Folder,
        anatomy: Anatomy,
        tensors: Mapping[str, TensorHeader],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        return untied(folder, anatomy, tensors) if self.r1 else folder

    def weights(self, folder: Folder, learned: Mapping[str, Tensor] | None = None) -> Weights:
        further = learned["rotation"] if learned else None
        return RotatedWeights(folder, r1=self.r1, r2=self.r2, r4=self.r4, seed=self.seed, further=further)

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        inputs = {name: scheme.inputs for name, scheme in schemes.items() if scheme.inputs}
        found = learn_rotation(model, tokens, scratch, inputs, steps=self.steps, seed=self.seed)
        facts = {"error_before": found.before, "error_after": found.after, "notes": list(found.notes)}
        return Learned({"rotation": found.rotation}, facts)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []
