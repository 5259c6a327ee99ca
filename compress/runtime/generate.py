"""Text from a model: the prompt, continued."""

from __future__ import annotations

from typing import Any

import torch

from compress.errors import DataError, RequestError


def generate(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128, **options: Any) -> str:
    """The prompt and its continuation, by greedy search until the end-of-text token or `max_new_tokens`.

    `options` go to transformers' `generate()`, such as `do_sample=True, temperature=0.7`. Raises DataError
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
    if tokenizer.pad_token_id is None:
        options.setdefault("pad_token_id", tokenizer.eos_token_id)
    options.setdefault("do_sample", False)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
