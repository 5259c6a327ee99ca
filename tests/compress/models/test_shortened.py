"""A shortened folder is the model with its blocks deleted by hand, in every way that families number their blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from compress.errors import ModelError
from compress.models import anatomy_for
from compress.models.headers import Folder, read_folder
from compress.models.shortened import shortened
from compress.models.store import LazyModel, Weights

TOKENS = torch.randint(4, 128, (2, 12), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
FULL, SLIDING = "full_attention", "sliding_attention"

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": (
        {**SHAPE, "head_dim": 16, "eos_token_id": [1, 2, 3, 4], "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL]},
    ),
    "Qwen2": (
        {**SHAPE, "use_sliding_window": True, "max_window_layers": 2},
        {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING], "max_window_layers": 1},
    ),
    "SmolLM3": (
        {**SHAPE, "no_rope_layers": [1, 0, 1, 0]},
        {"num_hidden_layers": 3, "layer_types": [FULL] * 3, "no_rope_layers": [1, 1, 0]},
    ),
    "GPT2": (GPT2, {"n_layer": 3}),
}
"""Family → its config, and what becomes of it without block 1."""


def saved(family: str, settings: dict[str, Any], path: Path) -> tuple[nn.Module, Folder]:
    """A random model of a family, and its folder. The config leaves lists out that transformers can work out."""
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    model_class = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    if family == "GPT2":  # as it is on the hub: without the decoder's prefix
        tensors = load_file(path / "model.safetensors")
        bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        save_file(bare, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    derived = {"layer_types"} - settings.keys()
    (path / "config.json").write_text(json.dumps({key: config[key] for key in config.keys() - derived}))
    return model, read_folder(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_that_stay_do_what_they_did(family: str, tmp_path: Path) -> None:
    settings, changed = FAMILIES[family]
    model, folder = saved(family, settings, tmp_path)
    anatomy = anatomy_for(folder.config, folder.shapes)
    short = shortened(folder, anatomy, [1])
    assert {key: value for key, value in short.config.items() if folder.config.get(key) != value} == changed
    shell = LazyModel(Weights(short), dtype=torch.float32)
    with shell.streamed():
        computed = shell.logits(TOKENS)
    model.get_submodule(f"{anatomy.blocks}.1").forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(computed, model(TOKENS, use_cache=False).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, r"transformer\.h\.2 would have attn\.scaling=0\.17\d*, not 0\.11"),
        ({"n_layer": None}, "has none of num_hidden_layers, n_layer, n_layers, num_layers"),
    ],
)
def test_a_model_that_goes_by_the_numbers_of_its_blocks_is_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    _, folder = saved("GPT2", GPT2, tmp_path)
    folder = replace(folder, config=folder.config | settings)
    with pytest.raises(ModelError, match=told):
        shortened(folder, anatomy_for(folder.config, folder.shapes), [1])
