"""Families as llama.cpp computes them: the same logits, or no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.checkpoint.gguf_file import GGUFFile
from compress.checkpoint.gguf_limits import rope_of
from compress.checkpoint.gguf_metadata import architecture_of
from compress.errors import ModelError, NumericalError
from compress.pipeline.convert import convert
from compress.scoring.opened import opened

SIZES = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
NARROW = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
NESTED = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, untied, wide heads, biases": (
        "LlamaConfig",
        {"tie_word_embeddings": False, "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen3, untied, wide heads": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", NARROW),
    "gemma3": ("Gemma3TextConfig", NARROW | {"num_hidden_layers": 7}),
    "gemma3, linear, untied": (
        "Gemma3TextConfig",
        NARROW | {"num_hidden_layers": 7, "rope_parameters": NESTED, "tie_word_embeddings": False},
    ),
    "gemma2 of the largest kind": (
        "Gemma2Config",
        NARROW | {"num_hidden_layers": 46, "head_dim": 32, "initializer_range": 0.05},
    ),
}


def saved(folder: Path, tiny: Path, kind: str, changed: dict[str, Any]) -> Path:
    """A model of random weights, with the tokenizer of another."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | changed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.mark.parametrize(("kind", "changed"), FAMILIES.values(), ids=FAMILIES)
def test_llama_cpp_computes_the_same(kind: str, changed: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """Beyond the window, where there is one. Gemma's GELU is a table of float16 there."""
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    folder = saved(tmp_path / "model", tiny, kind, changed)
    convert(folder, "gguf-f32", tmp_path / "model.gguf")
    tokens = torch.randint(2, 258, (1, 100), generator=torch.Generator().manual_seed(0))
    with opened(folder) as ours, opened(tmp_path / "model.gguf") as theirs:
        expected, found = ours(tokens), theirs(tokens)
    assert (found - expected).norm() < (1e-3 if "Gemma" in kind else 1e-4) * expected.norm()


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("LlamaConfig", {"hidden_act": "gelu"}, "hidden_act gelu, where it has silu"),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type yarn"),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("MistralConfig", {"sliding_window": 16}, "sliding_window 16 in a context of 128, where it has none"),
        ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("Gemma2Config", NARROW | {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32, where it has 16"),
        ("Gemma2Config", NARROW | {"attn_logit_softcapping": None}, "attn_logit_softcapping None, where it has a num"),
        ("Gemma2Config", NARROW | {"layer_types": ["full_attention"] * 3}, "layer_types otherwise than one full"),
        ("Gemma3TextConfig", NARROW | {"layer_types": ["full_attention"] * 3}, "after 5 sliding_attention"),
    ],
)  # fmt: skip
def test_what_it_would_compute_otherwise_is_refused(kind: str, changed: dict[str, Any], says: str) -> None:
    config = getattr(transformers, kind)(**SIZES | changed).to_dict()
    with pytest.raises(ModelError, match=f"is not this model, so it cannot be a GGUF file. It has .*{says}"):
        architecture_of(config)


def test_gemma_3_in_another_base_of_its_windows_is_refused() -> None:
    config = transformers.Gemma3TextConfig(**SIZES | NARROW).to_dict()
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 5000.0
    with pytest.raises(ModelError, match="rope_theta 5000 in layers with a window, where it has 10000"):
        architecture_of(config)


def test_configs_as_older_files_have_them_are_taken_as_they_are_meant() -> None:
    plain = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128}
    qwen = plain | {"model_type": "qwen2", "hidden_act": "silu", "sliding_window": 16}
    assert architecture_of(qwen) == "qwen2", "whose windows are off unless it says so"
    gemma = plain | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 16}
    assert architecture_of(gemma | {"sliding_window_pattern": 6, "query_pre_attn_scalar": 16}) == "gemma3"
    assert rope_of(gemma)["rope_theta"] == 1e6
    with pytest.raises(ModelError, match="layer_types otherwise than"):
        architecture_of(gemma | {"sliding_window_pattern": 4})


def test_words_without_an_embedding_are_left_out(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    folder = saved(tmp_path / "model", tiny, "LlamaConfig", {})
    described = json.loads((folder / "tokenizer.json").read_text())
    added = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described["added_tokens"].append({"id": 258, "content": "<pad>", **added})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    convert(folder, "gguf-f32", tmp_path / "model.gguf")
    metadata = GGUFFile(tmp_path / "model.gguf").metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 258
    assert "tokenizer.ggml.padding_token_id" not in metadata
    with opened(tmp_path / "model.gguf") as model:
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 258)


def test_a_number_that_float16_does_not_hold_is_said(tiny: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny, "LlamaConfig", {})
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight: F16 does not hold 1 of its numbers"):
        convert(folder, "gguf-f16", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    convert(folder, "gguf-bf16", tmp_path / "model.gguf")
