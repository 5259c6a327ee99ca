"""On-policy text: the student writes the rest of a window itself, and then learns what its teacher would have thought.

A student that learns from given text alone never sees what follows its own mistakes; at work it sees nothing else (GKD,
arXiv 2306.13649). Tokens are drawn at temperature 1 from the whole distribution, so that what is seen is what the
student does.

Each draw inverts the cumulative distribution at a number between 0 and 1 that the caller gives. The same numbers give
the same text, in whatever way windows are put together for a forward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def empty_cache(model: Any) -> dict[str, Any]:
    """A cache of keys and values for a bare model, by the name of the argument that takes it."""
    from transformers import DynamicCache

    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {named: DynamicCache(config=model.config)}


@torch.no_grad()
def continued(
    model: nn.Module, cache: dict[str, Any], tokens: Int[Tensor, "windows length"], draws: Float[Tensor, "windows new"]
) -> Int[Tensor, "windows length"]:
    """The windows with their last `new` tokens written by the model, which is left in evaluation mode."""
    model.eval()
    tokens = tokens.clone()
    cut = tokens.shape[1] - draws.shape[1]
    given = tokens[:, :cut]
    for position in range(cut, tokens.shape[1]):
        logits = model(input_ids=given, use_cache=True, **cache).logits
        given = tokens[:, position : position + 1] = draw(logits[:, -1], draws[:, position - cut])
    return tokens


def draw(logits: Float[Tensor, "windows vocabulary"], at: Float[Tensor, " windows"]) -> Int[Tensor, "windows 1"]:
    """Tokens of softmax(logits): the first up to which the probabilities sum to more than `at` of the whole."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    at = at.double().unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_(max=logits.shape[-1] - 1)
