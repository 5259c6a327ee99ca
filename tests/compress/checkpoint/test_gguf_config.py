"""Configs in full: what they leave out is as transformers takes it, and what llama.cpp has not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint.gguf_config import complete
from compress.checkpoint.gguf_metadata import architecture_of, metadata_of
from compress.errors import ModelError
from compress.models.store import load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 258,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def nested(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias True, where it has False"),
        ("gemma", {"attention_bias": True}, "attention_bias True, where it has False"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias True, where it has False"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings False, where it has True"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False, where it has True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True, where it has False"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation gelu, where it has gelu_pytorch_tanh"),
        ("qwen2", {"rope_parameters": LLAMA3}, r"rope_parameters\.rope_type llama3, where it has default or linear"),
        ("gemma3_text", nested(LLAMA3, {}), r"full_attention\.rope_type llama3, where it has default or linear"),
        ("gemma3_text", nested(LINEAR, LINEAR), r"sliding_attention\.rope_type linear, where it has default"),
        ("mistral", {}, "sliding_window 4096 in a context of 131072, where it has none"),
    ],
)
def test_what_llama_cpp_has_not_is_refused_with_key_and_value(kind: str, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=f"It has .*{says}.* Keep the folder, or convert to onnx"):
        architecture_of(SIZES | {"model_type": kind} | changed)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("llama", {"attention.head_count_kv": 4, "context_length": 2048}),
        ("qwen2", {"attention.head_count_kv": 32, "context_length": 32768}),
        ("qwen3", {"attention.key_length": 128}),
        ("gemma", {"attention.key_length": 256, "attention.head_count_kv": 16}),
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}),
        ("gemma3_text", {"rope.freq_base": 1e6, "attention.head_count_kv": 4, "attention.sliding_window": 4096}),
    ],
)
def test_what_a_file_leaves_out_is_as_transformers_has_it(kind: str, written: dict[str, Any], tiny: Path) -> None:
    metadata = metadata_of(SIZES | {"model_type": kind}, load_tokenizer(tiny), "F32", "x")
    own = metadata["general.architecture"]
    assert {key: metadata[f"{own}.{key}"] for key in written} == written


def test_a_complete_config_stays_as_it_is() -> None:
    config = complete(SIZES | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4})
    assert complete(config) == config


def test_a_config_that_transformers_refuses_is_refused_with_its_reason() -> None:
    with pytest.raises(ModelError, match=r"config\.json: transformers cannot read it: .*multiple of the number of"):
        architecture_of(SIZES | {"model_type": "llama", "num_attention_heads": 3})
