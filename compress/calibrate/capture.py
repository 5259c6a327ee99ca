"""The inputs of the first block, and the arguments every block is called with.

The model's own forward pass is run with its blocks swapped for recorders, so embeddings, masks, rotary tables and
whatever else a family computes before and around its blocks are the model's business and never ours. No tracing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from compress.models.store import LazyModel


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides its hidden states; every tensor broadcasts over the batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Finished(Exception):  # noqa: N818  (not an error: the pass has seen all it came for)
    pass


class _Recorder(nn.Module):
    """Stands for a block: notes what it is given, hands the hidden states on."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Arguments] | None = None
        self._block = [block]  # in a list, so that it is not registered as a submodule
        self._last = last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)  # attention_type and the like, which the model's loop may read

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden, Arguments(args, kwargs)
        if self._last:
            raise _Finished
        return hidden


@contextmanager
def _blocks_replaced(model: LazyModel, replacements: list[nn.Module]) -> Iterator[None]:
    blocks = model.blocks
    originals = list(blocks)
    try:
        for index, replacement in enumerate(replacements):
            blocks[index] = replacement
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


@torch.no_grad()
def embed(
    model: LazyModel, tokens: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length width"], list[Arguments]]:
    """Hidden states entering the first block, and each block's other arguments. Embeddings must be resident.

    Arguments are recorded for the whole batch; record them with a batch of one to have them broadcast.
    """
    num_blocks = len(model.blocks)
    recorders = [_Recorder(block, index == num_blocks - 1) for index, block in enumerate(model.blocks)]
    with _blocks_replaced(model, list(recorders)):
        try:
            model.module(input_ids=tokens.to(model.device), **_no_cache(model))
        except _Finished:
            pass
    seen = [recorder.seen for recorder in recorders]
    if any(entry is None for entry in seen):
        raise RuntimeError(f"{model.anatomy.family}: the forward pass did not reach every block")
    return seen[0][0], [entry[1] for entry in seen]  # type: ignore[index]


def finish(
    model: LazyModel, tokens: Int[Tensor, "batch length"], hidden: Float[Tensor, "batch length width"]
) -> Float[Tensor, "batch length vocabulary"]:
    """What the model returns when its last block returns `hidden`: logits, or an encoder's hidden states.

    Gradients pass.
    """
    answer = hidden

    class Answer(_Recorder):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return answer

    with _blocks_replaced(model, [Answer(block, last=False) for block in model.blocks]):
        return outputs(model, model.module(input_ids=tokens.to(model.device), **_no_cache(model)))


def outputs(model: LazyModel, result: Any) -> Tensor:
    """Logits of a transformers output, or the hidden states where it has no head over the vocabulary."""
    logits = getattr(result, "logits", None)
    return result[0] if logits is None else logits


def _no_cache(model: LazyModel) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") and model.anatomy.head else {}
