"""How large the inputs of each layer are on a text, E[x²] of every channel: what an error of its column costs.

That is the diagonal of the second moments that `observers` takes of a block, here of a whole model in one forward pass,
for a range search that needs no more. Blocks are filled as the data reaches them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.models.store import LazyModel

BATCH = 8
"""Windows that pass through the model together."""


def input_energies(model: LazyModel, windows: Int[Tensor, "windows length"]) -> dict[str, Float[Tensor, "in"]]:
    """Layer of the blocks → E[x²] of its inputs, float64. Raises NumericalError where they are not finite."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).float().square().sum(0, dtype=torch.float64).cpu()
        sums[name] = sums[name] + squares if name in sums else squares

    prefix = f"{model.anatomy.blocks}."
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, layer in model.module.named_modules()
        if name.startswith(prefix) and isinstance(layer, nn.Linear)
    ]
    try:
        with model.streamed():
            for batch in windows.split(BATCH):
                model.logits(batch)
    finally:
        for hook in hooks:
            hook.remove()
    energies = {name: total / windows.numel() for name, total in sums.items()}
    for name, energy in energies.items():
        if not energy.isfinite().all():
            raise NumericalError(f"{name}: the energy of its inputs on the calibration text is not finite")
    return energies
