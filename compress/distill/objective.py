"""The objective: what a student is trained on, as a weighted sum of parts.

    L = λ · T² D(teacher, student) + λ_ce · cross-entropy + λ_h · hidden states + λ_r · value relations

each a mean over valid tokens. The divergence alone is the rule: a student that was made from its teacher by pruning or
quantization is healed better by forward KL at T = 1 than by any mixture with the cross-entropy (Minitron, arXiv
2407.14679). The other parts are for students that are built in another way, and begin with little (TinyBERT, MiniLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from compress.distill.divergences import Kind, divergence_of
from compress.distill.features import Projection, hidden_losses, relation_losses
from compress.distill.losses import CHUNK_BYTES, TopK, cross_entropy, mean_over_valid, token_losses

PARTS = ("divergence", "cross_entropy", "hidden", "relations")


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model computed for some windows; more than the logits only where the objective asks for it."""

    logits: Float[Tensor, "windows length vocabulary"]
    hidden: Sequence[Float[Tensor, "windows length width"]] = ()
    """States of the blocks that are compared, in one order for student and teacher."""
    values: Float[Tensor, "windows length width"] | None = None
    """Of all heads side by side, in the block whose relations are compared; MiniLM takes the last."""


@dataclass(frozen=True, eq=False)
class Loss:
    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    """Name → loss before its weight, without a graph; only those with a weight."""


@dataclass(frozen=True)
class Objective:
    """Which parts, with which weights."""

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    mixture: float | None = None
    """β of jsd, α of the skew divergences; null: 0.5 and 0.1."""
    divergence: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    relations: float = 0.0
    relation_heads: int | None = None
    """Heads that values are cut into for their relations."""

    def __post_init__(self) -> None:
        divergence_of(self.kind, self.mixture)
        if not 0 < self.temperature < torch.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0; 1 is usual")
        weights = {name: getattr(self, name) for name in PARTS}
        for name, weight in weights.items():
            if not 0 <= weight < torch.inf:
                raise ValueError(f"{name}={weight} is a weight and must be 0 or more")
        if not any(weights.values()):
            raise ValueError(f"nothing to train on: one of {', '.join(PARTS)} must be above 0")
        if (self.relations > 0) != (self.relation_heads is not None):
            raise ValueError("relation_heads goes with relations: give both, or neither")

    def loss(
        self,
        student: Outputs,
        teacher: Outputs | TopK | None,
        valid: Bool[Tensor, "windows length"],
        *,
        count: int | None = None,
        targets: Int[Tensor, "windows length"] | None = None,
        projections: Sequence[Projection] = (),
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Loss:
        """The loss of some windows; gradients reach the student and the projections.

        `teacher`: None where there is only cross-entropy, a `TopK` where there are divergence and cross-entropy only.
        `valid`: tokens whose next one is to be learned. `count`: of valid tokens in all batches whose gradients add
        up. `targets`: the token after each. `projections`: one for each of `student.hidden`. Raises ValueError
        where something is missing or does not fit.
        """
        losses = {}
        if self.divergence:
            if teacher is None:
                raise ValueError(f"divergence={self.divergence:g} needs a teacher; set it to 0 to train without one")
            beliefs = teacher if isinstance(teacher, TopK) else teacher.logits
            divergence = divergence_of(self.kind, self.mixture)
            losses["divergence"] = token_losses(student.logits, beliefs, divergence, self.temperature, chunk_bytes)
        if self.cross_entropy:
            if targets is None:
                raise ValueError(f"cross_entropy={self.cross_entropy:g} needs targets, the token after each")
            losses["cross_entropy"] = cross_entropy(student.logits, targets, chunk_bytes)
        if self.hidden:
            states = _features(teacher, "hidden").hidden
            if not len(student.hidden) == len(states) == len(projections) > 0:
                raise ValueError(
                    f"hidden={self.hidden:g} needs as many states of the student as of the teacher, and a projection "
                    f"for each: there are {len(student.hidden)}, {len(states)} and {len(projections)}"
                )
            each = [hidden_losses(*pair) for pair in zip(student.hidden, states, projections, strict=True)]
            losses["hidden"] = torch.stack(each).mean(dim=0)
        if self.relations:
            values = _features(teacher, "relations").values
            if student.values is None or values is None:
                raise ValueError(f"relations={self.relations:g} needs the values of student and teacher")
            assert self.relation_heads is not None, "checked when it was made"
            losses["relations"] = relation_losses(student.values, values, valid, self.relation_heads)
        means = {name: mean_over_valid(part, valid, count) for name, part in losses.items()}
        total = torch.stack([getattr(self, name) * part for name, part in means.items()]).sum()
        return Loss(total, {name: part.detach() for name, part in means.items()})


def _features(teacher: Outputs | TopK | None, part: str) -> Outputs:
    if isinstance(teacher, Outputs):
        return teacher
    found = "a cached teacher, which has probabilities only" if isinstance(teacher, TopK) else "no teacher"
    raise ValueError(f"{part} needs what the teacher computes on the way, and there is {found}; set its weight to 0")
