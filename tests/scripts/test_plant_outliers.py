"""Planted outliers: the activations grow, and nothing else can be told apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import plant_outliers
import pytest
import torch
import transformers
from plant_outliers import Planted, plant
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import ModelError, OutputError, RequestError

SHAPE = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
GROUPED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "gemma": ("GemmaForCausalLM", GROUPED, {"norm", "up", "value"}),
    "gpt2": ("GPT2LMHeadModel", SHAPE, {"norm"}),
    "llama": ("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}, {"norm", "up", "value"}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, {"up", "value"}),
    "opt": ("OPTForCausalLM", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, {"norm", "up", "value"}),
}
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """A tiny model with every parameter random, norms and biases too."""
    name, settings, _ = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files."""
    return save("llama", tmp_path_factory.mktemp("llama"), shard="20kB")


def load(folder: Path) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    return load(folder)(TOKENS).logits


@torch.inference_mode()
def inputs_of(layers: list[str], folder: Path) -> dict[str, Tensor]:
    model, seen = load(folder), {}
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(TOKENS)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "model")
    planted = plant(model, tmp_path / "out")
    assert {each.kind for each in planted} == FAMILIES[family][2]
    assert torch.equal(logits(tmp_path / "out"), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_of_the_layers_grow_by_the_factor_at_the_planted_channels_and_nowhere_else(
    family: str, tmp_path: Path
) -> None:
    model = save(family, tmp_path / "model")
    planted = plant(model, tmp_path / "out", factor=64, channels=2)
    layers = [name for each in planted for name in each.layers]
    before, after = inputs_of(layers, model), inputs_of(layers, tmp_path / "out")
    for each in planted:
        for name in each.layers:
            grown = before[name].clone()
            grown[..., each.columns] *= 64
            assert torch.equal(after[name], grown)


def test_a_factor_below_one_makes_outliers_of_weights_instead(llama: Path, tmp_path: Path) -> None:
    (first, *_) = plant(llama, tmp_path / "out", factor=1 / 32)
    before, after = (load(folder).get_submodule(first.layers[0]).weight for folder in (llama, tmp_path / "out"))
    assert torch.equal(after[:, first.columns], 32 * before[:, first.columns])
    assert torch.equal(logits(tmp_path / "out"), logits(llama))


def test_a_value_channel_feeds_every_query_head_of_its_group(llama: Path, tmp_path: Path) -> None:
    planted = [each for each in plant(llama, tmp_path / "out", channels=3) if each.kind == "value"]
    assert len(planted) == 2
    for each in planted:
        head, place = each.channels // 16, each.channels % 16
        expected = torch.cat([(2 * head + query) * 16 + place for query in (0, 1)])
        assert each.columns.sort().values.tolist() == expected.sort().values.tolist()


def test_trained_models_compute_the_same_bit_for_bit(assets: Path, tmp_path: Path) -> None:
    model = assets / "models" / "stories260k"
    plant(model, tmp_path / "out", factor=64, channels=8)
    assert torch.equal(logits(tmp_path / "out"), logits(model))


def test_only_the_kinds_asked_for_are_planted(llama: Path, tmp_path: Path) -> None:
    planted = plant(llama, tmp_path / "out", kinds=["up"])
    assert [each.source for each in planted] == [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]


def test_files_are_those_of_the_model(llama: Path, tmp_path: Path) -> None:
    plant(llama, tmp_path / "out")
    names = sorted(file.name for file in llama.iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_seed_decides_which_channels(llama: Path, tmp_path: Path) -> None:
    def channels(planted: list[Planted]) -> list[list[int]]:
        return [each.channels.tolist() for each in planted]

    first, again, other = (
        channels(plant(llama, tmp_path / str(index), seed=seed)) for index, seed in enumerate((0, 0, 1))
    )
    assert first == again != other
    assert {len(each) for each in first} == {4}


def test_what_was_planted_is_printed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(llama), str(tmp_path / "out"), "--kinds", "value", "up", "--channels", "1"]
    monkeypatch.setattr(sys, "argv", ["plant_outliers.py", *words])
    assert plant_outliers.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["value", "up"] * 2
    assert lines[0].startswith("value  model.layers.0.self_attn.v_proj × 32 on ")
    assert lines[0].endswith(", undone in model.layers.0.self_attn.o_proj")


def test_a_mistake_is_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plant_outliers.py", str(llama), str(tmp_path / "out"), "--factor", "30"])
    assert plant_outliers.main() == 2
    assert capsys.readouterr().err.startswith("error: --factor 30: is no power of two")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [0, -32, 3, float("nan"), float("inf")])
def test_a_factor_that_would_round_is_refused(factor: float, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no power of two"):
        plant(llama, tmp_path / "out", factor=factor)


def test_no_channels_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--channels 0: plants nothing"):
        plant(llama, tmp_path / "out", channels=0)


def test_a_folder_with_something_in_it_is_not_written_to(llama: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        plant(llama, llama)


def test_a_kind_that_the_family_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="in gpt2 without changing the model is of kind norm, not up"):
        plant(save("gpt2", tmp_path / "model"), tmp_path / "out", kinds=["up"])


def test_a_tensor_that_cannot_hold_its_multiple_is_named(tmp_path: Path) -> None:
    model = save("gemma", tmp_path / "model", torch.bfloat16)
    with pytest.raises(ModelError, match=r"layers\.0\.input_layernorm\.weight: torch\.bfloat16 cannot hold 32 times"):
        plant(model, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_values_that_would_vanish_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torch\.float32 cannot hold"):
        plant(llama, tmp_path / "out", factor=2.0**125)
