"""The main job on families that differ from Llama in what a run touches: storage, heads, arguments of blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

import compress
from compress.errors import RecipeError

SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoXForCausalLM": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "Gemma2ForCausalLM": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 16,
        "pad_token_id": 0,
    },
    "Phi3ForCausalLM": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "MixtralForCausalLM": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4,
    },
    "OPTForCausalLM": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "BertModel": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def saved(architecture: str, tiny: Path, folder: Path) -> Path:
    """A model of this architecture with random weights and the tiny model's tokenizer."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    size = Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab_size()
    config = model_class.config_class(vocab_size=size, bos_token_id=0, eos_token_id=1, **SIZES[architecture])
    model_class(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    return folder


def settings(*more: str) -> list[str]:
    small = ["gptq.group_size=16", "calibration.samples=6", "calibration.sequence_length=32", "evaluation.samples=2"]
    return [*small, "gates={}", *more]


NOT_READ_ALIKE = {"BertModel", "GPT2LMHeadModel", "MixtralForCausalLM"}


@pytest.mark.parametrize("architecture", [name for name in SIZES if name not in NOT_READ_ALIKE])
def test_gptq_gives_a_folder_that_transformers_and_netsuke_read_alike(
    architecture: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    model = saved(architecture, tiny, tmp_path / "model")
    report = compress.run(
        "w4a16-gptq", model=str(model), output=tmp_path / "out", calibration=str(text), overrides=settings()
    )
    assert report["verification"]["max_relative_difference"] < 1e-5
    ours, _ = compress.load(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_a_mixture_keeps_its_experts_and_its_attention_is_quantized(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = saved("MixtralForCausalLM", tiny, tmp_path / "model")
    report = compress.run(
        "w4a16-gptq", model=str(model), output=tmp_path / "out", calibration=str(text), overrides=settings()
    )
    assert {layer["name"].split(".")[3] for layer in report["stages"][0]["layers"]} == {"self_attn"}
    assert any("transformers 5.24 does not" in note for note in report["notes"])
    before, after = load_file(model / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    experts = [name for name in before if ".block_sparse_moe." in name]
    assert len(experts) == 2 * (1 + 3 * 4)
    assert all(torch.equal(after[name], before[name]) for name in experts)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    for name in ("block_sparse_moe.gate", "block_sparse_moe.experts", "mlp.experts.3.gate_proj", "mlp.gate"):
        assert any(re.match(pattern, f"model.layers.1.{name}") for pattern in patterns)
    assert not any(re.match(pattern, "model.layers.1.mlp.gate_proj") for pattern in patterns)
    ours, _ = compress.load(tmp_path / "out")
    with torch.no_grad():
        assert ours(torch.arange(2, 40).unsqueeze(0)).logits.isfinite().all()


def test_conv1d_is_kept_out_of_a_format_that_cannot_hold_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = saved("GPT2LMHeadModel", tiny, tmp_path / "model")
    with pytest.raises(RecipeError, match="is a Conv1D.*format: dense"):
        compress.run(
            "w4a16-gptq", model=str(model), output=tmp_path / "out", calibration=str(text), overrides=settings()
        )


def test_gpt2_goes_through_in_the_dense_format(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = saved("GPT2LMHeadModel", tiny, tmp_path / "model")
    report = compress.run(
        "w4a16-gptq",
        model=str(model),
        output=tmp_path / "out",
        calibration=str(text),
        overrides=settings("checkpoint.format=dense"),
    )
    assert report["evaluation"]["texts"][0]["kl_divergence"] < 0.05
    weight = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").transformer.h[0].mlp.c_fc.weight
    assert weight.shape == (32, 128)
    assert len(weight[:16, 0].unique()) <= 16


def test_an_encoder_is_compressed_and_said_to_have_no_perplexity(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = saved("BertModel", tiny, tmp_path / "model")
    report = compress.run(
        "w4a16-gptq", model=str(model), output=tmp_path / "out", calibration=str(text), overrides=settings()
    )
    assert report["evaluation"] is None
    assert "an encoder has no perplexity" in report["evaluation_note"]
    assert report["verification"]["max_relative_difference"] < 1e-5


def test_linear_layers_outside_the_blocks_are_named_as_kept(tiny: Path, text: Path, tmp_path: Path) -> None:
    """OPT with projections around its blocks: a reader that takes every Linear for quantized would fail."""
    pytest.importorskip("compressed_tensors")
    SIZES["OPTForCausalLM"]["word_embed_proj_dim"] = 16
    model = saved("OPTForCausalLM", tiny, tmp_path / "model")
    SIZES["OPTForCausalLM"]["word_embed_proj_dim"] = 32
    compress.run("w4a16-gptq", model=str(model), output=tmp_path / "out", calibration=str(text), overrides=settings())
    ours, _ = compress.load(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_blocks_that_the_model_does_not_run_are_copied(tiny: Path, tmp_path: Path) -> None:
    """Files may hold more blocks than config.json asks for, as heads that predict several tokens ahead do."""
    model = saved("OPTForCausalLM", tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    compress.run("w8a16-rtn", model=str(model), output=tmp_path / "out", overrides=["gates={}"])
    last = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert "model.decoder.layers.1.fc1.weight" in last
