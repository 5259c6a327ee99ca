"""A tiny random model of every known family, saved as a folder: what the tests of compress.models run on.

Every parameter is random, norms and biases included, so that a fold which forgets one of them shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from compress.models import anatomy_for
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, read_folder

TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}
SLIDING = GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
OPT = SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", SHAPE),
    "bert trunk": ("BertConfig", "BertModel", SHAPE),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SLIDING),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", SLIDING),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SHAPE),
    "gpt_neox sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SHAPE | {"use_parallel_residual": False}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GROUPED | {"residual_multiplier": 0.5}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "llama tied with biases": (
        "LlamaConfig",
        "LlamaForCausalLM",
        GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama trunk": ("LlamaConfig", "LlamaModel", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SHAPE | {"num_key_value_heads": 2}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", SHAPE | {"num_key_value_heads": 2, "sliding_window": 4}),
    "opt": ("OPTConfig", "OPTForCausalLM", OPT),
    "opt post-norm": (
        "OPTConfig",
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt gelu": ("OPTConfig", "OPTForCausalLM", OPT | {"activation_function": "gelu"}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SHAPE | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SHAPE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", SHAPE | {"num_key_value_heads": 2}),
}


def tiny_model(name: str) -> PreTrainedModel:
    """A random model in evaluation mode, in float32; the same one each time."""
    config_class, model_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**TOKENS, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def tiny_model_types() -> set[str]:
    """The `model_type` of every family that has a tiny model."""
    return {name.partition(" ")[0] for name in MODELS}


@pytest.fixture(scope="session", params=sorted(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """Every tiny model by name: a test that asks for this runs once for each of them."""
    return request.param


@pytest.fixture(scope="session")
def model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@pytest.fixture(scope="session")
def folder(family: str, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family.replace(" ", "-"))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def headers(folder: Path) -> Folder:
    return read_folder(folder)


@pytest.fixture(scope="session")
def anatomy(headers: Folder) -> Anatomy:
    return anatomy_for(headers.config, headers.shapes)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two sequences longer than the sliding windows, free of special tokens."""
    return torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
