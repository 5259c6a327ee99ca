"""Greedy decoding with buffers of fixed size: the prompt at once, then a token at a time.

Keys and values lie in a cache that is allocated whole, so that no step copies what earlier steps wrote and every step
does the same work on the same memory. The head sees the last position only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class Decoder:
    """A batch of sequences of at most `length` tokens on their way through a causal transformers model."""

    def __init__(self, model: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        arguments = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True}
        self._options["cache" if "cache" in arguments else "past_key_values"] = self.cache
        if "logits_to_keep" in arguments:
            self._options["logits_to_keep"] = 1

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Token ids [batch, prompt] from the beginning → the token [batch, 1] that follows each."""
        self.cache.reset()
        return self.step(prompt)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, new] that come next → the token [batch, 1] that follows them."""
        return self.model(input_ids=tokens, **self._options).logits[:, -1:].argmax(-1)
