"""The walk: the only loop over blocks in the project, and the same way back.

Fill a block, let each stage work on it, run the calibration set through what it has become, hand the result over,
empty it, go on. Memory holds one block and one batch; everything else is in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from compress.calibrate import BATCH_TOKENS
from compress.calibrate.activations import Activations
from compress.calibrate.block import Block, Stream
from compress.calibrate.capture import Arguments, embed
from compress.models.store import LazyModel


@dataclass(frozen=True)
class Entrance:
    """What the first block is given."""

    inputs: Activations
    arguments: Sequence[Arguments]


@torch.no_grad()
def enter(model: LazyModel, tokens: Int[Tensor, "windows length"], path: Path, resumed: bool = False) -> Entrance:
    """Embed the calibration windows into a file. When a run is resumed only the blocks' arguments are needed."""
    before = [name for name in model.anatomy.before if name in dict(model.module.named_modules())]
    with model.resident(before):
        hidden, arguments = embed(model, tokens[:1])
        inputs = Activations(path, tokens.shape[1], hidden.shape[-1], model.dtype)
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
        for start in range(0, 0 if resumed else len(tokens), batch):
            inputs.append(embed(model, tokens[start : start + batch])[0])
    return Entrance(inputs, arguments)


def inputs_of(index: int, scratch: Path) -> Path:
    """The file that block `index` reads. There are two, by turns: overwriting one costs much less than a new one."""
    return scratch / f"activations-{index % 2}"


def originals_of(index: int, inputs: Activations, scratch: Path) -> Stream:
    """The original stream's files into and out of block `index`, beside `inputs`. Into the first go the same."""

    def file(block: int, windows: int) -> Activations:
        return Activations(scratch / f"original-{block % 2}", inputs.length, inputs.width, inputs.dtype, windows)

    return file(index, inputs.windows) if index else inputs, file(index + 1, 0)


def walk(
    model: LazyModel,
    entrance: Entrance,
    inputs: Activations,
    scratch: Path,
    work: Callable[[Block], None],
    first: int = 0,
    two_streams: bool = False,
    packs: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Iterator[tuple[Block, Activations]]:
    """Work on the blocks from `first` on; yields each finished block with the inputs of the next one.

    `packs`: whether codes will be stored; if not, weights count as rounded to the type they are stored in.
    `scale_dtype`: what scales are rounded to, where not to the type of the weight.

    The caller stores what it is given before it asks for more: then every block is a point to resume from.
    """
    for index in range(first, len(model.blocks)):
        name = model.block_name(index)
        model.materialise(name)
        original = originals_of(index, inputs, scratch) if two_streams else None
        block = Block(model, index, inputs, entrance.arguments[index], scratch, original, packs, scale_dtype)
        work(block)
        outputs = Activations(inputs_of(index + 1, scratch), inputs.length, inputs.width, inputs.dtype)
        block.propagate(outputs)
        outputs.sync()
        if original:
            original[1].sync()
        block.close()
        yield block, outputs
        del block  # and with it what it holds, before the next one is filled
        inputs = outputs
        model.release(name)


def back(model: LazyModel, entrance: Entrance, inputs: Sequence[Activations], scratch: Path) -> Iterator[Block]:
    """The blocks as they are, from the last to the first. `inputs`: those of each, which a walk has left."""
    for index in reversed(range(len(model.blocks))):
        name = model.block_name(index)
        model.materialise(name)
        yield Block(model, index, inputs[index], entrance.arguments[index], scratch)
        model.release(name)
