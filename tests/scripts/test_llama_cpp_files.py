"""llama.cpp itself reads our GGUF files, and computes with them what we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import compress
from compress.checkpoint.gguf import load as load_gguf
from compress.models.store import load_tokenizer
from compress.pipeline.convert import convert
from compress.quantize.rtn import RTN
from compress.recipe import CheckpointOptions, Evaluation, Recipe
from compress.scoring.opened import opened
from eval.llama_cpp import LlamaCpp

pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
from llama_cpp_files import quantize

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def ours(folder: Path) -> np.ndarray:
    with opened(folder) as model:
        return model(TOKENS).float().numpy()


def theirs(file: Path) -> np.ndarray:
    return LlamaCpp(file)(TOKENS).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_llama_in_float32(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, "gguf-f32", tmp_path / "model.gguf")
    assert relative(theirs(tmp_path / "model.gguf"), ours(tiny)) < 1e-4


def test_a_qwen3_whose_heads_are_not_turned(tiny: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 259, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(tmp_path / "qwen")
    load_tokenizer(tiny).save_pretrained(tmp_path / "qwen")
    convert(tmp_path / "qwen", "gguf-f32", tmp_path / "model.gguf")
    assert relative(theirs(tmp_path / "model.gguf"), ours(tmp_path / "qwen")) < 1e-4


@pytest.mark.parametrize(("kind", "symmetric", "bound"), [("q4_0", True, 1e-5), ("q4_1", False, 5e-3)])
def test_it_decodes_the_codes_of_a_run_to_the_weights_they_stand_for(
    tiny: Path, tmp_path: Path, kind: str, symmetric: bool, bound: float
) -> None:
    stages = (RTN("w4a16", 32, symmetric),)
    recipe = Recipe("r", stages, checkpoint=CheckpointOptions("gptq_v2"), evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=tmp_path / "packed")
    found = convert(tmp_path / "packed", f"gguf-{kind}", tmp_path / "model.gguf")
    assert found["requantized"] == 0
    quantize(tmp_path / "model.gguf", tmp_path / "decoded.gguf", "F32")
    expected = ours(tmp_path / "packed")
    assert relative(theirs(tmp_path / "decoded.gguf"), expected) < bound
    rounded = relative(theirs(tmp_path / "model.gguf"), expected)
    assert 1e-4 < rounded < 0.05, "llama.cpp rounds the inputs of quantized layers to 8 bits"


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_it_decodes_k_types_to_the_weights_we_meant(kind: str, tiny: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    load_tokenizer(tiny).save_pretrained(tmp_path / "wide")
    convert(tmp_path / "wide", f"gguf-{kind.lower()}", tmp_path / "model.gguf")
    quantize(tmp_path / "model.gguf", tmp_path / "decoded.gguf", "F32")
    model.load_state_dict(load_gguf(tmp_path / "model.gguf"), strict=False)
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits.numpy()
    assert relative(theirs(tmp_path / "decoded.gguf"), expected) < 1e-4
