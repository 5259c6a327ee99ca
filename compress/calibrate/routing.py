"""What the experts of a mixture are asked for, and what they answer, over the calibration set.

One walk of the model; each batch passes a block's mixture once for its own sake, and then expert by expert.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, inputs_of, walk
from compress.models.store import LazyModel

SAMPLE = 256
"""Tokens by whose outputs experts are compared."""


@dataclass(frozen=True, eq=False)
class Routing:
    """What was seen of the experts of one mixture."""

    tokens: Int[Tensor, " experts"]
    """How many were routed to each."""
    contributions: Float[Tensor, " experts"]
    """Mean over those tokens of the router's weight times ‖output‖, float64; 0 where there were none."""
    similarity: Float[Tensor, "experts experts"]
    """Cosine between the outputs of two experts for the same tokens, routed to them or not; 0 for experts of zeros."""


class RoutingObserver:
    """Accumulates `Routing`, batch by batch."""

    def __init__(self, num_experts: int) -> None:
        self._tokens = torch.zeros(num_experts, dtype=torch.int64)
        self._sums = torch.zeros(num_experts, dtype=torch.float64)
        self._products = torch.zeros(0)

    @torch.no_grad()
    def update(
        self,
        experts: nn.Module,
        inputs: Float[Tensor, "tokens in"],
        chosen: Int[Tensor, "tokens routed"],
        weights: Float[Tensor, "tokens routed"],
    ) -> None:
        """Add a batch. `experts`: the module that the other three are given to."""

        def output(expert: int, x: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
            alone = torch.full((len(x), 1), expert, device=x.device)
            return experts.forward(x, alone, weights.new_ones(len(x), 1)).float()

        every = range(len(self._tokens))
        for expert in every:
            token, place = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                added = output(expert, inputs[token]).norm(dim=1) * weights[token, place]
                self._sums[expert] += added.sum(dtype=torch.float64).cpu()
                self._tokens[expert] += len(token)
        if not len(self._products):
            sample = torch.stack([output(expert, inputs[:SAMPLE]).flatten() for expert in every])
            self._products = (sample @ sample.T).double().cpu()

    def result(self) -> Routing:
        """Of all batches seen."""
        lengths = self._products.diagonal().sqrt()
        cosines = (self._products / lengths / lengths.unsqueeze(1)).nan_to_num(nan=0)
        return Routing(self._tokens, self._sums / self._tokens.clamp(min=1), cosines)


def routings(
    model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path, mixtures: Collection[str]
) -> dict[str, Routing]:
    """By module path, of mixtures with a router `gate` and `experts`. `scratch`: a folder to be made and removed."""
    found: dict[str, Routing] = {}
    observers: dict[str, tuple[RoutingObserver, RemovableHandle]] = {}

    def watch(block: Block) -> None:
        for path in (path for path in mixtures if path.startswith(f"{block.name}.")):
            observer = RoutingObserver(len(model.module.get_parameter(f"{path}.gate.weight")))
            experts = model.module.get_submodule(f"{path}.experts")
            hook = experts.register_forward_pre_hook(
                lambda module, args, observer=observer: observer.update(module, *args)
            )
            observers[path] = observer, hook

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        entrance = enter(model, tokens, inputs_of(0, scratch))
        for _ in walk(model, entrance, entrance.inputs, scratch, watch):
            for path, (observer, hook) in observers.items():
                hook.remove()
                found[path] = observer.result()
            observers.clear()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found
