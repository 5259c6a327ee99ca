"""Branches: what the model would predict if something else were done to it, for many such somethings in one walk.

The stream of the unchanged model passes the blocks once. Where a change of a block is proposed, a branch leaves it:
the block's output under that change, which then passes all later blocks, changed or not, beside the others.
At the end the divergence of each branch's predictions from the unchanged model's is read off. A block is filled once,
whatever the number of branches; they stay in files, two for each, by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from compress.calibrate import BATCH_TOKENS
from compress.calibrate.activations import Activations
from compress.calibrate.block import Block
from compress.calibrate.capture import finish
from compress.calibrate.walk import enter, inputs_of, walk
from compress.models.store import LazyModel

Change = Callable[[Tensor], Tensor]
"""What a block would be: hidden states [batch, length, width] → those it returned."""


@torch.inference_mode()
def divergences(
    model: LazyModel,
    tokens: Int[Tensor, "windows length"],
    scratch: Path,
    propose: Callable[[Block], Iterator[tuple[Hashable, Change]]],
) -> dict[Hashable, float]:
    """The mean KL divergence in nats of each branch from the unchanged model, on these windows.

    `propose` yields branches by name with their change of a block; one that is named in several blocks has all of its
    changes. `scratch`: an empty folder.
    """
    entrance = enter(model, tokens, inputs_of(0, scratch))
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    branches: dict[Hashable, Activations] = {}

    def follow(block: Block, name: Hashable, change: Change) -> None:
        before = branches.get(name, block.inputs)
        number = list(branches).index(name) if name in branches else len(branches)
        file = scratch / f"branch-{number}-{block.index % 2}"
        after = Activations(file, before.length, before.width, before.dtype)
        for start in range(0, before.windows, step):
            after.append(change(before.read(start, start + step).to(model.device)))
        branches[name] = after

    def work(block: Block) -> None:
        old = set(branches)
        for name, change in propose(block):
            follow(block, name, change)
            old.discard(name)
        for name in old:
            follow(block, name, block.forward)

    *_, (_, unchanged) = walk(model, entrance, entrance.inputs, scratch, work)
    found = dict.fromkeys(branches, 0.0)
    with model.resident(model.outer()):
        for window in range(len(tokens)):
            given = tokens[window : window + 1]

            def predictions(hidden: Activations, given: Tensor = given, window: int = window) -> Tensor:
                logits = finish(model, given, hidden.read(window, window + 1).to(model.device))
                return logits[0].float().log_softmax(dim=-1)

            wanted = predictions(unchanged)
            for name, hidden in branches.items():
                lost = (wanted.exp() * (wanted - predictions(hidden))).sum(dim=-1)
                found[name] += float(lost.mean().clamp(min=0)) / len(tokens)
    return found
