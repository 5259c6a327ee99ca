"""Logits as decoding computes them: with a past that lies in a cache, which is what a quantized cache changes.

A forward pass over a whole text never reads the cache it fills, and perplexity from it is blind to how the cache is
kept. Here the first tokens of each window are the prompt, and all others come after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodePath:
    """A transformers model as a `LogitsModel` that goes on from a prompt, teacher-forced.

    `new_cache` makes an empty cache. `prompt`: tokens that are computed at once and see each other as they are. `step`:
    tokens that come together afterwards; None: all the rest, for a cache in which it makes no difference.
    """

    model: Any
    new_cache: Callable[[], Any]
    prompt: int = 1
    step: int | None = 1

    @property
    def config(self) -> Any:
        return self.model.config

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        options, parts = {cache_argument(self.model): self.new_cache(), "use_cache": True}, []
        rest = input_ids[:, self.prompt :]
        for tokens in (input_ids[:, : self.prompt], *(rest.split(self.step or max(rest.shape[1], 1), dim=1))):
            if tokens.shape[1]:
                parts.append(self.model(tokens, **options).logits)
        return torch.cat(parts, dim=1)


def cache_argument(model: Any) -> str:
    """What this version of transformers calls a model's cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
