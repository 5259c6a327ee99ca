"""Text from a model: the prompt, continued."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import DataError, RequestError
from compress.runtime.decode import Decoder, cache_argument


def generate(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128, **options: Any) -> str:
    """The prompt and its continuation, by greedy search until the end-of-text token or `max_new_tokens`.

    With `options`, such as `do_sample=True, temperature=0.7`, transformers' `generate()` is called instead, and they
    go to it; so it is where the model's generation_config asks for more than the most likely token. Raises DataError
    for a prompt that is empty or leaves no room in the model's context.
    """
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompt:
        raise DataError("the prompt is empty. Give at least one character to continue")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    num_tokens = inputs["input_ids"].shape[1]
    if not num_tokens:
        raise DataError(f"the tokenizer makes no tokens of the prompt {prompt!r}. Give it some text")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and num_tokens + max_new_tokens > context:
        raise DataError(
            f"the prompt has {num_tokens} tokens; with max_new_tokens={max_new_tokens} that is more than the "
            f"model's context of {context}. Shorten the prompt or ask for fewer new tokens"
        )
    if not options and _is_plain(model.generation_config):
        tokens = greedy(model, inputs["input_ids"], max_new_tokens)
    else:
        if tokenizer.pad_token_id is None:
            options.setdefault("pad_token_id", tokenizer.eos_token_id)
        options.setdefault("do_sample", False)
        if getattr(model, "netsuke_kv_cache", None):
            from compress.runtime.attention import quantized_cache

            options.setdefault(cache_argument(model), quantized_cache(model))
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _is_plain(config: Any) -> bool:
    """Whether greedy search with a generation_config takes the most likely token each time, until an end."""
    neutral = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1)}
    others = (
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
        *("min_length", "min_new_tokens", "sequence_bias", "guidance_scale", "exponential_decay_length_penalty"),
    )
    return all(getattr(config, name, None) in values for name, values in neutral.items()) and not any(
        getattr(config, name, None) for name in others
    )


def greedy(model: Any, prompt: Tensor, max_new_tokens: int) -> Tensor:
    """Token ids [1, prompt] → the same and what follows, [1, …]."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    decoder = Decoder(model, prompt.shape[1] + max_new_tokens)
    tokens = [prompt, decoder.prefill(prompt)]
    while len(tokens) <= max_new_tokens and int(tokens[-1]) not in ends:
        tokens.append(decoder.step(tokens[-1]))
    return torch.cat(tokens, dim=1)
