"""What a model may lose of its depth: a block, or half of one, its attention or its MLP.

Plain transformers builds no block without one of its halves. So what is stored is the weight of the half's last layer,
and its bias, as zeros: the half adds nothing to the stream, exactly, and the model is neither smaller nor faster. It
shows what a runtime that knows such blocks could save. A block that loses both halves goes as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.calibrate.block import Block
from compress.calibrate.branches import Change
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder
from compress.models.store import Weights

HALVES = {"attention": "attn.o", "mlp": "mlp.down"}
"""Half → the role of the layer by which it ends."""
Granularity = Literal["block", "half"]
Unit = tuple[int, str]
"""A block by its number, and which half of it; empty: the whole."""


def units_of(block: int, granularity: Granularity) -> tuple[Unit, ...]:
    """What may go of a block."""
    return tuple((block, half) for half in HALVES) if granularity == "half" else ((block, ""),)


def ends_of(anatomy: Anatomy, half: str) -> list[str]:
    """The layers of a block by which a half ends: one, where the family is like most."""
    return [layer for layer, role in anatomy.roles.items() if role == HALVES[half]]


def without(block: Block, half: str) -> Change:
    """The block as it is without this half; without all of it where that is empty."""
    if not half:
        return lambda hidden: hidden
    (end,) = ends_of(block.model.anatomy, half)
    layer = block.module.get_submodule(end)

    def forward(hidden: Tensor) -> Tensor:
        hook = layer.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
        try:
            return block.forward(hidden)
        finally:
            hook.remove()

    return forward


class SilentWeights(Weights):
    """The tensors of a folder, some halves silenced.

    `silent`: half → the numbers of the blocks that do without it.
    """

    def __init__(self, folder: Folder, silent: Mapping[str, Sequence[int]]) -> None:
        super().__init__(folder)
        self._layers = {
            f"{self.anatomy.blocks}.{block}.{end}"
            for half, blocks in silent.items()
            for block in blocks
            for end in ends_of(self.anatomy, half)
        }

    def read(self, name: str) -> Tensor:
        stored = super().read(name)
        return torch.zeros_like(stored) if name.rpartition(".")[0] in self._layers else stored
