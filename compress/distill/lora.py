"""Low-rank training: of every linear layer in the blocks, only a product of two thin matrices is trained.

    W' = W + B A            B [out, rank], zero at first; A [rank, in], random

(LoRA, arXiv 2106.09685.) Optimizer states and gradients are then those of the thin matrices, and what was lost by
pruning comes back at the cost of a fraction of the memory. A's entries have variance 1 / in, so that A x is as large
as x, and there is no further factor: what the paper calls α / rank is 1 here. In the end the product is added to the
weight, and nothing is left of it in the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from compress.errors import RequestError


class LowRank(nn.Module):
    """A layer that stays as it is, and a low-rank product beside it that is trained."""

    def __init__(self, layer: nn.Module, rank: int, transposed: bool, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = layer.weight.shape  # type: ignore[misc]
        outputs, inputs = (columns, rows) if transposed else (rows, columns)
        self.layer = layer
        self.transposed = transposed
        """Whether the weight is stored [in, out]."""
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.layer(x) + F.linear(F.linear(x, self.A), self.B)


def attach(module: nn.Module, blocks: str, rank: int, generator: torch.Generator) -> dict[str, bool]:
    """Freeze a model and give every linear layer of its blocks a product to train; in place.

    `blocks`: the path of the module list. Returns the layers' paths, and whether each is stored [in, out]. Raises
    RequestError where there are none, or one has fewer inputs or outputs than `rank`.
    """
    from transformers.pytorch_utils import Conv1D

    module.requires_grad_(False)
    modules = module.get_submodule(blocks).named_modules(prefix=blocks)
    found = {name: layer for name, layer in modules if isinstance(layer, nn.Linear | Conv1D)}
    if not found:
        raise RequestError(f"lora_rank={rank}: there are no linear layers in {blocks}; train all weights")
    for name, layer in found.items():
        if min(layer.weight.shape) < rank:
            raise RequestError(f"lora_rank={rank} is more than {name} {list(layer.weight.shape)} has; use less")
        module.set_submodule(name, LowRank(layer, rank, isinstance(layer, Conv1D), generator))
    return {name: isinstance(layer, Conv1D) for name, layer in found.items()}


def merged(state: dict[str, Tensor], layers: dict[str, bool]) -> dict[str, Tensor]:
    """The parameters of the model as it was before `attach`, with the products in its weights."""
    plain = dict(state)
    for name, transposed in layers.items():
        product = plain.pop(f"{name}.B") @ plain.pop(f"{name}.A")
        plain[f"{name}.weight"] = plain.pop(f"{name}.layer.weight") + (product.T if transposed else product)
        if f"{name}.layer.bias" in plain:
            plain[f"{name}.bias"] = plain.pop(f"{name}.layer.bias")
    return plain
