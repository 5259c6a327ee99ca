"""What llama.cpp takes for granted of an architecture: a model that has it otherwise would compute something else.

A GGUF file has keys for sizes and a few numbers. Activation, which layers see a window only, and what scores are scaled
by come from the architecture's name. Of what llama.cpp does in 2026, see `src/models` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ACTIVATIONS = {
    "llama": "silu", "qwen2": "silu", "qwen3": "silu",
    "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh",
}  # fmt: skip
FULL_EVERY = {"gemma2": 2, "gemma3": 6}
"""Architecture → of how many layers the last sees the whole text, and the others a window."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Architecture → the number of layers by which llama.cpp knows the largest, in which scores are scaled otherwise."""
ROPES = (None, "default", "linear", "llama3")
"""Rotary scalings that a file can say."""
SLIDING_BASE = 10_000.0
"""Of rotary frequencies in Gemma 3's layers with a window."""


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary parameters, under either of the names that transformers has had for them; where layers with a window have
    their own, those of the others."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found)
    return {"rope_type": found.get("type"), "rope_theta": config.get("rope_theta") or 10_000.0, **found}


def unlike(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """What the model has otherwise than llama.cpp, a phrase each."""
    gemma = architecture.startswith("gemma")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_of(config)

    activation = (config.get("hidden_activation") if gemma else None) or config.get("hidden_act")
    if activation not in (None, ACTIVATIONS[architecture]) and not (gemma and activation == "gelu"):
        yield f"hidden_act {activation}, where it has {ACTIVATIONS[architecture]}"
    if rope["rope_type"] not in ROPES:
        yield f"rope_type {rope['rope_type']}, which netsuke does not write"
    if (share := config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))) not in (None, 1.0):
        yield f"partial_rotary_factor {share}, where it turns whole heads"

    sliding = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    base = sliding.get("rope_theta") or config.get("rope_local_base_freq") or SLIDING_BASE
    if architecture == "gemma3" and base != SLIDING_BASE:
        yield f"rope_theta {base:g} in layers with a window, where it has {SLIDING_BASE:g}"

    window, longest = config.get("sliding_window"), config["max_position_embeddings"]
    if architecture in FULL_EVERY:
        layers, every = config["num_hidden_layers"], FULL_EVERY[architecture]
        pattern = [f"{'sliding' if (layer + 1) % every else 'full'}_attention" for layer in range(layers)]
        if (config.get("layer_types") or pattern) != pattern or (
            config.get("sliding_window_pattern") or every
        ) != every:
            yield f"layer_types otherwise than one full_attention after {every - 1} sliding_attention"
        scaled = config["hidden_size"] // heads if layers == LARGEST[architecture] else head_dim
        if (scale := config.get("query_pre_attn_scalar") or scaled) != scaled:
            yield f"query_pre_attn_scalar {scale}, where it has {scaled}"
    elif window and window < longest and config.get("use_sliding_window", architecture == "llama"):
        yield f"sliding_window {window} in a context of {longest}, where it has none"

    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (config.get(key) is None) == (architecture == "gemma2"):
            yield f"{key} {config.get(key)}, where it has {'a number' if architecture == 'gemma2' else 'none'}"
