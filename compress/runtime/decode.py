"""Greedy decoding with buffers of fixed size: the prompt at once, then a token at a time.

Keys and values lie in a cache that is allocated whole, so that no step copies what earlier steps wrote and every step
does the same work on the same memory; or in a quantized one, where the checkpoint asks for it. The head sees the last
position only. On an NVIDIA GPU the step of one token is captured as a CUDA graph and replayed: a kernel of a few
microseconds would otherwise wait for Python between launches.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class Decoder:
    """A batch of sequences of at most `length` tokens on their way through a causal transformers model.

    The first prompts it is given decide how many sequences a batch has.
    """

    def __init__(self, model: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        if getattr(model, "netsuke_kv_cache", None):
            from compress.runtime.attention import quantized_cache

            self.cache = quantized_cache(model)
        self._options: dict[str, Any] = {"use_cache": True, cache_argument(model): self.cache}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = self._output = torch.empty(0)

    @property
    def captures(self) -> bool:
        """Whether steps are replayed as a CUDA graph: not where the model looks at what it computes from Python, as it
        does for windows that slide, for rotary tables that grow with the text, and for experts, nor with a quantized
        cache, which does so too."""
        quantized = getattr(self.model, "netsuke_kv_cache", None) is not None
        sliding = any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)
        growing = "dynamic" in str(getattr(self.model.config, "rope_parameters", ""))
        whole = getattr(self.model, "_can_compile_fullgraph", False)
        return (
            self.model.device.type == "cuda"
            and torch.version.hip is None
            and whole
            and not (quantized or sliding or growing)
        )

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Token ids [batch, prompt] from the beginning → the token [batch, 1] that follows each."""
        if self.captures and self._graph is None:
            with torch.cuda.device(self.model.device):
                self._capture(len(prompt))
        self.cache.reset()
        return self._forward(prompt)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Token ids [batch, 1] that come next → the token [batch, 1] that follows them."""
        if self._graph is None:
            return self._forward(tokens)
        self._input.copy_(tokens)
        self._graph.replay()
        return self._output.clone()

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, **self._options).logits[:, -1:].argmax(-1)

    def _capture(self, batch: int) -> None:
        """Record a step on the cache's own memory. What the cache then holds is worth nothing."""
        self._input = torch.zeros(batch, 1, dtype=torch.long, device=self.model.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels compile, workspaces and the cache are allocated
            for _ in range(2):
                self._forward(self._input)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._forward(self._input)


def cache_argument(model: Any) -> str:
    """What this version of transformers calls a model's cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
