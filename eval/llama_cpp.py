"""A GGUF file as llama.cpp computes with it, through whichever of its bindings there is (`eval.llama_bindings`).

Weights are multiplied as llama.cpp multiplies them, which rounds activations to 8 bits where weights are quantized.
Keys and values are kept in float32, since how a cache is kept is no property of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eval.llama_bindings import BINDINGS, Binding, LlamaCppError, UnusableError


class LlamaCpp:
    """A file as a `LogitsModel`, and as one that writes. Raises LlamaCppError where none of the bindings opens it."""

    def __init__(self, file: Path) -> None:
        self.binding = _opened(file)
        self.runs_on = self.binding.version
        self.vocabulary = self.binding.vocabulary
        self.context = self.binding.context
        """Tokens that the model was made for."""

    def __call__(self, input_ids: Tensor, /) -> Tensor:
        logits = torch.empty(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            with self.binding.decoder(len(ids)) as decode:
                logits[row] = decode(ids)
        return logits

    def write(
        self, prompt: list[int], new_tokens: int, stop: Callable[[list[int]], bool] = lambda _: False
    ) -> list[int]:
        """The tokens that follow by greedy search: so many, or up to an end-of-text token, itself included, or until
        `stop` says of those written so far that they are enough."""
        written: list[int] = []
        with self.binding.decoder(len(prompt) + new_tokens) as decode:
            latest = prompt
            while len(written) < new_tokens:
                written.append(int(decode(latest, last_only=True).argmax()))
                if self.binding.ends(written[-1]) or stop(written):
                    break
                latest = written[-1:]
        return written


def _opened(file: Path) -> Binding:
    unusable = []
    for binding in BINDINGS:
        try:
            return binding(file)
        except UnusableError as error:
            unusable.append(f"{binding.package}: {error}")
    told, packages = "; ".join(unusable), " or ".join(binding.package for binding in BINDINGS)
    raise LlamaCppError(f"{file}: GGUF files run on llama.cpp ({told}); pip install {packages}")
