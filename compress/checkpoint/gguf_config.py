"""A config in full, and the table of what llama.cpp has no other way of.

Files leave out what transformers takes for granted, and older ones say it under other names: Mistral's window, the base
of Gemma 3's rotary frequencies, the size of a head. `complete` says all of it, as the transformers that runs the folder
understands it, so that what is written and what is refused go by the same numbers.

`FIXED` has what a file cannot say and llama.cpp computes in one way, a row each. Limits that are sizes of the model, or
follow from them, are in `compress.checkpoint.gguf_limits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compress.errors import ModelError, first_line

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
}  # fmt: skip
"""transformers' model type → llama.cpp's architecture."""
HEADLESS = "gemma gemma2"
"""Architectures whose head is always the embedding."""
FIXED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("attention_bias",                              "qwen3 gemma gemma2 gemma3", (False,)),
    ("tie_word_embeddings",                         HEADLESS,                    (True,)),
    ("use_bidirectional_attention",                 "gemma gemma2 gemma3",       (False,)),
    ("hidden_activation",                           "gemma2 gemma3",             ("gelu_pytorch_tanh",)),
    ("rope_parameters.rope_type",                   "qwen2 qwen3 gemma gemma2",  ("default", "linear")),
    ("rope_parameters.full_attention.rope_type",    "gemma3",                    ("default", "linear")),
    ("rope_parameters.sliding_attention.rope_type", "gemma3",                    ("default",)),
)  # fmt: skip
"""Where in a config, in which of llama.cpp's architectures, and what it has there."""


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what transformers takes where it says nothing. Raises ModelError where transformers refuses it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return {**config, **AutoConfig.for_model(**config).to_dict()}
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise ModelError(f"config.json: transformers cannot read it: {reason}") from error


def otherwise(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """What a complete config has otherwise than `FIXED`, a phrase each. What it does not say is as llama.cpp has it."""
    for key, architectures, has in FIXED:
        value: Any = config
        for part in key.split("."):
            value = (value or {}).get(part)
        if architecture in architectures.split() and value not in (None, *has):
            yield f"{key} {value}, where it has {' or '.join(map(str, has))}"
