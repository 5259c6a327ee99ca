"""Gradients of the loss, exact, in the memory of one block: backpropagation in which every block is computed twice.

The loss L is the cross-entropy of the next token, summed over the calibration windows; every token but a window's first
is predicted. (The mean has the same gradients but for a factor, and float16 would lose them.) What reaches a block from
behind is all that its own gradients depend on:

    h′ = block(h)        ∂L/∂h = (∂h′/∂h)ᵀ ∂L/∂h′

A walk of the model as it is leaves the inputs h of each block in a file. Norm, head and loss say what ∂L/∂h′ is behind
the last block. Then each, from the last to the first, is filled and run on its inputs again, and asked for ∂L/∂h, which
the block before finds in a file (as in Chen et al., arXiv 1604.06174, but that weights come and go as well). On the way
the inputs of some layers meet their gradients.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.calibrate.activations import Activations
from compress.calibrate.block import Block
from compress.calibrate.capture import finish
from compress.calibrate.walk import back, enter, inputs_of, walk
from compress.errors import NumericalError
from compress.models.store import LazyModel

KEPT_TOKENS = 1 << 16
"""Of which the inputs of all blocks are on disk at once: as much as the weights of a model 5000 wide, of any depth."""
LOGITS_BYTES = 64 << 20
"""Of logits in float32 at once."""


@dataclass(frozen=True, eq=False)
class InputGradient:
    """Of one layer, for one batch of windows."""

    layer: str
    role: str
    inputs: Float[Tensor, "tokens in"]
    gradient: Float[Tensor, "tokens in"]
    """∂L/∂inputs."""


@torch.enable_grad()
def input_gradients(
    model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path, roles: Collection[str]
) -> Iterator[InputGradient]:
    """Of every layer of these roles, batch by batch, from the last block to the first.

    `scratch`: a folder to be made and removed. Raises NumericalError where a gradient is not finite.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for windows in tokens.split(max(1, KEPT_TOKENS // tokens.shape[1])):
            yield from _backwards(model, windows, scratch, roles)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _backwards(
    model: LazyModel, tokens: Int[Tensor, "windows length"], scratch: Path, roles: Collection[str]
) -> Iterator[InputGradient]:
    entrance = enter(model, tokens, inputs_of(0, scratch))
    kept, stream = list[Activations](), entrance.inputs
    for block, outputs in walk(model, entrance, stream, scratch, lambda _: None):
        kept.append(stream.moved(scratch / f"inputs-{block.index}"))
        stream = outputs
    behind = _behind_the_last(model, tokens, stream, scratch / f"gradient-{len(kept) % 2}")
    for block in back(model, entrance, kept, scratch):
        before = Activations(scratch / f"gradient-{block.index % 2}", behind.length, behind.width, behind.dtype)
        for start in range(0, behind.windows, block.batch):
            hidden, gradient = (
                each.read(start, start + block.batch).to(model.device) for each in (block.inputs, behind)
            )
            hidden.requires_grad_()
            with _inputs_seen(block, roles) as seen:
                output = block.forward(hidden)
            first, *others = torch.autograd.grad(output, [hidden, *(inputs for _, _, inputs in seen)], gradient)
            before.append(first)
            for (layer, role, inputs), found in zip(seen, others, strict=True):
                if not found.isfinite().all():
                    raise NumericalError(
                        f"{layer}: the gradient of the loss in its inputs is not finite on the calibration text. "
                        "Calibrate in float32 (calibration.dtype), or on other text"
                    )
                yield InputGradient(layer, role, inputs.detach().flatten(0, -2), found.flatten(0, -2))
        behind = before


def _behind_the_last(
    model: LazyModel, tokens: Int[Tensor, "windows length"], outputs: Activations, path: Path
) -> Activations:
    """∂L/∂h′ of what the last block returns, a few positions at a time: from there on none knows of another."""
    gradient = Activations(path, outputs.length, outputs.width, outputs.dtype)
    with model.resident(model.outer()):
        vocabulary = len(model.module.get_parameter(f"{model.anatomy.head}.weight"))
        step = max(1, LOGITS_BYTES // (4 * vocabulary))
        for window, given in enumerate(tokens.to(model.device)):
            hidden = outputs.read(window, window + 1).to(model.device)
            found = torch.zeros_like(hidden)
            for start in range(0, len(given) - 1, step):
                here = slice(start, min(start + step, len(given) - 1))
                part = hidden[:, here].clone().requires_grad_()
                logits = finish(model, given[here].unsqueeze(0), part)[0]
                loss = cross_entropy(logits.float(), given[1:][here], reduction="sum")
                (found[:, here],) = torch.autograd.grad(loss, part)
            gradient.append(found)
    return gradient


@contextmanager
def _inputs_seen(block: Block, roles: Collection[str]) -> Iterator[list[tuple[str, str, Tensor]]]:
    """Within, the block notes what its layers of these roles are given."""
    seen: list[tuple[str, str, Tensor]] = []
    with ExitStack() as stack:
        for site in block.sites:
            for name, role in zip(site.layers, site.roles, strict=True):
                if role in roles:

                    def note(_: object, args: tuple[Tensor, ...], name: str = name, role: str = role) -> None:
                        seen.append((name, role, args[0]))

                    layer = block.model.module.get_submodule(name)
                    stack.callback(layer.register_forward_pre_hook(note, prepend=True).remove)
        yield seen
