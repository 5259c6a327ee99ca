"""A mixture with fewer experts: the router loses rows, and each expert that stays may be a mean of several.

Which stay, and what each is made of, is not decided here. config.json has one number of experts for all blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.models.anatomy import Anatomy
from compress.models.experts import EXPERT
from compress.models.headers import Folder, TensorHeader, canonical
from compress.models.store import Weights

COUNTS = ("num_local_experts", "num_experts")
"""What configs call the number of experts."""
ROUTED = "num_experts_per_tok"
"""What they call the number that a token is sent to."""


class MergedExperts(Weights):
    """The tensors of a folder `with_experts`.

    `whole`: those of the model with all experts. `kept`: by mixture, in the order of the blocks, the rows of the router
    that stay; `shares`: what each of its experts is made of, rows that add up to 1.
    """

    def __init__(
        self,
        folder: Folder,
        whole: Weights,
        kept: Int[Tensor, "mixtures kept"],
        shares: Float[Tensor, "mixtures kept experts"],
    ) -> None:
        super().__init__(folder)
        self._whole = whole
        paths = mixtures(self.anatomy, whole.tensors)
        self._kept = dict(zip(paths, kept, strict=True))
        self._shares = dict(zip(paths, shares, strict=True))

    def read(self, name: str) -> Tensor:
        expert = EXPERT.fullmatch(name)
        path = name.removesuffix(".gate.weight")
        if path in self._kept:
            return self._whole.read(name)[self._kept[path]]
        if not expert:
            return super().read(name)
        path = expert["path"].rpartition(".")[0]
        shares = self._shares[path][int(expert["number"])]
        parts = {
            part: f"{expert['path']}.{part}.{expert['matrix']}.weight" for part in shares.nonzero().flatten().tolist()
        }
        if len(parts) == 1:
            return self._whole.read(*parts.values())
        mean = sum(shares[part] * self._whole.read(each).double() for part, each in parts.items())
        return torch.as_tensor(mean).to(self.dtype(name))


def mixtures(anatomy: Anatomy, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """The modules of all mixtures whose experts are stored one by one, in the order of the blocks."""
    within = re.compile(rf"{re.escape(anatomy.blocks)}\.(\d+)\.{re.escape(anatomy.mixture)}")
    paths = {expert["path"].rpartition(".")[0] for name in tensors if (expert := EXPERT.fullmatch(name))}
    found = {int(place[1]): path for path in paths if (place := within.fullmatch(path))}
    return [found[block] for block in sorted(found)]


def with_experts(folder: Folder, anatomy: Anatomy, count: int) -> Folder:
    """The folder with so many experts in each mixture, and tokens sent to no more than there are."""
    tensors = dict(folder.tensors)
    routers = {f"{path}.gate.weight" for path in mixtures(anatomy, canonical(folder.tensors, anatomy))}
    for name, header in canonical(folder.tensors, anatomy).items():
        expert = EXPERT.fullmatch(name)
        if expert and int(expert["number"]) >= count:
            del tensors[header.name]
        elif name in routers:
            tensors[header.name] = replace(header, shape=(count, *header.shape[1:]))
    config = folder.config | {key: count for key in COUNTS if key in folder.config}
    return replace(folder, tensors=tensors, config=config | {ROUTED: min(count, config[ROUTED])})
