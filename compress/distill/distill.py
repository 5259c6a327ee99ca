"""Distillation as a stage: the model, whatever has been taken out of it, learns to answer as the original does.

What is minimised is said by `objective` (`compress.distill.objective`): by default the forward KL divergence from the
original's distribution of the next token, and nothing else, which heals a pruned model better than any mixture with
plain text does (Minitron, arXiv 2407.14679). How it is minimised is said by `training` (`compress.distill.train`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Int
from torch import Tensor

from compress.core.scheme import Scheme
from compress.distill.objective import Objective
from compress.distill.train import Trained, Training, obstacles, train
from compress.models.anatomy import Anatomy
from compress.stage import LayerReport, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block


@dataclass(frozen=True)
class Distill:
    """The stage `distill`."""

    name: ClassVar[str] = "distill"
    role: ClassVar[Role] = "trainer"
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True
    """Its text is what calibration leaves, unless it has its own."""

    dataset: str | None = None
    """A named dataset or a local file; null: the calibration text, without what calibration and scoring use of it."""
    objective: Objective = field(default_factory=Objective)
    training: Training = field(default_factory=Training)

    def problems(self, anatomy: Anatomy, config: Mapping[str, Any], length: int) -> list[str]:
        return obstacles(self.training, self.objective, anatomy, config, length)

    def train(
        self,
        student: Path,
        teacher: Path,
        windows: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        work: Path,
        tell: Callable[[str, float, str], None],
    ) -> Trained:
        """Train the model of the folder `student` towards that of `teacher`."""
        return train(student, teacher, windows, held_out, self.training, self.objective, work, tell)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """There is nothing to do in a walk."""
        return []
