"""Fewer experts: those that add the least to the residual stream go (REAP, arXiv 2510.13999).

An expert's score is how much it adds when it is asked: with g_e(x) the router's weight and f_e(x) its output,

    score_e = mean over the tokens routed to e of  g_e(x) ‖f_e(x)‖.

Those of the lowest score go, with their rows of the router, which sends their tokens to the best of the others. Each
block keeps as many, since config.json has one number for all. Scores are taken in the whole model. An expert that was
asked by no token scores 0; a few tokens say little, so the report counts them.

`merge` adds what goes to what stays: each expert that goes joins the kept one whose outputs are most like its own, by
the cosine over a sample of tokens, and the weights of all that meet are averaged in proportion to the tokens routed to
them. The router's rows stay those of the kept.

On a Mixtral of a million parameters, trained on documentation strings with eight experts a block, the KL divergence
on other texts with 7, 6, 5 and 4 kept is 0.03, 0.04, 0.08 and 0.60; by the number of tokens alone 0.01, 0.04, 0.20 and
0.26, by chance at best 0.15, 0.21, 0.26 and 0.88. Merging makes it worse, 0.14, 0.20, 0.47 and 1.29: of experts that
have no more in common than cosines of 0.3 none can do the work of two, as REAP says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.calibrate.routing import Routing, routings
from compress.core.channels import choose
from compress.core.scheme import Scheme
from compress.errors import naming
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, TensorHeader, read_folder
from compress.models.merged_experts import MergedExperts, mixtures, with_experts
from compress.models.store import LazyModel, Weights
from compress.stage import LayerReport, Learned, Role

if TYPE_CHECKING:
    from compress.calibrate.block import Block

FEW = 100
"""Tokens; of an expert that has seen fewer the score says little."""


def shares(kept: Int[Tensor, " kept"], routing: Routing, merge: bool = False) -> Float[Tensor, "kept experts"]:
    """What each kept expert is made of: itself, or with `merge` the mean, by tokens, of those most like it."""
    member = kept.unsqueeze(1) == torch.arange(len(routing.tokens))
    if not merge:
        return member.double()
    nearest = routing.similarity[kept].argmax(dim=0)
    joins = torch.nn.functional.one_hot(nearest, len(kept)).T.bool()
    joins[:, kept] = member[:, kept]
    used = joins * routing.tokens.double()
    total = used.sum(dim=1, keepdim=True)
    return torch.where(total > 0, used / total.clamp(min=1), member.double())


@dataclass(frozen=True)
class Experts:
    """The stage `experts`."""

    name: ClassVar[str] = "experts"
    role: ClassVar[Role] = "view"
    shrinks: ClassVar[bool] = True
    online: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True
    two_streams: ClassVar[bool] = False
    for_inputs: ClassVar[bool] = False

    keep: int | float
    """Experts of each block that stay; below 1 the share of them."""
    merge: bool = False
    """Average those that go into those that stay."""

    def __post_init__(self) -> None:
        if self.keep <= 0 or (isinstance(self.keep, float) and self.keep >= 1):
            raise ValueError(f"keep={self.keep} must be a number of experts, as 6, or a share below 1, as 0.75")

    def count(self, total: int) -> int:
        """How many stay of so many."""
        return max(1, round(self.keep * total)) if isinstance(self.keep, float) else self.keep

    def problems(self, anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
        paths = mixtures(anatomy, tensors)
        if not paths:
            return [f"{anatomy.family}: has no mixture of experts that is known here. Known are mixtral and qwen3_moe"]
        total = tensors[f"{paths[0]}.gate.weight"].shape[0]
        if self.count(total) >= total:
            return [f"keep={self.keep}: each of {len(paths)} blocks has {total} experts, so none would go. Keep fewer"]
        return []

    def folder(
        self,
        folder: Folder,
        anatomy: Anatomy,
        tensors: Mapping[str, TensorHeader],
        learned: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        total = tensors[f"{mixtures(anatomy, tensors)[0]}.gate.weight"].shape[0]
        return with_experts(folder, anatomy, self.count(total))

    def weights(self, folder: Folder, learned: Mapping[str, Tensor] | None = None) -> Weights:
        """Until it is known which experts stay, the first stand for them."""
        if learned is None:
            return Weights(folder)
        return MergedExperts(folder, Weights(read_folder(folder.path)), learned["kept"], learned["shares"])

    def learn(self, model: LazyModel, tokens: Tensor, scratch: Path, schemes: Mapping[str, Scheme]) -> Learned:
        """Which stay. `model` has the first, so the whole one is opened again."""
        whole = LazyModel.open(model.weights.folder.path, dtype=model.dtype, device=str(model.device))
        paths = mixtures(whole.anatomy, whole.weights.tensors)
        seen = routings(whole, tokens, scratch, paths)
        total = len(seen[paths[0]].tokens)
        kept = {}
        for path in paths:
            with naming(path):
                kept[path] = choose(seen[path].contributions, self.count(total))
        facts = {
            "kept": f"{self.count(total)} of {total} experts",
            "mixtures": {
                path: {
                    "kept": kept[path].tolist(),
                    "tokens": seen[path].tokens.tolist(),
                    "scores": seen[path].contributions.tolist(),
                }
                for path in paths
            },
            "notes": [note for path in paths if (note := hardly_seen(path, seen[path]))],
        }
        made = [shares(kept[path], seen[path], self.merge) for path in paths]
        return Learned({"kept": torch.stack([*kept.values()]), "shares": torch.stack(made)}, facts)

    def apply(self, block: Block, schemes: Mapping[str, Scheme]) -> list[LayerReport]:
        """Nothing is left to do."""
        return []


def hardly_seen(path: str, routing: Routing) -> str | None:
    """A sentence on the experts that saw few tokens, None where all saw enough."""
    few = (routing.tokens < FEW).nonzero().flatten().tolist()
    if not few:
        return None
    told = ", ".join(f"{expert} ({int(routing.tokens[expert])})" for expert in few)
    return f"{path}: fewer than {FEW} calibration tokens were routed to experts {told}: their scores say little"
